"""Tests of the metadata from `probe` and `scan`, including files that are joined, damaged or unusual, or have wrong headers."""

import struct
import zlib
from dataclasses import replace
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, read_chunks, scan
from evoprune.video.readers import ffmpeg, probing, pyav
from evoprune.video.sandbox import isolation
from tests.video import mutations
from tests.video.files import (
    SAID,
    apart,
    number_of,
    numbered_frame,
    numbered_frames,
    numbers,
    pixels,
    quarters,
    spoil,
    write_image,
    write_said,
    write_sound,
    write_video,
)
from tests.video.kinds import KINDS, write_kind
from tests.video.mutations import SOURCES, run_all, table

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
    "no_length.mkv": ({"container_options": {"live": "1"}}, {}),  # all packets are read to find the end
}


@pytest.mark.parametrize("name", FILES)
def test_facts(name, tmp_path):
    how, expected = FILES[name]
    info = probe(write_video(tmp_path / name, FRAMES, **how))
    assert (info.duration_s, info.fps, info.rate_guessed) == (pytest.approx(3.0, abs=1e-6), 10, False)
    assert (info.width, info.height, info.rotation_deg, info.mirrored) == (64, 48, 0, False)
    assert info.path == str(tmp_path / name) and info.tags.get("comment") == how.get("metadata", {}).get("comment")
    assert {fact: getattr(info, fact) for fact in expected} == expected


def test_a_variable_rate_is_noticed_but_rounded_times_are_not(tmp_path):
    vary = [0.01 * i * i for i in range(30)]
    assert probe(write_video(tmp_path / "vary.mp4", FRAMES, pts=vary)).variable_rate is True
    rounded = [i / 30 for i in range(30)]  # after rounding, 33 or 34 milliseconds apart
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
        (b"1\n00:00:01,000 --> 00:00:04,000\nHello\n", "it is a text file"),  # FFmpeg opens subtitle files, too
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
    """Return the times of frames that are `step` apart: `first` frames from 0 s onward, then `then` frames from 23 s onward."""
    return [*(step * i for i in range(first)), *(23 + step * i for i in range(then))]


SORTED, REORDERED = {"bf": "0"}, {"bf": "3"}
ALWAYS = REORDERED | {"x264-params": "b-adapt=0:scenecut=0"}
GAPS = {  # for each file name: the times of the frames, and encoder options
    **{f"{options['bf']}{end}": (gap(36, 30, 1 / 12), options) for end in (".mp4", ".mov", ".mkv", ".ts", "_copy.mkv")
       for options in (SORTED, REORDERED)},
    # The frame that is displayed last is stored before the end of the gap, and the gap would count as the frame's duration.
    "before the last.mp4": (gap(34, 5, 1 / 12), ALWAYS),
    # A frame's duration does not follow from the average frame rate.
    "slow.mp4": (gap(7, 5, 0.5), SORTED), "slides.mp4": (range(12), SORTED),
    "short_copy.mkv": ([*(i / 12 for i in range(22)), *(i / 12 + 2.5 for i in range(22, 32))], REORDERED),
    **{f"hours.{end}": ([0.0, 1234.567, 5000.003, 9999.987, 20000.017], SORTED) for end in ("mkv", "mp4")},
}  # fmt: skip


