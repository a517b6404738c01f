import struct
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames
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


CLEAR = np.zeros((48, 64, 4), np.uint8)  # red, half black, and nothing, which is stored as black
CLEAR[:, :24] = 200, 0, 0, 255
CLEAR[:, 24:40] = 0, 0, 0, 128
# What is seen of it, from left to right.
OVER_WHITE = [(200, 0, 0), (127, 127, 127), (255, 255, 255)]
TRANSPARENT = {
    "prores.mov": ("prores_ks", "yuva444p10le", {}),
    "animation.mov": ("qtrle", "argb", {}),
    "png.mov": ("png", "rgba", {}),
    "ffv1.mkv": ("ffv1", "bgra", {}),
    "vp9.webm": ("libvpx-vp9", "yuva420p", {"auto-alt-ref": "0"}),
    "vp8.webm": ("libvpx", "yuva420p", {"auto-alt-ref": "0"}),
}


def written_transparent(path, codec, pix_fmt, options):
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=10, options=options)
        stream.width, stream.height, stream.pix_fmt = 64, 48, pix_fmt
        for i in range(3):
            frame = av.VideoFrame.from_ndarray(CLEAR, format="rgba").reformat(format=pix_fmt)
            frame.pts, frame.time_base = i, Fraction(1, 10)
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def is_over_white(got):
    colours = [got[24, x].astype(int) for x in (10, 32, 56)]
    return np.abs(np.subtract(colours, OVER_WHITE)).max() <= 4


@pytest.mark.parametrize("name", TRANSPARENT)
def test_transparent_parts_of_videos_are_put_over_white(name, tmp_path):
    info = probe(written_transparent(tmp_path / name, *TRANSPARENT[name]))
    (chunk,) = read_frames(info, [0.05, 0.25])
    assert is_over_white(chunk.frames[0]) and is_over_white(chunk.frames[1])


@pytest.mark.parametrize("ending", ["png", "webp"])
def test_transparent_frames_of_a_folder_are_put_over_white(ending, tmp_path):
    Image.fromarray(CLEAR).save(tmp_path / f"a.{ending}", lossless=True, exact=True)
    large = Image.fromarray(CLEAR).resize((128, 96), Image.Resampling.NEAREST)
    large.save(tmp_path / f"b.{ending}", lossless=True, exact=True)
    assert is_over_white(first_picture(tmp_path / f"a.{ending}"))  # a picture
    (chunk,) = read_frames(probe(tmp_path), [0.0, 0.5])
    assert is_over_white(chunk.frames[0]) and is_over_white(chunk.frames[1])


@pytest.mark.parametrize(("ending", "mode"), [("png", "LA"), ("png", "P")])
def test_grey_and_palettes_with_transparency(ending, mode, tmp_path):
    image = Image.fromarray(CLEAR).convert("LA") if mode == "LA" else Image.fromarray(CLEAR[..., 0]).convert("P")
    image.save(tmp_path / f"a.{ending}", **({} if mode == "LA" else {"transparency": 0}))
    (chunk,) = read_frames(probe(tmp_path), [0.0])
    assert chunk.frames[0][24, 56].tolist() == [255] * 3
    assert np.array_equal(chunk.frames[0], first_picture(tmp_path / f"a.{ending}"))


@pytest.mark.parametrize("name", ["a.gif", "a.apng"])
def test_animations_are_put_over_white(name, tmp_path):
    frames = [Image.fromarray(np.roll(CLEAR, i, 1)) for i in range(3)]
    how = {"format": "PNG"} if name == "a.apng" else {"disposal": 2}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, **how)
    got = first_picture(tmp_path / name)
    assert got[24, 56].tolist() == [255] * 3 and np.abs(got[24, 10].astype(int) - (200, 0, 0)).max() <= 2


def test_decord_refuses_transparency(tmp_path):
    pytest.importorskip("decord")
    info = probe(written_transparent(tmp_path / "a.mov", *TRANSPARENT["png.mov"]))
    with pytest.raises(VideoError, match="transparent"):
        list(read_frames(info, [0.0], decoder="decord"))
