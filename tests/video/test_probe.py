"""What is known of a file: by `probe` from its metadata, by `scan` from all of it; files that were joined byte by byte."""

import av
import numpy as np
import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, read_frames, scan
from tests.video.files import SAID, numbered_frames, numbers, write_image, write_said, write_sound, write_video
from tests.video.kinds import KINDS, write_kind

FRAMES = numbered_frames(30)


FILES = {
    "plain.mp4": ({}, {"codec": "h264", "variable_rate": False, "frames_total": 30, "pix_fmt": "yuv420p"}),
    "raw.h264": ({}, {"start_s": 0}),
    "tags.mp4": ({"metadata": {"comment": "hello"}}, {}),
    "plain.mov": ({}, {"codec": "h264", "variable_rate": False}),
    "plain.mkv": ({}, {"codec": "h264", "variable_rate": None, "frames_total": None}),
    "plain.webm": ({"codec": "libvpx-vp9"}, {"codec": "vp9", "container": "matroska,webm"}),
    "plain.ts": ({}, {"container": "mpegts"}),
    "plain.avi": ({}, {"frames_total": 30}),
    "plain.flv": ({}, {}),
    "plain.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, {"codec": "gif"}),
    "av1.mkv": ({"codec": "libsvtav1"}, {"codec": "av1"}),
    "ten_bit.mp4": ({"pix_fmt": "yuv420p10le"}, {"pix_fmt": "yuv420p10le"}),
    **{f"late.{end}": ({"start": 5.0}, {"start_s": 5.0}) for end in ("mp4", "mkv", "ts")},
    "long_audio.mp4": ({"audio_s": 9.0}, {}),
    "long_audio.mkv": ({"audio_s": 9.0}, {}),
    "fragments.mp4": ({"container_options": {"movflags": "frag_keyframe+empty_moov"}}, {}),
    "no_length.mkv": ({"container_options": {"live": "1"}}, {}),  # read to its end
}


@pytest.mark.parametrize("name", FILES)
def test_facts(name, tmp_path):
    how, expected = FILES[name]
    info = probe(write_video(tmp_path / name, FRAMES, **how))
    raw = name == "raw.h264"  # it states no rate, and 25 is what FFmpeg assumes
    assert (info.duration_s, info.fps) == (pytest.approx(30 / 25 if raw else 3.0, abs=1e-6), 25 if raw else 10)
    assert (info.width, info.height, info.rotation_deg, info.mirrored) == (64, 48, 0, False)
    assert info.path == str(tmp_path / name) and info.tags.get("comment") == how.get("metadata", {}).get("comment")
    assert {fact: getattr(info, fact) for fact in expected} == expected


def test_a_variable_rate_is_noticed_but_rounded_times_are_not(tmp_path):
    vary = [0.01 * i * i for i in range(30)]
    assert probe(write_video(tmp_path / "vary.mp4", FRAMES, pts=vary)).variable_rate is True
    rounded = [i / 30 for i in range(30)]  # 33 or 34 milliseconds apart
    assert probe(write_video(tmp_path / "rounded.mp4", FRAMES, pts=rounded)).variable_rate is False
    assert not scan(write_video(tmp_path / "rounded.mkv", FRAMES, pts=rounded)).variable_rate


