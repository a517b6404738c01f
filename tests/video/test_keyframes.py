"""Tests of reading nearby keyframes, and of decoding exact frames in parallel."""

from bisect import bisect_right
from contextlib import closing

import numpy as np
import pytest

from evoprune.errors import UsageError
from evoprune.video.frames import probe, read_chunks
from evoprune.video.info import TOLERANCE_S
from evoprune.video.plan import SamplingPlan
from evoprune.video.readers import pyav
from evoprune.video.readers.deinterlacing import deinterlaced
from evoprune.video.readers.track import Track
from tests.video.files import number_of, numbered_frames, pixels, write_video

SPARSE, GOP = 12, 25  # number of parts of the video, and number of frames from one keyframe to the next
FILES = {
    "plain.mp4": {"gop": GOP},
    "plain.mkv": {"gop": GOP},
    "plain.ts": {"gop": GOP, "start": 2.0},
    "plain.webm": {"codec": "libvpx-vp9", "gop": GOP},
    "hevc.mp4": {"codec": "libx265", "options": {"x265-params": f"log-level=none:keyint={GOP}:min-keyint={GOP}"}},
    "open.mp4": {"options": {"x264-params": f"open-gop=1:bframes=3:b-pyramid=normal:keyint={GOP}:scenecut=0"}},
    "fragments.mp4": {"gop": GOP, "container_options": {"movflags": "frag_keyframe+empty_moov"}},
    "live.mkv": {"gop": GOP, "container_options": {"live": "1"}},
    "av1.mkv": {"codec": "libsvtav1", "gop": GOP},
    "mpeg4.mp4": {"codec": "mpeg4", "gop": GOP},
    "interlaced.ts": {"gop": GOP, "options": {"x264-params": "interlaced=1"}},
    "refresh.mp4": {"options": {"x264-params": f"intra-refresh=1:scenecut=0:keyint={GOP}"}},
    "one.mp4": {"gop": 1000},
    "plain.avi": {"gop": GOP},
    "late.mov": {"gop": GOP, "start": 3.0},
}


@pytest.fixture(params=FILES)
def info(request, folder):
    path = folder / f"near_{request.param}"
    return probe(path if path.exists() else write_video(path, numbered_frames(256), **FILES[request.param]))


def times_and_keyframes(info):
    """Return the times of all frames in order, and the times of the keyframes."""
    with_keys = [(time, key) for time, _, key in pyav.intervals(info, lambda mark: None)]
    return [time for time, _ in with_keys], [time for time, key in with_keys if key]


def read(info, times, **how):
    chunks = list(read_chunks(info, times, **how))
    return [time for chunk in chunks for time in chunk.times_s], pixels(chunks), any(chunk.moved for chunk in chunks)


def alone(info, time):
    """Return the keyframe displayed at `time`, deinterlaced without its neighbors."""
    with closing(Track(info)) as track:
        _, frame = track.alone(track.keyframes(time, time)[-1])
        return pyav.Picture(info).of(time, deinterlaced(frame), True).rgb


@pytest.mark.few(4)
def test_the_frames_are_those_of_the_times_that_are_reported(info):
    part_s = info.duration_s / SPARSE
    asked = SamplingPlan.even(0.0, info.duration_s, SPARSE).times_s
    times, near, moved = read(info, asked, seek="keyframes", part_s=part_s)
    exact_times, _, never = read(info, asked)
    assert not never and moved == (times != exact_times)
    all_times, keys = times_and_keyframes(info)
    for wanted, time, exactly in zip(asked, times, exact_times, strict=True):
        inside = [key for key in keys if -TOLERANCE_S <= key - (wanted - part_s / 2) < part_s - TOLERANCE_S]
        if time == exactly:
            continue
        assert min(inside, key=lambda key: abs(key - wanted)) == pytest.approx(time, abs=1e-6)
    assert times == sorted(times)
    # Requesting a frame's own time returns that frame, because rounding is allowed for, as in a player.
    again, same, _ = read(info, times)
    assert again == pytest.approx(times)
    if info.interlaced:  # a keyframe that is decoded alone is deinterlaced from its own rows
        same = np.stack([alone(info, time) if time in keys else rgb for time, rgb in zip(times, same, strict=True)])
    np.testing.assert_array_equal(near, same)
    numbers = [bisect_right(all_times, time + 1e-6) - 1 for time in times]
    assert [number_of(rgb) for rgb in near] == numbers


