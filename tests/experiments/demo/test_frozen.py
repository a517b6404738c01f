"""Test that the clip generators have not changed, because results are only comparable if they come from the same clips.

If one of these tests fails, the clips, the questions or the answers have changed, and everything in results/ would have to be
measured again.
"""

import hashlib
from dataclasses import astuple

import numpy as np
import pytest

from evoprune.video import SamplingPlan
from experiments.demo import clips, drawing, lessons, questions
from experiments.demo.scenes import compose
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.scenes.asking import ask as ask_scenes
from experiments.demo.scenes.happening import types_for
from experiments.demo.scenes_lessons import lessons as scenes_lessons
from experiments.demo.worlds import QUESTIONS
from experiments.demo.write import BLOCK

# Eight clips: a digest of content and questions, and the mean pixel value, which may differ slightly on other machines.
FROZEN = {
    ("shapes", "train", 0): ("f4cf8aab466a77a5", 50.956),
    ("shapes", "validation", 0): ("73dc65c1e8ff80ef", 66.606),
    ("shapes", "heldout", 0): ("71849e2afae988f9", 59.505),
    ("shapes", "heldout", 2 * BLOCK): ("6b3fd83229c5c491", 67.185),
    ("shapes", "portrait", 0): ("ac78b78e0b56ec8e", 55.385),
    ("scenes", "train", 0): ("e0e4a33f072135ec", 86.4812),
    ("scenes", "validation", 0): ("66498210070ccaa5", 86.0550),
    ("scenes", "heldout", BLOCK): ("8782ba827e885ec8", 96.9818),
}
# All questions and lessons of many clips, which include all kinds of things, events, cameras and questions.
CONTENTS = {
    "shapes": "55f532d2fe968784",
    "lessons of shapes": "a1e71e4c3e75ba9b",
    "scenes": "593ae5f1016dc05a",
    "lessons of scenes": "d1f6f67c524d0b8e",
}


def rounded(value):
    """Round to four places, so that the last bits of a sine do not matter."""
    if isinstance(value, tuple | list):
        return tuple(map(rounded, value))
    return round(value, 4) if isinstance(value, float) else value


def digest(values) -> str:
    content = hashlib.sha256()
    for value in values:
        content.update(repr(value).encode())
    return content.hexdigest()[:16]


def look(world: str, clip, seed: int) -> tuple[object, float]:
    """Return a clip's content and questions, and the mean of its pixels."""
    rng = np.random.default_rng(seed)
    if world == "shapes":
        asked = [(q.type, q.question, q.answer) for q in questions.ask(clip, rng, QUESTIONS)]
        return (clip, asked), drawing.render(clip, SamplingPlan.even(0.0, clip.seconds, 4).times_s).mean()
    return (rounded(astuple(clip)), ask_scenes(clip, rng, 6, types_for(clip))), scenes_drawing.render(
        clip, [0.2, 0.7]
    ).mean()


@pytest.mark.parametrize(("world", "split", "first"), FROZEN, ids=str)
def test_the_generator_is_frozen(world, split, first):
    make = clips.make_clip if world == "shapes" else compose.make_clip
    contents, means = zip(*(look(world, make(split, seed), seed) for seed in range(first, first + 8)), strict=True)
    frozen, mean = FROZEN[world, split, first]
    assert (digest(contents), float(np.mean(means))) == (frozen, pytest.approx(mean, abs=0.02))


def contents(what: str):
    for seed in range(160):
        rng = np.random.default_rng(seed)
        if what.endswith("shapes"):
            clip = clips.make_clip("validation", seed, **({"seconds": 12.0, "grids": 12} if seed % 4 == 3 else {}))
            ask = questions.ask if what == "shapes" else lessons.ask_all
            yield clip, [(q.type, q.question, q.answer, q.groups) for q in ask(clip, rng, 1000)]
        else:
            clip = compose.make_clip("train", seed)
            types = types_for(clip) if what == "scenes" else scenes_lessons(clip, 0.5, types_for(clip))
            yield rounded(astuple(clip)), [ask_scenes(clip, rng, 9, {name: kind}) for name, kind in types.items()]


@pytest.mark.full
@pytest.mark.parametrize("what", CONTENTS)
def test_everything_that_can_be_asked_is_frozen(what):
    assert digest(contents(what)) == CONTENTS[what]
