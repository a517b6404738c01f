"""Files that are strange, or lie about themselves."""

import struct
import zlib

import av
import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames, scan
from evoprune.video.sandbox import isolation
from tests.video.files import add_beside, numbered_frames, numbers, quarters, write_image, write_video
from tests.video.kinds import KINDS, write_kind

TIMES = np.linspace(0.05, 3.95, 16)


@pytest.fixture
def lying(folder, tmp_path):
    """`lying("h264.mp4", b"stsz", 8, ">I", 10**9)`: a file of that kind in which something else is written so far behind a mark.

    More changes may follow.
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
    """Bytes that the process that reads videos has had at most, since this test began."""
    isolation.end_all()

    def call():
        with open(f"/proc/{isolation._idle[0].pid}/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))

    yield call
    isolation.end_all()


def refused(path, *words):
    with pytest.raises(VideoError) as caught:
        list(read_frames(probe(path), TIMES))
    assert caught.value.exit_code == 3 and str(path) in caught.value.message
    for word in words:
        assert word in caught.value.message + caught.value.hint


HUGE = {
    "mp4 sizes": ("h264.mp4", b"stsz", 12, ">I", [10**9]),
    "mp4 equal sizes": ("h264.mp4", b"stsz", 8, ">II", [1, 10**9]),
    "mp4 durations": ("h264.mp4", b"stts", 12, ">I", [10**9]),
    "mp4 every count": (
        "h264.mp4", b"stsz", 8, ">II", [1, 10**9], b"stts", 12, ">I", [10**9], b"stsc", 16, ">I", [10**9],
    ),
    "avi header": ("mpeg4.avi", b"avih", 24, "<I", [10**9]),
    "avi stream": ("mpeg4.avi", b"strh", 40, "<I", [10**9]),
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
    assert peak() < 2**28


@pytest.mark.full
def test_an_index_that_goes_round_in_circles(lying):
    """Ten million frames, all of them the same bytes."""
    counts = (b"stts", 12, ">I", [10**7], b"stsc", 16, ">I", [10**7])
    refused(lying("h264.mp4", b"stsz", 8, ">II", [1, 10**7], *counts))


HUGE_SIZES = [(100_000, 100_000), (2**31 - 1, 2**31 - 1), (12_000, 12_000), (65_535, 2)]


@pytest.mark.few(1)
@pytest.mark.parametrize("size", HUGE_SIZES)
@pytest.mark.parametrize("name", ["vp9.webm", "ffv1.mkv", "h264.mkv"])
def test_huge_pictures_in_matroska(name, size, folder, tmp_path, peak):
    path = tmp_path / name
    path.write_bytes(with_size(write_kind(folder, name).read_bytes(), KINDS[name].size, size))
    if name == "ffv1.mkv":  # whose frames do not tell their size
        refused(path, *(["megapixels"] if size == (12_000, 12_000) else []))
    else:
        assert numbers(probe(path), [0.05, 3.95]) == [0, 39]
    assert peak() < 2**28


def with_size(content, old, new):
    """Matroska with another size of its pictures in the header."""
    old = b"\xb0\x81%c\xba\x81%c" % (old[1], old[0])
    new = b"\xb0\x84" + struct.pack(">I", new[1]) + b"\xba\x84" + struct.pack(">I", new[0])
    at = content.index(old, content.index(b"\x16\x54\xae\x6b"))
    made = bytearray(content[:at] + new + content[at + len(old) :])
    begin = made.rindex(b"\x16\x54\xae\x6b", 0, at)
    for mark in (b"\x16\x54\xae\x6b", b"\xae", b"\xe0"):  # Tracks, TrackEntry, Video: each is longer now
        while not made.startswith(mark, begin):
            _, size, inside = element(made, begin)
            begin = inside + size
        begin, size, inside = element(made, begin)
        made[begin:inside] = (size + len(new) - len(old) | 1 << 7 * (inside - begin)).to_bytes(inside - begin, "big")
        begin = inside
    return bytes(made)


def element(content, at):
    """Of a Matroska element: where the number of its size begins, the size, where its content begins."""
    begin = at + 9 - content[at].bit_length()
    length = 9 - content[begin].bit_length()
    return begin, int.from_bytes(content[begin : begin + length], "big") & ((1 << 7 * length) - 1), begin + length


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [(65_535, 65_535), (16_000, 16_000)])
def test_huge_gifs(size, lying, peak):
    refused(lying("picture.gif", b"GIF8", 6, "<HH", size), "megapixels")
    assert peak() < 2**28


@pytest.mark.few(1)
@pytest.mark.parametrize("size", [(100_000, 100_000), (2**31 - 1, 1), (16_000, 16_000), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("in_folder", [False, True])
def test_huge_images(size, in_folder, tmp_path, peak):
    path = write_image(tmp_path / "a.png", quarters())
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    refused(tmp_path if in_folder else path)
    assert peak() < 2**28


@pytest.mark.full
def test_large_pictures_are_read(tmp_path):
    picture = np.zeros((1000, 9000, 3), np.uint8)
    picture[:500, :, 0] = 255
    write_image(tmp_path / "a.png", picture)
    info = probe(tmp_path)
    assert (info.width, info.height) == (9000, 1000)
    assert np.array_equal(next(read_frames(info, [0.0, 0.1])).frames[1], picture)


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
    refused(path, "no frame")
    for ending in ("mkv", "avi", "flv", "mp4"):
        with av.open(str(tmp_path / f"none.{ending}"), "w") as out:
            stream = out.add_stream("libx264", rate=10)
            stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
            out.start_encoding()
        refused(tmp_path / f"none.{ending}")


def test_no_times_in_a_transport_stream(folder, tmp_path):
    """PES headers, changed to state that they hold no times."""
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


def test_a_cover_comes_first_and_nothing_else_moves(folder, tmp_path):
    path = add_beside(write_kind(folder, "h264.mp4"), tmp_path / "a.mp4", "cover")
    assert probe(path).codec == "h264" and scan(path).frames == 40


def test_frames_that_change_their_size(tmp_path):
    """Two raw streams, one after the other."""
    pieces = [
        write_video(tmp_path / f"{size}.h264", numbered_frames(20, *size), options={"x264-params": "annexb=1"})
        for size in ((48, 64), (96, 128), (24, 32))
    ]
    path = tmp_path / "changing.h264"
    path.write_bytes(b"".join(piece.read_bytes() for piece in pieces))
    info = probe(path)
    assert (info.width, info.height) == (64, 48)
    assert numbers(info, [i / 25 + 0.01 for i in range(60)]) == [*range(20)] * 3


@pytest.mark.parametrize("name", ["large.png", ""], ids=["a picture", "a folder"])
def test_a_picture_that_is_too_large_is_not_called_damaged(tmp_path, name):
    size = struct.pack(">IIBBBBB", 16384, 16384, 8, 0, 0, 0, 0)
    pieces = [(b"IHDR", size), (b"IDAT", zlib.compress(bytes(99))), (b"IEND", b"")]
    body = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in pieces)
    (tmp_path / "large.png").write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    with pytest.raises(VideoError, match=r"large.png is too large: evoprune reads at most 134 megapixels"):
        probe(tmp_path / name)