@pytest.mark.parametrize("name", GAPS)
def test_a_gap_in_time_does_not_make_a_video_longer(name, tmp_path):
    """In an MP4 with reordered frames, the durations in the header are only differences between decoding times.

    If such a file is copied to another container, a frame in the middle gets a wrong duration in the new header.
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
    # When FFmpeg writes a program stream, it leaves out one interval.
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
    "hours_later.ts": ({}, {"start": 20_000.0}),  # timestamps as in a recording that began hours later
    "hours_earlier.ts": ({"start": 20_000.0}, {}),
    "a.vob": (MPEG2, MPEG2),
    "a.mpg": (MPEG2, MPEG2),
}


def joined(folder, name, cut):
    """Write frames 0 to 239 to two files and concatenate the files. The first file has the first `cut` frames."""
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
    assert sum(chunk.damaged for chunk in read_chunks(info, times)) == 0


def test_several_parts(tmp_path):
    path = tmp_path / "three.ts"
    path.write_bytes(write_video(tmp_path / "part.ts", numbered_frames(30)).read_bytes() * 3)
    info = probe(path)
    assert (info.clock_restarts, scan(path).damaged) == (2, 0) and info.duration_s == pytest.approx(9.0, abs=0.2)
    assert numbers(info, [0.05, 2.95, 3.05, 5.95, 6.05, 8.95]) == pytest.approx([0, 29] * 3, abs=1)


HOW = {
    "webm": {"codec": "libvpx"}, "wmv": {"codec": "wmv2"}, "avi": {"codec": "mpeg4"},
    "gif": {"codec": "gif", "pix_fmt": "rgb8"}, "mpg": MPEG2, "vob": MPEG2,
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "live.mkv": {"container_options": {"live": "1"}},
}  # fmt: skip


def joined_three(folder, name, **how):
    """Write frames 0 to 59 to three files, 20 frames each, and concatenate them. Returns the first file and the joined file."""
    ending = name.rpartition(".")[2]
    parts = [
        write_video(folder / f"{i}.{ending}", [numbered_frame(20 * i + j) for j in range(20)], **how) for i in range(3)
    ]
    path = folder / f"joined.{ending}"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return parts[0], path


@pytest.mark.parametrize("name", ["mkv", "live.mkv", "webm", "mp4", "mov", "fragments.mp4", "flv", "avi", "wmv"])
def test_a_joined_file_that_may_not_be_read_to_its_end_is_said_to_be_one(name, tmp_path):
    first, path = joined_three(tmp_path, name, **HOW.get(name, {}))
    assert not probe(first).joined
    info = probe(path)
    assert info.warnings == ["joined_files"] and numbers(info, [0.05, 0.55, 1.05]) == [0, 5, 10]


@pytest.mark.parametrize("name", ["ts", "mpg", "vob", "gif"])
def test_other_joined_files_are_read_to_their_end(name, tmp_path):
    _, path = joined_three(tmp_path, name, **HOW.get(name, {}))
    info = probe(path)
    found = scan(path)
    step = 1 / HOW.get(name, {}).get("fps", 10)
    assert [info.duration_s, found.duration_s] == pytest.approx([60 * step] * 2, abs=1e-3)
    assert (found.frames, found.damaged, info.clock_restarts) == (60, 0, 0 if name == "gif" else 2)
    assert numbers(info, [(i + 0.5) * step for i in range(60)]) == list(range(60))
    assert not info.cut_short and info.warnings == []


def test_a_jump_ahead_that_counts_as_another_clock_is_said(tmp_path):
    parts = [write_video(tmp_path / f"{start}.ts", numbered_frames(30), start=start) for start in (0.0, 900.0)]
    path = tmp_path / "joined.ts"
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    info = probe(path)
    assert info.warnings == ["clock_gap"] and info.clock_gap_s == pytest.approx(897, abs=1)
    assert info.duration_s == pytest.approx(6.0, abs=0.2)


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
    path = joined_three(tmp_path, "live.mkv", **HOW["live.mkv"])[1]
    with pytest.raises(VideoError, match="restart"):
        list(read_chunks(probe(path), [0.0, 1.0], decoder="decord"))


def test_a_damaged_packet_leaves_the_frame_before_it_on_screen(folder):
    """A damaged packet at the beginning is skipped. Each is counted once, when it is read. A scan counts all damaged packets."""
    whole = write_video(folder / "intra.mp4", numbered_frames(100), gop=1)
    info = probe(spoil(whole, folder / "spoilt.mp4", {0, 1, 4, 13, 14, 70}))
    chunks = list(read_chunks(info, [0.05 + 0.1 * i for i in range(20)], chunk_bytes=10 * 64 * 48 * 3))
    assert [number_of(rgb) for rgb in pixels(chunks)] == [2, 3, 3, *range(5, 13), 12, 12, *range(15, 22)]
    assert [chunk.damaged for chunk in chunks] == [3, 2]
    assert [chunk.damaged for chunk in read_chunks(info, [0.25, 9.05])] == [
        3
    ]  # the other damaged packets are skipped by seeking
    found = scan(info.path)
    assert (found.frames, found.damaged, found.variable_rate, found.duration_s) == (94, 6, False, pytest.approx(9.8))
    assert found.largest_gap_s == pytest.approx(0.3)
    with pytest.raises(VideoError, match=r"ruined.mp4 can be decoded"):
        list(read_chunks(replace(info, path=str(spoil(whole, folder / "ruined.mp4", range(100)))), [0.5]))


SPREAD = (
    "mpeg2.mpg",
    "mpeg1.mpg",
    "wmv2.wmv",
)  # packets in these files are split, or their bytes are mixed with other data


HIDDEN = ("picture.gif", "raw.avi", "raw.y4m", "h264.h264", "mpeg2.mxf")  # damage cannot be detected in these formats


# Files in which damage or a missing end may go unnoticed in the tests below.
SMALL = ("no_length.mkv", "vp9_hidden.webm", "vp9_10.webm", "subtitles.mkv", "cover.mkv", "ffv1.mkv")


FORTY = [name for name, kind in KINDS.items() if kind.frames == 40 and not kind.hidden and name not in SPREAD]


@pytest.mark.parametrize("ending", ["h264", "hevc", "m2v"])
def test_a_raw_stream_that_states_its_rate(ending, tmp_path):
    codec = {"h264": {}, "hevc": KINDS["hevc.mp4"].how, "m2v": {"codec": "mpeg2video"}}[ending]
    info = probe(write_video(tmp_path / f"raw.{ending}", numbered_frames(50), fps=50, **codec))
    assert (info.fps, info.duration_s, info.rate_guessed, info.warnings) == (50, pytest.approx(1.0), False, [])
    assert numbers(info, [0.01, 0.51, 0.99]) == [0, 25, 49]


def test_a_rate_that_is_a_guess_is_said_to_be_one(tmp_path):
    info = probe(write_video(tmp_path / "raw.obu", numbered_frames(50), fps=50, **KINDS["av1.mkv"].how))
    assert (info.fps, info.rate_guessed, info.warnings) == (25, True, ["guessed_rate"])


@pytest.mark.parametrize("rates", [(60_000, 25), (1000, 1000), (0, 0)])
def test_the_frequency_of_a_clock_is_no_rate(rates):
    average, guessed = map(Fraction, rates)
    tick = 1 / average if average else Fraction(1, 90_000)
    said = SimpleNamespace(
        container=SimpleNamespace(format=SimpleNamespace(flags=0)),
        average_rate=average,
        guessed_rate=guessed,
        time_base=tick,
    )
    assert ffmpeg.frame_rate(said) == (25 if guessed == 25 else None, False)
    fast = SimpleNamespace(**vars(said) | {"average_rate": Fraction(4000), "time_base": Fraction(1, 90_000)})
    assert ffmpeg.frame_rate(fast) == (4000, False)


def test_a_rate_that_nothing_states_is_measured(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", numbered_frames(30), fps=20)
    monkeypatch.setattr(ffmpeg, "frame_rate", lambda stream: (None, False))
    assert probing.probe(str(path)).fps == pytest.approx(20, rel=0.02)


def test_what_an_edit_list_takes_away_is_not_missing(tmp_path):
    content = bytearray(write_video(tmp_path / "whole.mp4", numbered_frames(60), gop=60).read_bytes())
    at = content.index(b"elst") + 12
    assert struct.unpack(">I", content[at : at + 4]) == (6000,)
    content[at : at + 4] = struct.pack(">I", 3000)
    path = tmp_path / "trimmed.mp4"
    path.write_bytes(content)
    info = probe(path)
    assert (info.duration_s, info.stated_s, info.frames_total) == (pytest.approx(3.0), pytest.approx(3.0), 30)
    assert not info.cut_short and numbers(info, [0.05, 2.95, 5.0]) == [0, 29, 29]


@pytest.mark.parametrize(
    "behind, kind", [(12, b"moof"), (7, b"moof"), (3, b"mdat"), (8, b"mdat"), (40, b"mdat"), (4, b"mfra")]
)
def test_a_recording_that_was_cut_off_in_a_fragment(behind, kind, tmp_path):
    how = {"container_options": {"movflags": "frag_keyframe+empty_moov+default_base_moof"}, "gop": 10}
    content, path = write_video(tmp_path / "whole.mp4", numbered_frames(60), **how).read_bytes(), tmp_path / "cut.mp4"
    path.write_bytes(content[: content.rindex(kind) - 4 + behind])
    try:
        info = probe(path)
    except VideoError as refusal:
        assert "complete" in refusal.hint and kind == b"moof"
    else:
        assert numbers(info, [0.05, 2.55, 4.05]) == [0, 25, 40] and not info.joined


@pytest.mark.parametrize("claimed", [0, 2**30])
def test_an_avi_whose_header_was_never_completed(claimed, tmp_path):
    """An AVI that was written to a pipe has no index, and its header states either no frames or a billion frames."""
    content = bytearray(write_video(tmp_path / "whole.avi", numbered_frames(20), codec="mpeg4").read_bytes())
    at = content.index(b"avih") + 24
    content[at : at + 4] = struct.pack("<I", claimed)
    at = content.index(b"strh") + 40
    content[at : at + 4] = struct.pack("<I", claimed)
    path = tmp_path / "piped.avi"
    path.write_bytes(content[: content.rindex(b"idx1")])
    info = probe(path)
    assert (info.duration_s, info.stated_s, info.cut_short, info.warnings) == (pytest.approx(2.0), None, False, [])
    assert numbers(info, [0.05, 1.95]) == [0, 19]


def test_an_avi_remuxed_from_matroska_has_its_length(tmp_path):
    """Its clock ticks every millisecond, and the header counts ticks."""
    content = write_video(tmp_path / "ten.mkv", numbered_frames(30), codec="mpeg4")
    with av.open(str(content)) as source, av.open(str(tmp_path / "ten.avi"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.dts is not None:
                packet.stream = copy
                target.mux(packet)
    info = probe(tmp_path / "ten.avi")
    assert (info.duration_s, info.stated_s, info.frames_total) == (pytest.approx(3.0, abs=0.11), info.duration_s, None)
    assert numbers(info, [0.0, 1.0, 2.9]) == [0, 10, 29]


@pytest.mark.parametrize("repeated", [{5, 6, 20}, {5, 37, 38, 39}])
def test_frames_that_an_avi_repeats_without_data(repeated, tmp_path):
    path = tmp_path / "repeats.avi"
    apart(encode_repeats, path, repeated)
    info, found = probe(path), scan(path)
    assert (info.duration_s, found.duration_s, found.frames, found.damaged) == (4.0, 4.0, 40 - len(repeated), 0)
    wanted = [max(j for j in range(i + 1) if j not in repeated) for i in range(40)]
    assert numbers(info, [0.05 + 0.1 * i for i in range(40)]) == wanted


def encode_repeats(path, repeated):
    with av.open(str(path), "w") as out:
        stream = out.add_stream("mpeg4", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        stream.codec_context.gop_size = 1
        for i, rgb in enumerate(numbered_frames(40)):
            frame = av.VideoFrame.from_ndarray(rgb, format="rgb24").reformat(format="yuv420p")
            frame.pts, frame.time_base = i, Fraction(1, 10)
            for packet in stream.encode(frame):
                empty = av.Packet(b"")
                empty.pts = empty.dts = packet.pts
                empty.time_base, empty.stream = packet.time_base, stream
                out.mux(empty if i in repeated else packet)


def test_packets_without_data_are_no_damage(folder, monkeypatch):
    """Theora files may have empty packets, which FFmpeg's decoders take for the end of the stream. PyAV cannot write them."""
    path = write_video(folder / "intra.mkv", numbered_frames(20), gop=1)
    original = ffmpeg.packets

    def some_empty(*arguments, **how):
        for number, packet in enumerate(original(*arguments, **how)):
            if packet is not None and packet.size and number % 5 == 4:
                empty = av.Packet(b"")
                empty.pts, empty.dts, empty.time_base = packet.pts, packet.dts, packet.time_base
                packet = empty
            yield packet

    monkeypatch.setattr(ffmpeg, "packets", some_empty)
    info, damage = probing.probe(str(path)), set()
    frames = list(pyav.intervals(info, damage.add))
    assert (len(frames), damage, info.duration_s) == (16, set(), pytest.approx(2.0))


