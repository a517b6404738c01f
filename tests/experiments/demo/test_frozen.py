"""The generator is frozen: figures about its clips compare only with figures about the same clips.

Where this fails, something has changed what is drawn or asked; so everything in results/ would have to be measured anew.
"""

import hashlib

import numpy as np
import pytest

from evoprune.video.plan import even_times
from experiments.demo.clips import make_clip
from experiments.demo.drawing import render
from experiments.demo.questions import ask
from experiments.demo.worlds import QUESTIONS
from experiments.demo.write import BLOCK

FROZEN = {
    ("train", 0): ("f4cf8aab466a77a5", 50.956),
    ("validation", 0): ("73dc65c1e8ff80ef", 66.606),
    ("heldout", 0): ("71849e2afae988f9", 59.505),
    ("heldout", 2 * BLOCK): ("6b3fd83229c5c491", 67.185),
    ("portrait", 0): ("ac78b78e0b56ec8e", 55.385),
}


def look(split: str, seeds: range) -> tuple[str, float]:
    """A digest of what is in the clips and what is asked, and the mean of all pixels, which may differ a little elsewhere."""
    content, means = hashlib.sha256(), []
    for seed in seeds:
        clip = make_clip(split, seed)
        asked = [(q.type, q.question, q.answer) for q in ask(clip, np.random.default_rng(seed), QUESTIONS)]
        content.update(repr((clip, asked)).encode())
        means.append(render(clip, even_times(0.0, clip.seconds, 4)).mean())
    return content.hexdigest()[:16], float(np.mean(means))


@pytest.mark.parametrize(("split", "first"), FROZEN, ids=str)
def test_the_generator_is_frozen(split, first):
    digest, mean = look(split, range(first, first + 8))
    assert (digest, mean) == (FROZEN[split, first][0], pytest.approx(FROZEN[split, first][1], abs=0.02))
