"""The generators are frozen: figures about their clips compare only with figures about the same clips.

Where this fails, something has changed what is drawn or asked; so everything in results/ would have to be measured anew.
"""

import hashlib
from dataclasses import astuple
from functools import cache

import numpy as np
import pytest

from experiments.demo import drawing, questions
from experiments.demo.scenes import asking
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.scenes.happening import CHECKED_OVER_TIME, GIST, HAPPENING, types_for
from experiments.demo.scenes.looking import CHECKED, LOOKING
from experiments.demo.worlds import WORLDS
from experiments.demo.write import BLOCK

MANY = 1000  # questions: all that can be asked
# Of each split from a seed on: a digest of contents and questions, and the mean of all pixels, of their left half and of their
# upper half, which may differ a little elsewhere.
FROZEN = {
    ("shapes", "train", 0): ("128b1d8c20e571d2", [52.557, 52.576, 52.458]),
    ("shapes", "validation", 0): ("6811c24c2195a386", [61.77, 61.925, 61.632]),
    ("shapes", "heldout", 0): ("cb2c694f6c3e3404", [51.733, 51.442, 51.52]),
    ("shapes", "heldout", 2 * BLOCK): ("0ba4c1f5bb89beae", [68.676, 68.749, 68.656]),
    ("shapes", "portrait", 0): ("60bb491f23b5b7c3", [56.113, 56.103, 56.182]),
    ("scenes", "train", 0): ("88d8dff8d2ac7808", [87.583, 87.281, 87.898]),
    ("scenes", "validation", 0): ("ca0c84e7fd2a183c", [84.976, 85.571, 84.044]),
    ("scenes", "heldout", 100_000): ("b5f83f54df42ea95", [89.28, 88.885, 89.629]),
}  # fmt: skip
TYPES = {
    "shapes": {*questions.TYPES},
    "scenes": {*LOOKING, *CHECKED, *GIST, *HAPPENING, *CHECKED_OVER_TIME},
}


def rounded(value):
    """Numbers to four places, so that the last bits of a sine do not count."""
    if isinstance(value, tuple | list):
        return tuple(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


@cache
def look(world: str, split: str, first: int):
    """The digest, the means, and the types of what is asked."""
    content, means, types = hashlib.sha256(), [], set()
    for seed in range(first, first + 24):
        clip, rng = WORLDS[world].make(split, seed), np.random.default_rng(seed)
        asked = WORLDS[world].ask(clip, seed)
        if world == "shapes":
            asked += questions.ask(clip, rng, MANY)
            frames = drawing.render(clip, [0.2, 0.7 * clip.seconds])
        else:
            asked += asking.ask(clip, rng, MANY, types_for(clip))
            frames = scenes_drawing.render(clip, [0.2, 0.7 * clip.seconds])
        content.update(repr((rounded(astuple(clip)), asked)).encode())
        _, height, width, _ = frames.shape
        means.append([part.mean() for part in (frames, frames[:, :, : width // 2], frames[:, : height // 2])])
        types |= {question.type for question in asked}
    return content.hexdigest()[:16], np.mean(means, 0).round(3).tolist(), types


@pytest.mark.parametrize(("world", "split", "first"), FROZEN, ids=str)
def test_the_generators_are_frozen(world, split, first):
    digest, means = FROZEN[world, split, first]
    found = look(world, split, first)
    assert (found[0], found[1]) == (digest, pytest.approx(means, abs=0.03))


@pytest.mark.parametrize("world", TYPES)
def test_all_types_of_questions_are_among_those(world):
    assert set.union(*(look(*key)[2] for key in FROZEN if key[0] == world)) == TYPES[world]