def read_whole(path):
    """Return a file's metadata, the numbers of the frames on screen at 40 times, and the number of damaged packets."""
    info = probe(path)
    rate = info.fps or 25
    chunks = list(read_chunks(info, [(i + 0.5) / rate for i in range(40)]))
    return info, [number_of(rgb) for rgb in pixels(chunks)], sum(chunk.damaged for chunk in chunks)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [name for name in FORTY if "vary" not in name])
def test_one_damaged_packet_in_every_kind(name, folder):
    whole = write_kind(folder, name)
    assert read_whole(whole)[2] == 0 and not probe(whole).cut_short
    info, got, damaged = read_whole(spoil(whole, folder / f"spoilt_{name}", {14}))
    assert got[:10] == list(range(10))
    if name not in (*SMALL, *HIDDEN):
        assert damaged or info.cut_short
    if info.container in (
        "mov,mp4,m4a,3gp,3g2,mj2",
        "mpegts",
        "avi",
    ):  # these containers state where the next packet is
        assert got[35:] == list(range(35, 40))


@pytest.mark.few(15)
@pytest.mark.parametrize("name", [name for name in FORTY if "vary" not in name and name != "h264.h264"])
def test_a_cut_file_of_every_kind(name, folder):
    whole = write_kind(folder, name)
    cut = folder / f"cut_{name}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    try:
        info, got, _ = read_whole(cut)
    except VideoError as problem:
        assert problem.exit_code == 3 and str(cut) in problem.message and problem.hint
        assert name.endswith((".mp4", ".mov"))  # these files have their index at the end
        return
    assert got[0] == 0 and all(number <= i for i, number in enumerate(got)) and got == sorted(got)
    # The complete file's metadata can be used to read the file that was cut off.
    assert number_of(next(read_chunks(replace(probe(whole), path=str(cut)), [0.01])).pixels[0]) == 0
    if name.endswith((".mkv", ".webm", ".flv", ".avi")) and name not in SMALL:
        found = scan(cut)
        assert info.cut_short and min(each.stated_s - each.duration_s for each in (info, found)) > 0.5
        assert found.frames < 40 and info.duration_s == pytest.approx(found.duration_s, abs=0.5)


