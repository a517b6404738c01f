import struct

import numpy as np
import pytest

from evoprune.video.frames import read_frames
from evoprune.video.probe import probe
from tests.video.files import number_of, numbered_frames, numbers, quarters, write_video


@pytest.mark.parametrize("size", [(47, 63), (33, 16), (48, 66)])
def test_odd_sizes(size, folder):
    path = write_video(folder / f"{size}.mp4", numbered_frames(6, *size), pix_fmt="yuv444p")
    chunk = next(read_frames(probe(path), [0.05, 0.35]))
    assert chunk.frames.shape == (2, *size, 3)
    assert [number_of(rgb) for rgb in chunk.frames] == [0, 3]


def first_picture(path):
    return next(read_frames(probe(path), [0.0])).frames[0]


@pytest.mark.few(8)
@pytest.mark.parametrize("rotation", [0, 90, 180, 270])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_frames_are_turned_for_display(rotation, mirrored, ending, folder):
    path = write_video(folder / f"turned.{ending}", [quarters()] * 2, rotation=rotation, mirrored=mirrored)
    upright = quarters()[:, ::-1] if mirrored else quarters()
    turned = np.rot90(upright, -rotation // 90)
    got = first_picture(path)
    assert got.shape == turned.shape
    assert got.flags.c_contiguous
    assert np.abs(got.astype(int) - turned).mean() < 8


@pytest.mark.parametrize(
    ("matrix", "order"),  # order: colours above from left to right, then below
    [((0, 1, -1, 0), "BRWG"), ((0, -1, 1, 0), "GWRB"), ((-1, 0, 0, -1), "WBGR"), ((-1, 0, 0, 1), "GRWB")],
)
def test_the_matrix_of_a_phone_is_read_as_phones_mean_it(matrix, order, folder):
    path = write_video(folder / "phone.mp4", [quarters()] * 2)
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44  # a phone held upright writes (0, 1, -1, 0) here, as 16.16 fixed-point numbers
    a, b, c, d = (value << 16 for value in matrix)
    content[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(content)
    got = first_picture(path).astype(int)
    height, width = got.shape[:2]
    corners = [got[y, x] for y in (8, height - 8) for x in (8, width - 8)]
    colours = {(1, 0, 0): "R", (0, 1, 0): "G", (0, 0, 1): "B", (1, 1, 1): "W"}
    assert "".join(colours[tuple(int(v > 128) for v in corner)] for corner in corners) == order


def test_a_change_of_size_is_scaled_away(folder):
    small = write_video(folder / "small.ts", numbered_frames(10), start=3.0)
    large = write_video(folder / "large.ts", numbered_frames(20, 96, 128)[10:], start=4.0)
    both = folder / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    info = probe(both)
    assert (info.width, info.height) == (64, 48)
    assert numbers(info, [0.05 + 0.1 * i for i in range(20)]) == list(range(20))


def test_full_range_is_honoured(folder):
    grey = [np.full((48, 64, 3), 10, np.uint8)] * 2
    path = write_video(folder / "full.mp4", grey, codec="mjpeg", pix_fmt="yuvj420p")
    assert abs(int(first_picture(path).mean()) - 10) <= 2
