"""Files that are damaged, strange, or lie about themselves: an answer or an error about them, within bounded memory."""

import struct
import zlib
from dataclasses import replace

import av
import numpy as np
import pytest

from evoprune.errors import VideoError
from evoprune.video.frames import probe, read_frames, scan
from evoprune.video.sandbox import isolation
from tests.video import mutations
from tests.video.files import (
    number_of,
    numbered_frame,
    numbered_frames,
    numbers,
    pixels,
    quarters,
    spoil,
    write_image,
    write_video,
)
from tests.video.kinds import KINDS, write_kind
from tests.video.mutations import SOURCES, run_all, table


def test_a_damaged_packet_leaves_the_frame_before_it_on_screen(folder):
    """At the beginning it is skipped. Damage is counted where it is met, and once; a scan counts it all."""
    whole = write_video(folder / "intra.mp4", numbered_frames(100), gop=1)
    info = probe(spoil(whole, folder / "spoilt.mp4", {0, 1, 4, 13, 14, 70}))
    chunks = list(read_frames(info, [0.05 + 0.1 * i for i in range(20)], chunk_bytes=10 * 64 * 48 * 3))
    assert [number_of(rgb) for rgb in pixels(chunks)] == [2, 3, 3, *range(5, 13), 12, 12, *range(15, 22)]
    assert [chunk.damaged for chunk in chunks] == [3, 2]
    assert [chunk.damaged for chunk in read_frames(info, [0.25, 9.05])] == [3]  # the jump passes over the others
    found = scan(info.path)
    assert (found.frames, found.damaged, found.variable_rate, found.duration_s) == (94, 6, False, pytest.approx(9.8))
    assert found.largest_gap_s == pytest.approx(0.3)
    with pytest.raises(VideoError, match=r"ruined.mp4 can be decoded"):
        list(read_frames(replace(info, path=str(spoil(whole, folder / "ruined.mp4", range(100)))), [0.5]))


SPREAD = ("mpeg2.mpg", "mpeg1.mpg", "wmv2.wmv")  # a packet does not lie in one piece, or not alone


HIDDEN = ("picture.gif", "raw.avi", "raw.y4m", "h264.h264", "mpeg2.mxf")  # they have no means of telling


# See the next test.
SMALL = ("no_length.mkv", "vp9_hidden.webm", "vp9_10.webm", "subtitles.mkv", "cover.mkv", "ffv1.mkv")


FORTY = [name for name, kind in KINDS.items() if kind.frames == 40 and not kind.hidden and name not in SPREAD]


def read_whole(path):
    """The facts, the number of every frame on screen, and how much damage was met."""
    info = probe(path)
    rate = info.fps or 25
    chunks = list(read_frames(info, [(i + 0.5) / rate for i in range(40)]))
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
    if info.container in ("mov,mp4,m4a,3gp,3g2,mj2", "mpegts", "avi"):  # they know where the next packet is
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
        assert name.endswith((".mp4", ".mov"))  # their index comes last
        return
    assert got[0] == 0 and all(number <= i for i, number in enumerate(got)) and got == sorted(got)
    # The whole file's facts, from before it was cut, lead to the same frames.
    assert number_of(next(read_frames(replace(probe(whole), path=str(cut)), [0.01])).frames[0]) == 0
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
    assert sum(chunk.damaged for chunk in read_frames(probe(whole), times)) == 0
    holed.write_bytes(content[:begin] + (bytes(end - begin) if way == "zeroed" else b"") + content[end:])
    chunks = list(read_frames(probe(holed), times))
    got = [number_of(rgb) for rgb in pixels(chunks)]
    assert got[:20] == list(range(20)) and got[-5:] == list(range(75, 80)) and got[45] < 45
    if way == "zeroed":  # what is left out may leave no trace
        assert sum(chunk.damaged for chunk in chunks)


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
    "avi header": ("mpeg4.avi", b"avih", 24, "<I", [10**9]),
    "avi stream": ("mpeg4.avi", b"strh", 40, "<I", [10**9]),
    **{f"mp4 every count {n}": ("h264.mp4", b"stsz", 8, ">II", [1, n], b"stts", 12, ">I", [n], b"stsc", 16, ">I", [n])
       for n in (10**7, 10**9)},  # all of them the same bytes
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
    header = b"\xb0\x82%b\xba\x82%b"  # of two bytes each
    old, new = (header % (struct.pack(">H", width), struct.pack(">H", height)) for height, width in ((256, 320), size))
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new))
    if name == "ffv1.mkv":  # whose frames do not tell their size
        refused(path, *(["megapixels"] if size == (12_000, 12_000) else []))
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
        refused(lying("picture.gif", b"GIF8", 6, "<HH", size), "megapixels")
        return
    path = write_image(tmp_path / "a.png", quarters())
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", *size) + content[24:29]
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])
    refused(
        tmp_path if kind == "folder" else path, "a.png is too large: evoprune reads at most 134 megapixels"
    )  # not damaged
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