@pytest.mark.few(1)
@pytest.mark.parametrize("ending", ["mkv", "flv"])
@pytest.mark.parametrize("sound", [0.0, 8.0])
@pytest.mark.parametrize("way", ["zeroed", "left out"])
def test_a_hole_is_noticed(way, sound, ending, folder):
    noise = np.random.default_rng(0).integers(-30, 30, (4, 96, 128, 3))
    frames = [(numbered_frame(i, 96, 128) + noise[i % 4]).clip(0, 255).astype(np.uint8) for i in range(80)]
    how = {"container_options": {"cluster_time_limit": "500"}} if ending == "mkv" else {}
    whole = write_video(folder / f"dense_{sound}.{ending}", frames, audio_s=sound, **how)
    content = whole.read_bytes()
    begin, end = len(content) // 2, len(content) * 3 // 4
    holed = folder / f"holed_{sound}.{ending}"
    times = [0.05 + 0.1 * i for i in range(80)]
    assert sum(chunk.damaged for chunk in read_chunks(probe(whole), times)) == 0
    holed.write_bytes(content[:begin] + (bytes(end - begin) if way == "zeroed" else b"") + content[end:])
    chunks = list(read_chunks(probe(holed), times))
    got = [number_of(rgb) for rgb in pixels(chunks)]
    assert got[:20] == list(range(20)) and got[-5:] == list(range(75, 80)) and got[45] < 45
    if way == "zeroed":  # missing data may not be noticed
        assert sum(chunk.damaged for chunk in chunks)


