"""Clips for training: crowded grids, and frames after a lossy codec."""

import pytest

from evoprune.video import SamplingPlan
from experiments.demo.clips import make_clip
from experiments.demo.drawing import render
from experiments.demo.training_clips import through_codec


@pytest.mark.parametrize("quality", [2, 5])
def test_a_codec_leaves_nearly_the_same_frames(quality):
    frames = render(make_clip("train", 4, 112, 168, 3.0, 3), SamplingPlan.even(0.0, 3.0, 6).times_s)
    coded = through_codec(frames, quality)
    assert coded.shape == frames.shape and coded.dtype == frames.dtype
    assert 0.3 < abs(coded.astype(int) - frames).mean() < 8