@pytest.mark.parametrize(
    "name", ["plain.mp4", "plain.mkv", "plain.ts", "open.mp4", "hevc.mp4", "plain.webm", "late.mov"]
)
def test_a_part_with_a_keyframe_takes_it(name, folder):
    path = folder / f"near_{name}"
    info = probe(path if path.exists() else write_video(path, numbered_frames(256), **FILES[name]))
    _, keys = times_and_keyframes(info)
    times, _, moved = read(
        info, SamplingPlan.even(0.0, info.duration_s, 4).times_s, seek="keyframes", part_s=info.duration_s / 4
    )
    assert moved and all(any(abs(time - key) < 1e-6 for key in keys) for time in times)


def test_refreshed_pictures_are_no_keyframes(folder):
    path = folder / "near_refresh.mp4"
    info = probe(path if path.exists() else write_video(path, numbered_frames(256), **FILES["refresh.mp4"]))
    asked = SamplingPlan.even(0.0, info.duration_s, SPARSE).times_s
    times, near, _ = read(info, asked, seek="keyframes", part_s=info.duration_s / SPARSE)
    exact_times, exact, _ = read(info, asked)
    assert times[1:] == exact_times[1:]
    np.testing.assert_array_equal(near[1:], exact[1:])


def test_what_auto_does_depends_on_the_file_and_the_times_alone(folder, monkeypatch):
    info = probe(write_video(folder / "auto.mp4", numbered_frames(256), gop=GOP))
    asked = SamplingPlan.even(0.0, info.duration_s, SPARSE).times_s
    part_s = info.duration_s / SPARSE
    exact, _, never = read(info, asked)
    assert read(info, asked, seek="auto", part_s=part_s)[0] == exact and not never  # moving the times would save little
    monkeypatch.setattr(pyav, "SAVED_PIXELS", 100)
    with closing(Track(info)) as track:
        assert any(run.near for run in pyav.planned(track, asked, "auto", part_s))
        # The parts are shorter than a second.
        assert not any(run.near for run in pyav.planned(track, asked, "auto", 0.9))
        assert not any(run.near for run in pyav.planned(track, asked, "exact", part_s))


@pytest.mark.few(4)
@pytest.mark.parametrize("step", [0.1, 0.7, 3.1])
def test_frames_are_the_same_for_any_number_of_cores(info, step):
    asked = np.arange(0.05, info.duration_s + step, step)
    with_one, one, _ = read(info, asked, cores=1)
    for cores in (2, 5):
        times, several, _ = read(info, asked, cores=cores)
        assert times == with_one
        np.testing.assert_array_equal(one, several)
    assert [number_of(rgb) for rgb in one] == [min(int(time * 10 + 0.01), 255) for time in asked]


@pytest.mark.parametrize("name", ["plain.mp4", "hevc.mp4"])
def test_frames_on_which_no_other_depends_are_left_out(name, folder, decoded, monkeypatch):
    path = folder / f"near_{name}"
    info = probe(path if path.exists() else write_video(path, numbered_frames(256), **FILES[name]))
    asked = SamplingPlan.even(0.0, info.duration_s, 5).times_s
    _, sparing, _ = read(info, asked)
    fewer = decoded[0]
    decoded[0] = 0
    monkeypatch.setattr(Track, "can_spare", lambda track: False)
    _, all_of_them, _ = read(info, asked)
    assert fewer < decoded[0]
    np.testing.assert_array_equal(sparing, all_of_them)


def test_no_such_way_to_seek(folder):
    info = probe(write_video(folder / "way.mp4", numbered_frames(4)))
    with pytest.raises(UsageError, match="unknown seek 'fast'"):
        read_chunks(info, [0.0], seek="fast")