TIMES = np.linspace(0.05, 3.95, 16)


@pytest.fixture
def lying(folder, tmp_path):
    """A function that writes a file of some kind with wrong values in its header.

    For example, `lying("h264.mp4", b"stsz", 8, ">I", 10**9)` replaces the value 8 bytes after `stsz` with 10**9. More than one
    change can be given.
    """

    def call(name, *changes):
        content = bytearray(write_kind(folder, name).read_bytes())
        for mark, offset, form, *values in zip(*[iter(changes)] * 4, strict=True):
            at = content.rindex(mark) + offset
            content[at : at + struct.calcsize(form)] = struct.pack(form, *values[0])
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return call


@pytest.fixture
def peak():
    """A function that returns the peak memory that the reader process has used during the test, in bytes."""
    isolation.end_all()

    def call():
        with open(f"/proc/{isolation._idle[0].pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    yield call
    isolation.end_all()


def refused_to_read(path, *words):
    with pytest.raises(VideoError) as caught:
        list(read_chunks(probe(path), TIMES))
    assert caught.value.exit_code == 3 and str(path) in caught.value.message
    for word in words:
        assert word in caught.value.message + caught.value.hint


HUGE = {
    "mp4 sizes": ("h264.mp4", b"stsz", 12, ">I", [10**9]),
    "mp4 equal sizes": ("h264.mp4", b"stsz", 8, ">II", [1, 10**9]),
    "mp4 durations": ("h264.mp4", b"stts", 12, ">I", [10**9]),
    "avi header": ("mpeg4.avi", b"avih", 24, "<I", [10**9]),
    "avi stream": ("mpeg4.avi", b"strh", 40, "<I", [10**9]),
    **{f"mp4 every count {n}": ("h264.mp4", b"stsz", 8, ">II", [1, n], b"stts", 12, ">I", [n], b"stsc", 16, ">I", [n])
       for n in (10**7, 10**9)},  # all frames share the same bytes
}  # fmt: skip


@pytest.mark.few(1)
@pytest.mark.parametrize("name", HUGE)
def test_a_thousand_million_frames(name, lying, peak):
    path = lying(*HUGE[name])
    try:
        info = probe(path)
        assert info.frames_total in (None, 40) and info.duration_s == pytest.approx(4.0)
        assert len(numbers(info, TIMES)) == 16
    except VideoError as problem:
        assert str(path) in problem.message
    assert peak() < (2**30 if "10000000" in name else 2**28)


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [(65_535, 65_535), (12_000, 12_000), (65_535, 2)])
@pytest.mark.parametrize("name", ["vp9.webm", "ffv1.mkv", "h264.mkv"])
def test_huge_pictures_in_matroska(name, size, tmp_path, peak):
    path = write_video(tmp_path / name, numbered_frames(40, 256, 320), **KINDS[name].how)
    header = b"\xb0\x82%b\xba\x82%b"  # width and height, each stored in two bytes
    old, new = (header % (struct.pack(">H", width), struct.pack(">H", height)) for height, width in ((256, 320), size))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    if name == "ffv1.mkv":  # frames in FFV1 do not state their own size
        refused_to_read(path, *(["megapixels"] if size == (12_000, 12_000) else []))
    else:
        assert numbers(probe(path), [0.05, 3.95]) == [0, 39]
    assert peak() < 2**28


