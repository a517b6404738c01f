import pickle
from contextlib import contextmanager

import av
import numpy as np
import pytest
from av.video.reformatter import VideoReformatter
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError, VideoError
from evoprune.video.frames import probe, read_frames
from evoprune.video.readers import ffmpeg, pyav
from evoprune.video.readers.ffmpeg import TOLERANCE_S
from evoprune.video.sandbox import isolation
from tests.video.files import number_of, numbered_frame, numbered_frames, numbers, pixels, write_video
from tests.video.kinds import KINDS, write_kind

WHOLE = [name for name, kind in KINDS.items() if kind.frames == 40 and not kind.hidden]


# Every codec, and what is odd about times and sizes; the other containers with -m full.
FEW = (
    "h264.mp4", "hevc.ts", "vp9.webm", "av1.mkv", "h264_10.mp4", "mpeg4.avi", "late.ts", "vary.mkv", "open_gop.mp4", "odd.mp4",
    "turned.mp4", "mirrored.mkv", "interlaced.mp4", "picture.gif",
)  # fmt: skip


@pytest.fixture(
    scope="session", params=[name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in WHOLE]
)
def info(request, folder):
    return probe(write_kind(folder, request.param))


@pytest.fixture(scope="session")
def long_file(folder):
    """25.6 seconds, a keyframe every second."""
    return write_video(folder / "long.mp4", numbered_frames(256))


def everything(info):
    """Decode the whole file: a list of (seconds from the first frame, RGB), in the order of display."""
    with av.open(info.path) as container:
        stream = container.streams.best("video")
        rate = stream.average_rate or stream.guessed_rate
        converter, decoded = VideoReformatter(), container.decode(stream)
        rgb = ((frame.pts, converter.reformat(frame, format="rgb24").to_ndarray()) for frame in decoded)
        frames = [(pts, turned(picture, info)) for pts, picture in rgb]
        if frames[0][0] is None or info.path.endswith("avi"):  # files that state no times
            return [(float(i / rate), rgb) for i, (_, rgb) in enumerate(frames)]
        return [(float((pts - frames[0][0]) * stream.time_base), rgb) for pts, rgb in frames]


def turned(rgb, info):
    return np.rot90(np.fliplr(rgb) if info.mirrored else rgb, -info.rotation_deg // 90)


def expected(frames, wanted):
    """What a player displays at that time."""
    return max((f for f in frames if f[0] <= wanted + TOLERANCE_S), key=lambda f: f[0], default=frames[0])


def test_the_frame_on_screen_is_read(info):
    frames = everything(info)
    times = sorted([-1.0, 0.0, *np.linspace(0, info.duration_s, 23), *(t for t, _ in frames[::3]), 99.0])
    chunks = list(read_frames(info, times))
    displayed = [expected(frames, wanted) for wanted in times]
    assert [t for chunk in chunks for t in chunk.times_s] == pytest.approx([t for t, _ in displayed])
    np.testing.assert_array_equal(pixels(chunks), np.stack([rgb for _, rgb in displayed]))


def test_frames_come_in_the_order_they_were_written(info):
    times = [t + 0.001 for t, _ in everything(info)]
    assert numbers(info, times) == list(range(40))


@pytest.mark.full
@given(st.lists(st.floats(-1, 30), min_size=1, max_size=6).map(sorted), st.sampled_from([0.0, 0.5, 4.0, 1e9]))
@settings(max_examples=60, deadline=None)
def test_any_times_with_or_without_jumps(long_file, times, jump_from):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation, "POSSIBLE", False)
        patch.setattr(pyav, "MIN_JUMP_S", jump_from)
        got = numbers(probe(long_file), times)
    assert got == [max(0, sum(i / 10 <= t + TOLERANCE_S for i in range(256)) - 1) for t in times]


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


