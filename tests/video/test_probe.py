import os

import av
import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, scan
from tests.video.files import SAID, numbered_frames, write_said, write_sound, write_video

FRAMES = numbered_frames(30)
FILES = {
    "plain.mp4": ({}, {"codec": "h264", "variable_rate": False, "frames_total": 30, "pix_fmt": "yuv420p"}),
    "plain.mov": ({}, {"codec": "h264", "variable_rate": False}),
    "plain.mkv": ({}, {"codec": "h264", "variable_rate": None, "frames_total": None}),
    "plain.webm": ({"codec": "libvpx-vp9"}, {"codec": "vp9", "container": "matroska,webm"}),
    "plain.ts": ({}, {"container": "mpegts"}),
    "plain.avi": ({}, {"frames_total": 30}),
    "plain.flv": ({}, {}),
    "plain.gif": ({"codec": "gif", "pix_fmt": "rgb8"}, {"codec": "gif"}),
    "av1.mkv": ({"codec": "libsvtav1"}, {"codec": "av1"}),
    "ten_bit.mp4": ({"pix_fmt": "yuv420p10le"}, {"pix_fmt": "yuv420p10le"}),
    "late.mp4": ({"start": 5.0}, {"start_s": 5.0}),
    "late.mkv": ({"start": 5.0}, {"start_s": 5.0}),
    "late.ts": ({"start": 5.0}, {"start_s": 5.0}),
    "long_audio.mp4": ({"audio_s": 9.0}, {}),
    "long_audio.mkv": ({"audio_s": 9.0}, {}),
    "fragments.mp4": ({"container_options": {"movflags": "frag_keyframe+empty_moov"}}, {}),
}


@pytest.mark.parametrize("name", FILES)
def test_facts(name, tmp_path):
    how, expected = FILES[name]
    info = probe(write_video(tmp_path / name, FRAMES, **how))
    assert info.duration_s == pytest.approx(3.0, abs=1e-6)
    assert info.fps == 10
    assert (info.width, info.height, info.rotation_deg, info.mirrored) == (64, 48, 0, False)
    assert info.path == str(tmp_path / name)
    assert {fact: getattr(info, fact) for fact in expected} == expected


def test_a_raw_stream_has_its_frames_counted(tmp_path):
    info = probe(write_video(tmp_path / "raw.h264", FRAMES))
    assert info.duration_s == pytest.approx(30 / 25)  # it states no rate, and 25 is what FFmpeg assumes
    assert info.start_s == 0


def test_a_live_recording_without_length_is_read_to_its_end(tmp_path):
    info = probe(write_video(tmp_path / "live.mkv", FRAMES, container_options={"live": "1"}))
    assert info.duration_s == pytest.approx(3.0)


@pytest.mark.parametrize(("name", "how"), [("one.mp4", {}), ("one.webm", {"codec": "libvpx-vp9"})])
def test_a_single_frame_lasts_as_long_as_it_is_shown(name, how, tmp_path):
    assert probe(write_video(tmp_path / name, FRAMES[:1], **how)).duration_s == pytest.approx(0.1)


def test_a_variable_rate_is_noticed_but_rounded_times_are_not(tmp_path):
    vary = [0.01 * i * i for i in range(30)]
    assert probe(write_video(tmp_path / "vary.mp4", FRAMES, pts=vary)).variable_rate is True
    rounded = [i / 30 for i in range(30)]  # 33 or 34 milliseconds apart
    assert probe(write_video(tmp_path / "rounded.mp4", FRAMES, pts=rounded)).variable_rate is False


@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
def test_orientation(rotation, mirrored, tmp_path):
    info = probe(write_video(tmp_path / "turned.mp4", FRAMES[:2], rotation=rotation, mirrored=mirrored))
    assert (info.rotation_deg, info.mirrored) == (rotation, mirrored)
    assert (info.width, info.height) == ((64, 48) if rotation in (0, 180) else (48, 64))


def test_tags(tmp_path):
    assert probe(write_video(tmp_path / "a.mp4", FRAMES[:2], metadata={"comment": "hello"})).tags["comment"] == "hello"


def test_a_cut_file_is_as_long_as_what_is_left(tmp_path):
    whole = write_video(tmp_path / "whole.mp4", FRAMES, container_options={"movflags": "faststart"})
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    assert 0.1 < probe(cut).duration_s < 2.9


def test_names_that_look_like_protocols(tmp_path, monkeypatch):
    write_video(tmp_path / "plain.mp4", FRAMES[:2]).rename(tmp_path / "http:12:30.mp4")
    monkeypatch.chdir(tmp_path)
    assert probe("http:12:30.mp4").path == "http:12:30.mp4"


def refused(path, *words):
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert str(path) in caught.value.message
    assert caught.value.hint
    for word in words:
        assert word in caught.value.message + caught.value.hint


def test_urls_are_refused():
    refused("https://example.org/a.mp4", "yt-dlp")


def test_what_is_not_a_file_is_refused(tmp_path):
    refused(tmp_path / "missing.mp4", "no such file")
    refused(tmp_path, "folder")
    with pytest.raises(VideoError, match="no file can have the name"):
        probe("nul\0byte.mp4")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        refused(tmp_path / "pipe", "not a regular file")