HUGE_IMAGES = [
    *[("gif", size) for size in ((65_535, 65_535), (16_000, 16_000))],
    *[(kind, size) for size in ((100_000, 100_000), (2**31 - 1, 1), (16_000, 16_000), (2**31 - 1, 2**31 - 1))
      for kind in ("picture", "folder")],
]  # fmt: skip


@pytest.mark.few(2)
@pytest.mark.parametrize(("kind", "size"), HUGE_IMAGES)
def test_huge_images(kind, size, tmp_path, lying, peak):
    if kind == "gif":
        refused_to_read(lying("picture.gif", b"GIF8", 6, "<HH", size), "megapixels")
        return
    path = write_image(tmp_path / "a.png", quarters())
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    # The file is reported as too large, not as damaged.
    refused_to_read(tmp_path if kind == "folder" else path, "a.png is too large: evoprune reads at most 134 megapixels")
    assert peak() < 2**28


def test_matroska_that_claims_years(folder, tmp_path):
    content = write_kind(folder, "vp9.webm").read_bytes()
    path = tmp_path / "long.webm"
    path.write_bytes(content.replace(struct.pack(">d", 4000.0), struct.pack(">d", 1e12)))
    info = probe(path)
    assert info.duration_s == pytest.approx(4.0) and info.stated_s == pytest.approx(1e9) and info.cut_short
    assert numbers(info, [0.05, 3.95]) == [0, 39]


