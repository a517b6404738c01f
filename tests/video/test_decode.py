import pickle
import struct
from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError, VideoError
from evoprune.video import decode
from evoprune.video.decode import read_frames
from evoprune.video.probe import probe
from tests.video.files import number_of, numbered_frame, numbered_frames, write_video

FILES = {
    "h264.mp4": {},
    "h264.mov": {},
    "h264.mkv": {},
    "h264.ts": {},
    "h264.avi": {},
    "h264.flv": {},
    "h264.h264": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mkv": {"codec": "libsvtav1"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "picture.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "mjpeg.avi": {"codec": "mjpeg", "pix_fmt": "yuvj420p"},
    "ten_bit.mp4": {"pix_fmt": "yuv420p10le"},
    "late.mp4": {"start": 5.0},
    "late.mkv": {"start": 5.0},
    "late.ts": {"start": 5.0},
    "vary.mp4": {"pts": [0.01 * i * i for i in range(40)]},
    "vary.mkv": {"pts": [0.01 * i * i for i in range(40)]},
    "vary.webm": {"pts": [0.01 * i * i for i in range(40)], "codec": "libvpx-vp9"},
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("videos")


@pytest.fixture(scope="session", params=FILES)
def info(request, folder):
    return probe(write_video(folder / request.param, numbered_frames(40), **FILES[request.param]))


@pytest.fixture(scope="session")
def long_file(folder):
    """25.6 seconds, a keyframe every second."""
    return write_video(folder / "long.mp4", numbered_frames(256))


def everything(path):
    """Decode the whole file: a list of (seconds from the first frame, RGB), in the order of display."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or stream.guessed_rate
        frames = [(frame.pts, frame.to_ndarray(format="rgb24")) for frame in container.decode(stream)]
        if frames[0][0] is None or path.endswith("avi"):  # files that do not say when frames are shown
            return [(float(i / rate), rgb) for i, (_, rgb) in enumerate(frames)]
        return [(float((pts - frames[0][0]) * stream.time_base), rgb) for pts, rgb in frames]


def expected(frames, moment):
    """What a player shows at that moment."""
    return max((f for f in frames if f[0] <= moment + decode.TOLERANCE_S), key=lambda f: f[0], default=frames[0])


def pixels(chunks):
    return np.concatenate([chunk.frames for chunk in chunks])


def numbers(info, times, **how):
    return [number_of(rgb) for chunk in read_frames(info, times, **how) for rgb in chunk.frames]


def test_the_frame_on_screen_is_read(info):
    frames = everything(info.path)
    moments = sorted([-1.0, 0.0, *np.linspace(0, info.duration_s, 23), *(t for t, _ in frames[::3]), 99.0])
    chunks = list(read_frames(info, moments))
    shown = [expected(frames, moment) for moment in moments]
    assert [t for chunk in chunks for t in chunk.times_s] == pytest.approx([t for t, _ in shown])
    np.testing.assert_array_equal(pixels(chunks), np.stack([rgb for _, rgb in shown]))


def test_frames_come_in_the_order_they_were_written(info):
    moments = [t + 0.001 for t, _ in everything(info.path)]
    assert numbers(info, moments) == list(range(40))


@given(st.lists(st.floats(-1, 30), min_size=1, max_size=6).map(sorted), st.sampled_from([0.0, 0.5, 4.0, 1e9]))
@settings(max_examples=60, deadline=None)
def test_any_moments_with_or_without_jumps(long_file, moments, jump_from):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "SEEK_AHEAD_S", jump_from)
        got = numbers(probe(long_file), moments)
    assert got == [max(0, sum(i / 10 <= t + decode.TOLERANCE_S for i in range(256)) - 1) for t in moments]


LONG_FILES = {
    "long.mp4": {},
    "long.mov": {"start": 3.0},
    "long.mkv": {"start": 3.0},
    "long.ts": {"start": 3.0},
    "long.webm": {"codec": "libvpx-vp9"},
    "long_hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "open_gop.mp4": {"options": {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}},
    "open_gop.ts": {"options": {"x264-params": "open-gop=1:bframes=3:b-pyramid=normal"}},
    "refresh.mp4": {"options": {"x264-params": "intra-refresh=1"}},
    "one_keyframe.mp4": {"gop": 1000},
    "one_keyframe.ts": {"gop": 1000},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "no_index.mkv": {"container_options": {"live": "1"}},
    "long.avi": {},
    "long.flv": {},
}


@pytest.mark.parametrize("name", LONG_FILES)
def test_jumps_change_nothing(name, folder, monkeypatch):
    info = probe(write_video(folder / f"jump_{name}", numbered_frames(256), **LONG_FILES[name]))
    for step in (0.7, 3.3, 6.1):
        moments = np.arange(0.05, info.duration_s + step, step)
        monkeypatch.setattr(decode, "SEEK_AHEAD_S", 1e9)
        straight = list(read_frames(info, moments))
        monkeypatch.setattr(decode, "SEEK_AHEAD_S", 0.3)
        jumping = list(read_frames(info, moments))
        np.testing.assert_array_equal(pixels(straight), pixels(jumping))
        assert [c.times_s for c in straight] == [c.times_s for c in jumping]
        assert [number_of(rgb) for rgb in pixels(straight)] == [min(int(t * 10 + 0.01), 255) for t in moments]


@pytest.fixture
def decoded(monkeypatch):
    """Counts how many frames are decoded."""
    count, original = [0], decode._decode

    def counting(*args):
        for frame in original(*args):
            count[0] += 1
            yield frame

    monkeypatch.setattr(decode, "_decode", counting)
    return count


@pytest.mark.parametrize(
    "name", ["plain.mp4", "plain.mkv", "plain.ts", "vp9.webm", "av1.mkv", "hevc.mp4", "late.mkv", "late.ts"]
)
def test_what_lies_between_far_moments_is_not_decoded(name, folder, decoded):
    info = probe(write_video(folder / f"far_{name}", numbered_frames(256), **FILES.get(name, {})))
    assert numbers(info, [0.05, 12.35, 25.05]) == [0, 123, 250]
    assert decoded[0] < 100


def test_jumps_that_lead_back_are_not_repeated(folder, decoded):
    info = probe(write_video(folder / "one_group.mp4", numbered_frames(256), gop=1000))
    assert numbers(info, [0.0, 5.0, 10.0, 15.0, 20.0, 25.0]) == [0, 50, 100, 150, 200, 250]
    assert decoded[0] < 256 + 60


def test_a_single_frame_is_on_screen_throughout(folder):
    info = probe(write_video(folder / "one.mp4", numbered_frames(9)[7:8]))
    assert numbers(info, [-5.0, 0.0, 0.05, 1e300]) == [7, 7, 7, 7]


def test_no_moments_no_chunks(long_file):
    assert list(read_frames(probe(long_file), [])) == []


@pytest.mark.parametrize("size", [(47, 63), (33, 16), (48, 66)])
def test_odd_sizes(size, folder):
    path = write_video(folder / f"{size}.mp4", numbered_frames(6, *size), pix_fmt="yuv444p")
    chunk = next(read_frames(probe(path), [0.05, 0.35]))
    assert chunk.frames.shape == (2, *size, 3)
    assert [number_of(rgb) for rgb in chunk.frames] == [0, 3]


def quarters():
    """Four different colours: red and green above, blue and white below."""
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:24, :32, 0] = rgb[:24, 32:, 1] = rgb[24:, :32, 2] = 255
    rgb[24:, 32:] = 255
    return rgb


def first_picture(path):
    return next(read_frames(probe(path), [0.0])).frames[0]


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


@pytest.mark.parametrize("frames_fitting", [0, 1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("even", [True, False])
@pytest.mark.parametrize("total", [2, 7, 10])
def test_chunks_are_bounded_and_whole_pairs(frames_fitting, even, total, long_file):
    info = probe(long_file)
    moments = [0.05 + 0.1 * i for i in range(total)]
    chunks = list(read_frames(info, moments, chunk_bytes=frames_fitting * 64 * 48 * 3 + 100, even=even))
    sizes = [len(chunk.frames) for chunk in chunks]
    assert [chunk.first for chunk in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(sizes) <= max(2, frames_fitting)
    assert not even or all(size % 2 == 0 for size in sizes[:-1])
    assert [number_of(rgb) for rgb in pixels(chunks)] == list(range(total))
    for chunk in chunks:
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.flags.c_contiguous
        assert len(chunk.times_s) == len(chunk.frames)


def test_chunks_are_read_one_by_one(long_file, decoded):
    chunks = read_frames(probe(long_file), [0.05 + 0.1 * i for i in range(200)], chunk_bytes=1)
    next(chunks)
    assert decoded[0] <= 3


def test_the_file_is_closed_on_early_exit(long_file, monkeypatch):
    opened, original = [], decode.open_video
    monkeypatch.setattr(decode, "open_video", lambda path: opened.append(original(path)) or opened[-1])
    chunks = read_frames(probe(long_file), [0.05, 0.15, 0.25, 9.95], chunk_bytes=1)
    next(chunks)
    assert opened[0].input_was_opened
    chunks.close()
    assert not opened[0].input_was_opened


def test_infos_and_chunks_can_be_sent_to_another_process(long_file):
    info = pickle.loads(pickle.dumps(probe(long_file)))
    chunk = pickle.loads(pickle.dumps(next(read_frames(info, (1.05, 2.05)))))
    assert [number_of(rgb) for rgb in chunk.frames] == [10, 20]


def test_a_change_of_size_is_scaled_away(folder):
    small = write_video(folder / "small.ts", numbered_frames(10), start=3.0)
    large = write_video(folder / "large.ts", numbered_frames(20, 96, 128)[10:], start=4.0)
    both = folder / "both.ts"
    both.write_bytes(small.read_bytes() + large.read_bytes())
    info = probe(both)
    assert (info.width, info.height) == (64, 48)
    assert numbers(info, [0.05 + 0.1 * i for i in range(20)]) == list(range(20))


def spoil(path, out, packets):
    """A copy of the file with the contents of some packets overwritten."""
    content = bytearray(path.read_bytes())
    with av.open(str(path)) as container:
        for i, packet in enumerate(container.demux(video=0)):
            if packet.size and i in packets:
                content[packet.pos : packet.pos + packet.size] = b"\xff" * packet.size
    out.write_bytes(content)
    return out


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


def test_a_file_that_vanished_is_an_error(folder):
    path = write_video(folder / "gone.mp4", numbered_frames(2))
    info = probe(path)
    path.unlink()
    with pytest.raises(VideoError, match=r"no such file: .*gone.mp4"):
        list(read_frames(info, [0.0]))


def test_requests_that_make_no_sense(long_file):
    info = probe(long_file)
    with pytest.raises(UsageError, match="unknown decoder 'vhs'"):
        read_frames(info, [0.0], decoder="vhs")
    for moments in ([1.0, 0.5], [float("nan")], [0.0, float("inf")]):
        with pytest.raises(UsageError, match="ascend"):
            read_frames(info, moments)


def test_full_range_is_honoured(folder):
    grey = [np.full((48, 64, 3), 10, np.uint8)] * 2
    path = write_video(folder / "full.mp4", grey, codec="mjpeg", pix_fmt="yuvj420p")
    assert abs(int(first_picture(path).mean()) - 10) <= 2


def test_numbers_survive_encoding():
    assert [number_of(numbered_frame(i)) for i in range(256)] == list(range(256))