def refused(path, *words):
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "is empty"),
        (bytes(5000), "or its beginning is damaged"),
        (b"Good morning\n", "it is a text file"),
        ("Grüße\n".encode("latin-1") * 200, "it is a text file"),
        ("Grüße\n".encode("utf-16"), "it is a text file"),
        (b"1\n00:00:01,000 --> 00:00:04,000\nHello\n", "it is a text file"),  # FFmpeg reads subtitles
        (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>', "it is a text file"),
        (b"#EXTM3U\n#EXTINF:1,\na.ts\n", "it is a playlist"),
        (b"%PDF-1.7\n" + bytes(5000), "it is a PDF document"),
        (b"PK\x03\x04" + bytes(5000), "it is a ZIP archive or an office document"),
        (np.random.default_rng(0).bytes(5000), "or its beginning is damaged"),
    ],
)
def test_what_is_no_video_is_named_as_what_it_is(content, found, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(content)
    refused(tmp_path / "clip.mp4", found)


def test_audio_alone_is_refused_with_a_cover_or_without(tmp_path):
    write_sound(tmp_path / "cover.mp3", cover=True)
    refused(tmp_path / "cover.mp3", "cover picture")
    write_sound(tmp_path / "sound.m4a")
    refused(tmp_path / "sound.m4a", "no video stream")


def test_a_video_that_breaks_off_or_holds_nothing_is_refused(tmp_path):
    content = write_video(tmp_path / "whole.mp4", FRAMES).read_bytes()
    begin, end = content.index(b"mdat") + 4, content.index(b"moov") - 4
    (tmp_path / "cut.mp4").write_bytes(content[:2000])
    refused(tmp_path / "cut.mp4", "is it a complete video file?", "before its index")
    (tmp_path / "blank.mp4").write_bytes(content[:begin] + bytes(end - begin) + content[end:])
    refused(tmp_path / "blank.mp4")


def gap(first, then, step):
    """Times of `first` frames from 0 and of `then` frames from 23 seconds, so far apart."""
    return [*(step * i for i in range(first)), *(23 + step * i for i in range(then))]


SORTED, REORDERED = {"bf": "0"}, {"bf": "3", "x264-params": "b-adapt=0:scenecut=0"}
GAPS = {  # the file's name, the times of its frames, and options of the encoder
    **{f"{options['bf']}{end}": (gap(36, 30, 1 / 12), options) for end in (".mp4", ".mov", ".mkv", ".ts", "_copy.mkv")
       for options in (SORTED, REORDERED)},
    "before the last.mp4": (gap(34, 5, 1 / 12), REORDERED),  # the last is stored before the gap's end, which counts as its duration
    "slow.mp4": (gap(7, 5, 0.5), SORTED), "slides.mp4": (range(12), SORTED),  # an average rate is not the length of a frame
    "short_copy.mkv": ([*(i / 12 for i in range(22)), *(i / 12 + 2.5 for i in range(22, 32))], REORDERED),
    **{f"hours.{end}": ([0.0, 1234.567, 5000.003, 9999.987, 20000.017], SORTED) for end in ("mkv", "mp4")},
}  # fmt: skip


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_in_time_does_not_make_a_video_longer(name, tmp_path):
    """Frames that are stored out of order have, in MP4, differences of decoding times as their durations.

    A copy's header has the wrong duration of a frame in the middle.
    """
    (times, options), path = GAPS[name], tmp_path / name
    written = tmp_path / name.replace("_copy.mkv", ".mp4")
    write_video(written, numbered_frames(len(times)), pts=times, fps=12, options=options)
    if path != written:
        copy_packets(written, path)
    info = probe(path)
    assert [info.duration_s, scan(path).duration_s] == pytest.approx([times[-1] + 1 / 12] * 2, abs=2e-3)
    assert not info.cut_short and info.clock_restarts == 0


def copy_packets(path, out):
    with av.open(str(path)) as source, av.open(str(out), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                target.mux(packet)


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_shown_as_players_show_it_is_said(name, tmp_path):
    facts, warning = write_said(tmp_path / name)
    info = probe(tmp_path / name)
    assert {fact: getattr(info, fact) for fact in facts} == facts
    assert info.warnings == ([warning] if warning else [])


@pytest.mark.few(12)
@pytest.mark.parametrize("name", KINDS)
def test_a_scan_of_whole_files(name, folder):
    kind, path = KINDS[name], write_kind(folder, name)
    found, info = scan(path), probe(path)
    assert (found.frames, found.damaged) == (kind.frames - kind.hidden, 0)
    assert found.duration_s == pytest.approx(info.duration_s, abs=1e-3)
    # FFmpeg's writer of program streams leaves one step out.
    assert found.variable_rate == (name.startswith("vary") or name == "mpeg2.mpg")
    assert found.stated_s is None or found.stated_s == pytest.approx(found.duration_s, rel=0.25)
    assert found.largest_gap_s <= found.keyframe_max_s <= found.duration_s + 1e-4
    assert found.keyframe_median_s <= found.keyframe_max_s
    assert found.seconds > 0 and info.clock_restarts == 0
    if kind.frames == 1:
        assert (found.largest_gap_s, found.keyframe_max_s) == (0.0, found.duration_s)


def test_a_scan_of_intervals(tmp_path):
    displayed = [0.0, 0.1, 0.2, 0.9, 1.0, 1.1]
    found = scan(write_video(tmp_path / "gap.mp4", numbered_frames(6), pts=displayed))
    assert found.largest_gap_s == pytest.approx(0.7)
    assert found.variable_rate
    steady = {"options": {"sc_threshold": "0"}}
    found = scan(write_video(tmp_path / "a.mp4", numbered_frames(45), gop=10, **steady))
    assert (found.keyframe_median_s, found.keyframe_max_s, found.largest_gap_s) == (1.0, 1.0, 0.1)
    found = scan(write_video(tmp_path / "b.mp4", numbered_frames(45), gop=1000, **steady))
    assert (found.keyframe_median_s, found.keyframe_max_s) == (4.5, 4.5)


def test_a_scan_of_a_folder(tmp_path):
    for i, rgb in enumerate(numbered_frames(8)):
        write_image(tmp_path / f"{i}.png", rgb)
    (tmp_path / "3.png").write_bytes(b"damaged")
    found = scan(tmp_path, folder_fps=4)
    assert (found.frames, found.damaged, found.duration_s, found.variable_rate) == (7, 1, 2.0, False)
    assert (found.largest_gap_s, found.keyframe_median_s, found.keyframe_max_s) == (0.5, 0.25, 0.5)
    with pytest.raises(UsageError):
        scan(tmp_path, folder_fps=0)


MPEG2 = {"codec": "mpeg2video", "fps": 25}


JOINED = {
    "a.ts": ({}, {}),
    "b.ts": (MPEG2, MPEG2),
    "no_reordering.ts": ({"options": {"bf": "0"}},) * 2,
    "hours_later.ts": ({}, {"start": 20_000.0}),  # a recording that began at another time of the day
    "hours_earlier.ts": ({"start": 20_000.0}, {}),
    "a.vob": (MPEG2, MPEG2),
    "a.mpg": (MPEG2, MPEG2),
    "a.mkv": ({}, {}),
    "a.avi": ({"codec": "mpeg4"},) * 2,
    "b.avi": ({}, {}),
    "a.webm": ({"codec": "libvpx"},) * 2,
}


def joined(folder, name, cut):
    """Frames 0 to 239, the first `cut` of them from one file, the others from another one."""
    ending = name.rpartition(".")[2]
    frames, path = numbered_frames(240), folder / f"joined.{ending}"
    parts = zip((frames[:cut], frames[cut:]), JOINED[name], strict=True)
    files = [write_video(folder / f"{i}.{ending}", some, **how) for i, (some, how) in enumerate(parts)]
    path.write_bytes(b"".join(file.read_bytes() for file in files))
    return path


@pytest.mark.few(5)
@pytest.mark.parametrize("cut", [200, 40])
@pytest.mark.parametrize("name", JOINED)
def test_times_go_on(name, cut, tmp_path):
    path = joined(tmp_path, name, cut)
    info, found, step = probe(path), scan(path), 1 / JOINED[name][0].get("fps", 10)
    assert info.clock_restarts == 1 and not info.cut_short
    assert [info.duration_s, found.duration_s] == pytest.approx([240 * step] * 2, abs=2 * step)
    assert (found.frames, found.damaged) == (240, 0) and found.largest_gap_s < 3 * step
    times = [(i + 0.5) * 240 * step / 24 for i in range(24)]
    assert numbers(info, times) == pytest.approx([5 + 10 * i for i in range(24)], abs=2)
    assert sum(chunk.damaged for chunk in read_frames(info, times)) == 0


def test_several_parts(tmp_path):
    path = tmp_path / "three.ts"
    path.write_bytes(write_video(tmp_path / "part.ts", numbered_frames(30)).read_bytes() * 3)
    info = probe(path)
    assert (info.clock_restarts, scan(path).damaged) == (2, 0) and info.duration_s == pytest.approx(9.0, abs=0.2)
    assert numbers(info, [0.05, 2.95, 3.05, 5.95, 6.05, 8.95]) == pytest.approx([0, 29] * 3, abs=1)


def test_damage_between_the_joints_still_counts(tmp_path):
    whole = write_video(tmp_path / "whole.ts", numbered_frames(60), gop=1).read_bytes()
    lost = bytearray(whole)
    for share in (0.8, 0.5, 0.3):
        at = int(len(whole) * share) // 188 * 188
        del lost[at : at + 188]
    (tmp_path / "joined.ts").write_bytes(whole + lost)
    found, alone = scan(tmp_path / "joined.ts"), tmp_path / "lost.ts"
    alone.write_bytes(lost)
    assert found.damaged == scan(alone).damaged > 0


def test_decord_refuses_them(tmp_path):
    pytest.importorskip("decord")
    path = joined(tmp_path, "a.mkv", 40)
    with pytest.raises(VideoError, match="restart"):
        list(read_frames(probe(path), [0.0, 1.0], decoder="decord"))