def test_no_frames_at_all(folder, tmp_path):
    content = write_kind(folder, "fragments.mp4").read_bytes()
    path = tmp_path / "none.mp4"
    path.write_bytes(content[: content.index(b"moof") - 4])
    refused_to_read(path, "no frame")
    for ending in ("mkv", "avi", "flv", "mp4"):
        with av.open(str(tmp_path / f"none.{ending}"), "w") as out:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            out.start_encoding()
        refused_to_read(tmp_path / f"none.{ending}")


def test_no_times_in_a_transport_stream(folder, tmp_path):
    """The test changes the PES headers so that they state that they contain no times."""
    content = bytearray(write_kind(folder, "h264.ts").read_bytes())
    at, count = content.find(b"\0\0\1\xe0"), 0
    while at >= 0:
        content[at + 7] &= 0x3F
        at, count = content.find(b"\0\0\1\xe0", at + 1), count + 1
    path = tmp_path / "timeless.ts"
    path.write_bytes(content)
    info = probe(path)
    assert count == 40 and info.duration_s > 1
    step = 1 / info.fps
    assert numbers(info, [0.0, 10 * step + 0.001, info.duration_s]) == [0, 10, 39]


def test_frames_that_change_their_size(tmp_path):
    """The file consists of three raw streams with different frame sizes."""
    pieces = [
        write_video(tmp_path / f"{size}.h264", numbered_frames(20, *size), options={"x264-params": "annexb=1"})
        for size in ((48, 64), (96, 128), (24, 32))
    ]
    path = tmp_path / "changing.h264"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    info = probe(path)
    assert (info.width, info.height, info.warnings) == (64, 48, [])
    assert numbers(info, [i / 10 + 0.01 for i in range(60)]) == [*range(20)] * 3