@pytest.mark.few(2)
@pytest.mark.parametrize("name", LONG_FILES)
def test_jumps_change_nothing(name, folder, in_process, monkeypatch):
    info = probe(write_video(folder / f"jump_{name}", numbered_frames(256), **LONG_FILES[name]))
    for step in (0.7, 3.3, 6.1):
        times = np.arange(0.05, info.duration_s + step, step)
        monkeypatch.setattr(pyav, "MIN_JUMP_S", 1e9)
        straight = list(read_frames(info, times))
        monkeypatch.setattr(pyav, "MIN_JUMP_S", 0.3)
        jumping = list(read_frames(info, times))
        np.testing.assert_array_equal(pixels(straight), pixels(jumping))
        assert [c.times_s for c in straight] == [c.times_s for c in jumping]
        assert [number_of(rgb) for rgb in pixels(straight)] == [min(int(t * 10 + 0.01), 255) for t in times]


@pytest.fixture
def decoded(in_process, monkeypatch):
    """Counts how many frames are decoded."""
    count, original = [0], pyav.decode

    def counting(*args):
        for frame in original(*args):
            count[0] += 1
            yield frame

    monkeypatch.setattr(pyav, "decode", counting)
    return count


FAR = {
    "plain.mp4": {},
    "plain.mkv": {},
    "plain.ts": {},
    "vp9.webm": {"codec": "libvpx-vp9"},
    "av1.mkv": {"codec": "libsvtav1"},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": "log-level=none"}},
    "late.mkv": {"start": 5.0},
    "late.ts": {"start": 5.0},
}


@pytest.mark.few(3)
@pytest.mark.parametrize("name", FAR)
def test_what_lies_between_far_moments_is_not_decoded(name, folder, decoded):
    info = probe(write_video(folder / f"far_{name}", numbered_frames(256), **FAR[name]))
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


@pytest.mark.few(8)
@pytest.mark.parametrize("frames_fitting", [0, 1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("total", [2, 7, 10])
def test_chunks_are_bounded_and_whole_pairs(frames_fitting, total, long_file):
    info = probe(long_file)
    times = [0.05 + 0.1 * i for i in range(total)]
    chunks = list(read_frames(info, times, chunk_bytes=frames_fitting * 64 * 48 * 3 + 100))
    sizes = [len(chunk.frames) for chunk in chunks]
    assert [chunk.first for chunk in chunks] == [sum(sizes[:i]) for i in range(len(sizes))]
    assert max(sizes) <= max(2, frames_fitting)
    assert all(size % 2 == 0 for size in sizes[:-1])
    assert [number_of(rgb) for rgb in pixels(chunks)] == list(range(total))
    for chunk in chunks:
        assert chunk.frames.dtype == np.uint8
        assert chunk.frames.flags.c_contiguous
        assert len(chunk.times_s) == len(chunk.frames)


def test_chunks_are_read_one_by_one(long_file, decoded):
    chunks = read_frames(probe(long_file), [0.05 + 0.1 * i for i in range(200)], chunk_bytes=1)
    next(chunks)
    assert decoded[0] <= 3


def test_the_file_is_closed_on_early_exit(long_file, in_process, monkeypatch):
    info, opened, original = probe(long_file), [], ffmpeg.open_video

    @contextmanager
    def noticing(path):
        with original(path) as container:
            opened.append(container)
            yield container

    monkeypatch.setattr(ffmpeg, "open_video", noticing)
    chunks = read_frames(info, [0.05, 0.15, 0.25, 9.95], chunk_bytes=1)
    next(chunks)
    assert opened[0].input_was_opened
    chunks.close()
    assert not opened[0].input_was_opened


def test_infos_and_chunks_can_be_sent_to_another_process(long_file):
    info = pickle.loads(pickle.dumps(probe(long_file)))
    chunk = pickle.loads(pickle.dumps(next(read_frames(info, (1.05, 2.05)))))
    assert [number_of(rgb) for rgb in chunk.frames] == [10, 20]


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
    for times in ([1.0, 0.5], [float("nan")], [0.0, float("inf")]):
        with pytest.raises(UsageError, match="ascend"):
            read_frames(info, times)


def test_numbers_survive_encoding():
    assert [number_of(numbered_frame(i)) for i in range(256)] == list(range(256))
