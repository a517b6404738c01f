from dataclasses import replace

import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames
from tests.video.files import (
    number_of,
    numbered_frame,
    numbered_frames,
    numbers,
    pixels,
    spoil,
    write_image,
    write_video,
)
from tests.video.kinds import KINDS, write_kind


def test_a_damaged_packet_leaves_the_frame_before_it_on_screen(folder):
    whole = write_video(folder / "intra.mp4", numbered_frames(30), gop=1)
    info = probe(spoil(whole, folder / "spoilt.mp4", {4, 11, 12}))
    right = list(range(30))
    right[4], right[11], right[12] = 3, 10, 10
    assert numbers(info, [0.05 + 0.1 * i for i in range(30)]) == right


def test_a_damaged_beginning_is_skipped(folder):
    whole = write_video(folder / "intra2.mp4", numbered_frames(30), gop=1)
    info = probe(spoil(whole, folder / "spoilt2.mp4", {0, 1}))
    assert numbers(info, [0.0, 0.05]) == [2, 2]


def test_nothing_to_decode_is_an_error(folder):
    whole = write_video(folder / "whole.mp4", numbered_frames(30))
    info = replace(probe(whole), path=str(spoil(whole, folder / "ruined.mp4", range(30))))
    with pytest.raises(VideoError, match=r"ruined.mp4 can be decoded"):
        list(read_frames(info, [0.5]))


@pytest.mark.parametrize("ending", ["mkv", "ts", "mp4"])
def test_a_cut_file_gives_what_it_has(ending, folder):
    how = {"container_options": {"movflags": "faststart"}} if ending == "mp4" else {}
    whole = write_video(folder / f"uncut.{ending}", numbered_frames(256), **how)
    cut = folder / f"cut.{ending}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    got = numbers(probe(cut), np.arange(0.05, 25.6, 0.1))
    left = max(got)
    assert 40 < left < 250
    assert got[: left - 2] == list(range(left - 2))  # the last packet may be torn
    assert got[-1] in (left, left - 1)
    # The whole file's facts, from before it was cut, lead to the same frames.
    assert numbers(replace(probe(whole), path=str(cut)), [1.05, 24.95])[0] == 10


SPREAD = ("mpeg2.mpg", "mpeg1.mpg", "wmv2.wmv")  # a packet does not lie in one piece, or not alone
HIDDEN = ("picture.gif", "raw.avi", "raw.y4m", "h264.h264", "mpeg2.mxf")  # they have no means of telling
SMALL = (
    "no_length.mkv",
    "vp9_hidden.webm",
    "vp9_10.webm",
    "subtitles.mkv",
    "cover.mkv",
    "ffv1.mkv",
)  # see the next test
FORTY = [name for name, kind in KINDS.items() if kind.frames == 40 and not kind.hidden and name not in SPREAD]


def read(path):
    """The facts, the number of every frame on screen, and how much damage was met."""
    info = probe(path)
    rate = info.fps or 25
    chunks = list(read_frames(info, [(i + 0.5) / rate for i in range(40)]))
    return info, [number_of(rgb) for rgb in pixels(chunks)], sum(chunk.damaged for chunk in chunks)


@pytest.mark.few(8)
@pytest.mark.parametrize("name", [name for name in FORTY if "vary" not in name])
def test_one_damaged_packet_in_every_kind(name, folder):
    whole = write_kind(folder, name)
    assert read(whole)[2] == 0 and not probe(whole).cut_short
    info, got, damaged = read(spoil(whole, folder / f"spoilt_{name}", {14}))
    assert got[:10] == list(range(10))
    if name not in SMALL + HIDDEN:
        assert damaged or info.cut_short
    if info.container in ("mov,mp4,m4a,3gp,3g2,mj2", "mpegts", "avi"):  # they know where the next packet is
        assert got[35:] == list(range(35, 40))


@pytest.mark.few(15)
@pytest.mark.parametrize("name", [name for name in FORTY if "vary" not in name and name != "h264.h264"])
def test_a_cut_file_of_every_kind(name, folder):
    whole = write_kind(folder, name)
    cut = folder / f"cut_{name}"
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    try:
        info, got, _ = read(cut)
    except VideoError as problem:
        assert problem.exit_code == 3 and str(cut) in problem.message and problem.hint
        assert name.endswith((".mp4", ".mov"))  # their index comes last
        return
    assert got[0] == 0 and all(number <= i for i, number in enumerate(got)) and got == sorted(got)
    if name.endswith((".mkv", ".webm", ".flv", ".avi")) and name not in SMALL:
        assert info.cut_short and info.stated_s - info.duration_s > 0.5


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
    assert sum(chunk.damaged for chunk in read_frames(probe(whole), times)) == 0
    holed.write_bytes(content[:begin] + (bytes(end - begin) if way == "zeroed" else b"") + content[end:])
    chunks = list(read_frames(probe(holed), times))
    got = [number_of(rgb) for rgb in pixels(chunks)]
    assert got[:20] == list(range(20)) and got[-5:] == list(range(75, 80)) and got[45] < 45
    if way == "zeroed":  # what is left out may leave no trace
        assert sum(chunk.damaged for chunk in chunks)


def test_damage_is_counted_where_it_is_met_and_once(folder):
    whole = write_video(folder / "counted.mp4", numbered_frames(100), gop=1)
    info = probe(spoil(whole, folder / "counted_spoilt.mp4", {4, 11, 12, 70}))
    chunks = list(read_frames(info, [0.05 + 0.1 * i for i in range(20)], chunk_bytes=10 * 64 * 48 * 3))
    assert [chunk.damaged for chunk in chunks] == [1, 2]
    assert [chunk.damaged for chunk in read_frames(info, [0.05, 9.05])] == [0]  # the jump passes over it all


def test_damaged_images_of_a_folder_are_counted(tmp_path):
    for i, rgb in enumerate(numbered_frames(6)):
        write_image(tmp_path / f"{i}.png", rgb)
    for i in (0, 3):
        (tmp_path / f"{i}.png").write_bytes(b"damaged")
    info = probe(tmp_path)
    assert [chunk.damaged for chunk in read_frames(info, [0.0, 0.5, 1.0, 1.5, 2.0, 2.5])] == [2]
    assert [chunk.damaged for chunk in read_frames(info, [0.5, 1.0])] == [0]


@pytest.mark.parametrize(
    ("duration", "stated", "cut"),
    [
        (4.0, None, False),
        (None, 4.0, False),
        (4.0, 4.4, False),
        (3.4, 4.0, True),
        (99.0, 100.0, False),
        (97.0, 100.0, True),
    ],
)
def test_what_counts_as_cut_short(duration, stated, cut, folder):
    info = probe(write_kind(folder, "h264.mp4"))
    assert replace(info, duration_s=duration, stated_s=stated).cut_short == cut