@pytest.mark.parametrize("seed", [77, pytest.param(0, marks=pytest.mark.slow)])
def test_broken_videos_are_answered_or_refused(seed, tmp_path, monkeypatch):
    count = 1000
    if seed:
        count = 4 * len(SOURCES)
        monkeypatch.setattr(mutations, "COMMAND_EVERY", 1000)
    outcomes = list(run_all(range(count), seed, tmp_path))
    assert len(outcomes) == count and not [outcome for outcome in outcomes if outcome.bad], table(outcomes)
    assert {outcome.code for outcome in outcomes} == {0, 3}
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_still_beside_the_video_is_no_other_track(tmp_path):
    path = write_video(tmp_path / "video.mp4", FRAMES)
    still = write_video(tmp_path / "still.mp4", FRAMES[:1])
    both = tmp_path / "both.mp4"  # an animated AVIF also contains its first frame as a still image
    with av.open(str(still)) as first, av.open(str(path)) as second, av.open(str(both), "w") as out:
        streams = [out.add_stream_from_template(source.streams.video[0]) for source in (first, second)]
        for source, stream in zip((first, second), streams, strict=True):
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    info = probe(both)
    assert (info.frames_total, info.other_tracks, info.warnings) == (30, 0, [])


def gif(path, count, width=16, height=16):
    """Write a GIF in which each frame changes only one pixel and takes 23 bytes."""
    head = b"GIF89a" + struct.pack("<HH", width, height) + b"\xf0\0\0" + b"\0\0\0\xff\xff\xff"
    frame = b"\x21\xf9\x04\0\x0a\0\0\0\x2c" + struct.pack("<HHHH", 0, 0, 1, 1) + b"\0\x02\x02\x44\x01\0"
    path.write_bytes(head + count * frame + b";")
    return path


def test_a_frame_of_a_video_has_fewer_pixels_than_a_picture(tmp_path):
    refused_to_read(gif(tmp_path / "a.gif", 2, 10_000, 8_000), "megapixels")


def test_decompression_bombs_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    refused_to_read(gif(tmp_path / "bomb.gif", 200, 8_000, 8_000), "billion pixels in 200 frames")
    path = write_video(tmp_path / "small.mp4", FRAMES)
    assert probe(path).frames_total == 30
    monkeypatch.setattr(isolation, "POSSIBLE", False)
    monkeypatch.setattr(ffmpeg, "MAX_DECODED_PIXELS", 30 * 64 * 48 - 1)
    assert probe(path).frames_total == 30  # larger files may have more frames
    monkeypatch.setattr(ffmpeg, "MAX_PIXELS_PER_BYTE", 1)
    refused_to_read(path, "pixels in 30 frames")


@pytest.mark.parametrize("name", ["many.gif", "many.h264"])
def test_a_file_of_too_many_packets_is_not_read_to_its_end(name, tmp_path, in_process, monkeypatch):
    path = gif(tmp_path / name, 400) if name == "many.gif" else write_video(tmp_path / name, FRAMES * 10)
    monkeypatch.setattr(probing, "MAX_PACKETS", 200)
    monkeypatch.setattr(probing, "BYTES_PER_PACKET", 2**20)
    refused_to_read(path, "more than 200 frames")


def test_frames_that_come_after_a_demuxing_error_are_scanned(tmp_path):
    """PyAV 18 gives the frames that a decoder returns at the end no time base."""
    path = write_kind(tmp_path, "picture.apng")
    content = path.read_bytes()
    (tmp_path / "cut.apng").write_bytes(content[: content.rindex(b"fcTL") + 34])
    assert 0 < scan(tmp_path / "cut.apng").frames < scan(path).frames


def test_the_stated_size_of_a_damaged_index_allocates_nothing(tmp_path):
    """FFmpeg reads such a box up to the end of the file."""
    path = write_video(tmp_path / "a.mp4", FRAMES)
    content = bytearray(path.read_bytes())
    content[content.rindex(b"moov") - 4] = 0x80
    path.write_bytes(content)
    assert probe(path).frames_total == 30
