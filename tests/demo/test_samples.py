"""The sample clip of scenes is what its seed draws."""

import numpy as np

from evoprune.demo.scenes.drawing import render
from evoprune.video.frames import read_frames
from evoprune.video.probe import probe
from experiments.demo.samples import SCENE_CLIPS, scene


def test_the_scene_of_the_samples_comes_from_its_seed():
    (name,) = SCENE_CLIPS
    clip, times = scene(name), [0.0, 5.0]
    found = np.concatenate([chunk.frames for chunk in read_frames(probe(f"samples/scenes/{name}"), times)])
    assert np.abs(found.astype(int) - render(clip, times)).mean() < 6  # grain that the codec has smoothed
