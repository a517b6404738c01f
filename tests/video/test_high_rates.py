"""Tests of videos with so many frames per second that a fixed tolerance would be longer than a frame."""

import numpy as np
import pytest
from PIL import Image

import evoprune
from evoprune.video import HeldVideo, SamplingPlan, cut_clip, probe
from tests.decoders import EVERY
from tests.video.files import number_of, numbered_frames, numbers, write_video

COUNT = 40


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    path = tmp_path_factory.mktemp("fast") / "2000.mp4"
    return probe(write_video(path, numbered_frames(COUNT), fps=2000, gop=1, options={"bf": "0"}))


@pytest.mark.parametrize("decoder", EVERY)
@pytest.mark.parametrize(
    ("name", "rate"), [("a.mp4", 960), ("b.mp4", 5000), ("c.mkv", 480), ("d.mkv", 1000), ("e.ts", 960)]
)
def test_each_frame_is_read_once(name, rate, decoder, tmp_path):
    if decoder == "decord" and name.endswith(".ts"):
        pytest.skip("decord does not read MPEG-TS")
    path = write_video(tmp_path / name, numbered_frames(COUNT), fps=rate, options={"bf": "0"})
    frames, times_s = evoprune.read_frames(path, frames=COUNT, decoder=decoder)
    assert [number_of(rgb) for rgb in frames] == list(range(COUNT))
    # The times of the frames themselves get the same frames.
    assert numbers(probe(path), times_s.tolist(), decoder=decoder) == list(range(COUNT))
    assert numbers(probe(path), [n / rate for n in range(COUNT)], decoder=decoder) == list(range(COUNT))


@pytest.mark.parametrize("rate", [1000, 1e6])
def test_each_image_of_a_folder_is_read_once(rate, tmp_path):
    for number in range(10):
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(tmp_path / f"{number}.png")
    frames, times_s = evoprune.read_frames(tmp_path, frames=10, frame_rate=rate)
    assert frames[:, 0, 0, 0].tolist() == list(range(10)) and times_s == pytest.approx(np.arange(10) / rate)
    assert evoprune.read_frames(tmp_path, times_s, frame_rate=rate)[0][:, 0, 0, 0].tolist() == list(range(10))


@pytest.mark.parametrize("rate", [30, 20_000, 1e9])
def test_each_frame_of_an_array_is_read_once(rate):
    array = np.arange(100, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    for video in (HeldVideo.of(array, rate, None), HeldVideo.of(array, None, [5 + n / rate for n in range(100)])):
        for times_s in (SamplingPlan.even(0.0, video.duration_s, 100).times_s, video.frames_s):
            assert video.on_screen(times_s)[0][:, 0, 0, 0].tolist() == list(range(100))


def test_frames_of_an_array_at_very_different_intervals():
    array = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    video = HeldVideo.of(array, None, [0.0, 0.00005, 1.0])
    assert video.variable_rate and video.on_screen([0.0, 0.00002, 0.00005])[0][:, 0, 0, 0].tolist() == [0, 0, 1]


@pytest.mark.parametrize("exact", [False, True])
def test_a_clip_has_each_frame_once(fast, exact, tmp_path):
    clip = cut_clip(fast, 10 / 2000, 20 / 2000, str(tmp_path), exact=exact)
    info = probe(clip.path)
    assert clip.start_s == pytest.approx(10 / 2000) and info.duration_s == pytest.approx(10 / 2000)
    assert numbers(info, [(n + 0.5) / 2000 for n in range(10)]) == list(range(10, 20))


def test_the_keyframe_of_each_part_is_read(fast):
    times_s = SamplingPlan.even(0.0, fast.duration_s, COUNT).times_s
    assert numbers(fast, times_s, seek="keyframes", part_s=1 / 2000) == list(range(COUNT))