@pytest.mark.parametrize("content", [b"", bytes(5000), b"hello\n" * 500, np.random.default_rng(0).bytes(5000)])
@pytest.mark.parametrize("name", ["a.mp4", "a.txt", "a.mkv", "a.ts"])
def test_what_is_not_a_video_is_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / name)


@pytest.mark.parametrize(
    ("content", "found"),
    [
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
def test_a_file_that_is_no_video_is_named_as_what_it_is(content, found, tmp_path):
    (tmp_path / "clip.mp4").write_bytes(content)
    refused(tmp_path / "clip.mp4", f"clip.mp4 is not a video{',' * found.startswith('or')}", found, "MP4, MOV, MKV")


def test_a_video_that_breaks_off_is_called_incomplete_not_something_else(tmp_path):
    path = write_video(tmp_path / "cut.mp4", FRAMES)
    path.write_bytes(path.read_bytes()[:2000])
    refused(path, "cannot read", "is it a complete video file?", "before its index")


def test_audio_alone_is_refused(tmp_path):
    write_sound(tmp_path / "sound.m4a")
    refused(tmp_path / "sound.m4a", "no video stream")


def test_a_cover_picture_is_no_video(tmp_path):
    write_sound(tmp_path / "cover.mp3", cover=True)
    refused(tmp_path / "cover.mp3", "cover picture")


def test_a_video_of_which_nothing_can_be_decoded_is_refused(tmp_path):
    path = write_video(tmp_path / "blank.mp4", FRAMES)
    content = bytearray(path.read_bytes())
    begin = content.index(b"mdat") + 4
    content[begin : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - begin)
    path.write_bytes(content)
    refused(path)


BURSTS = [*(i / 12 for i in range(36)), *(23 + i / 12 for i in range(30))]  # 12 a second, with a gap of 20 s


@pytest.mark.parametrize("frames", [0, 3])
@pytest.mark.parametrize("name", ["a.mp4", "a.mov", "a.mkv", "a.ts", "remuxed.mkv"])
def test_a_gap_in_time_does_not_make_a_video_longer(name, frames, tmp_path):
    """Frames that are stored out of order have, in MP4, differences of decoding times as their durations."""
    written = tmp_path / name.replace("remuxed.mkv", "b.mp4")
    write_video(written, numbered_frames(66), pts=BURSTS, fps=12, options={"bf": str(frames)})
    path = copied(written, tmp_path / name)
    info = probe(path)
    assert info.duration_s == pytest.approx(25.5, abs=2e-3) and not info.cut_short
    assert scan(path).duration_s == pytest.approx(25.5, abs=2e-3)


@pytest.mark.parametrize("frames", [0, 3])
def test_a_gap_before_the_last_frames(frames, tmp_path):
    """The frame displayed last is stored before the gap's end, so the whole gap counts as its duration."""
    times = [*(i / 12 for i in range(34)), *(23 + i / 12 for i in range(5))]
    options = {"bf": str(frames), "x264-params": "b-adapt=0:scenecut=0"}
    path = write_video(tmp_path / "a.mp4", numbered_frames(39), pts=times, fps=12, options=options)
    assert [probe(path).duration_s, scan(path).duration_s] == pytest.approx([23 + 5 / 12] * 2, abs=2e-3)


def test_an_average_rate_is_not_the_length_of_a_frame(tmp_path):
    times = [*(0.5 * i for i in range(7)), *(23 + 0.5 * i for i in range(5))]
    for name, pts in (("gap.mp4", times), ("slides.mp4", range(12))):
        path = write_video(tmp_path / name, numbered_frames(12), pts=pts, fps=12, options={"bf": "0"})
        info = probe(path)
        assert info.duration_s == info.stated_s == pytest.approx(pts[-1] + 1 / 12, abs=2e-3)
        assert not info.cut_short


def copied(path, out):
    """The file, or a copy of its packets in another container."""
    if path != out:
        with av.open(str(path)) as source, av.open(str(out), "w") as target:
            stream = target.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream = stream
                    target.mux(packet)
    return out


@pytest.mark.parametrize("name", SAID)
def test_what_is_not_shown_as_players_show_it_is_said(name, tmp_path):
    facts, warning = write_said(tmp_path / name)
    info = probe(tmp_path / name)
    assert {fact: getattr(info, fact) for fact in facts} == facts
    assert info.warnings == ([warning] if warning else [])


def test_a_short_gap_is_no_end_that_is_missing(tmp_path):
    """The copy's header has the wrong duration of a frame in the middle, two seconds after the true end."""
    times = [*(i / 12 for i in range(22)), *(i / 12 + 2.5 for i in range(22, 32))]
    written = write_video(tmp_path / "a.mp4", numbered_frames(32), pts=times, fps=12, options={"bf": "3"})
    info = probe(copied(written, tmp_path / "b.mkv"))
    assert not info.cut_short and info.duration_s == pytest.approx(times[-1] + 1 / 12, abs=2e-3)
