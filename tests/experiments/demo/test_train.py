from itertools import pairwise

import numpy as np
import pytest

from evoprune.video import SamplingPlan
from experiments.demo.batches import ATTRIBUTES, Recipe, unit_labels
from experiments.demo.clips import COLOURS, MOTIONS, SHAPES, SIZES, make_clip
from experiments.demo.training import rate


def expected_label(thing) -> list[int]:
    """Return shape (a digit is one more), color, size, motion and digit; -100 for attributes that the object does not have."""
    colour, motion = list(COLOURS).index(thing.colour), list(MOTIONS).index(thing.motion)
    if thing.is_digit:
        return [len(SHAPES), colour, -100, motion, int(thing.kind)]
    return [SHAPES.index(thing.kind), colour, list(SIZES).index(thing.size), motion, -100]


@pytest.mark.parametrize(("height", "width"), [(4, 6), (5, 7), (8, 4)])
def test_units_are_labelled_with_the_thing_whose_centre_they_cover(height, width):
    nothing = [len(SHAPES) + 1, -100, -100, -100, -100]
    found = 0
    for seed in range(30):
        clip = make_clip("train", seed, height * 28, width * 28, 4.0, 4)
        times = SamplingPlan.even(0.0, clip.seconds, 8).times_s
        labels = unit_labels(clip, times, height, width).reshape(4, height, width, len(ATTRIBUTES))
        for g in range(4):
            there = {}
            for thing in clip.things:
                if all(thing.start <= t < thing.end for t in times[2 * g : 2 * g + 2]):
                    x, y = thing.centre((times[2 * g] + times[2 * g + 1]) / 2)
                    there[int(y) // 28, int(x) // 28] = thing
            found += len(there)
            for y, x in np.ndindex(height, width):
                label = labels[g, y, x].tolist()
                assert label == (expected_label(there[y, x]) if (y, x) in there else nothing)
    assert found > 100


def test_the_learning_rate_warms_up_stays_and_falls():
    recipe = Recipe(warmup=10, decay=0.5)
    rates = [rate(step, 100, recipe) for step in range(100)]
    assert rates[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert set(rates[10:50]) == {1.0}
    assert all(a > b for a, b in pairwise(rates[50:]))
    assert rates[-1] == pytest.approx(0.02, abs=0.001)
