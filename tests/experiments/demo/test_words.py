"""The words that evoprune.bundled lists are those of the questions of the training."""

import re

import numpy as np
import pytest

from evoprune.batch.rows import Row
from evoprune.bundled import SIGN, WORDS
from experiments.demo import scenes_lessons
from experiments.demo.clips import make_clip
from experiments.demo.questions import ask
from experiments.demo.scenes import compose
from experiments.demo.scenes.asking import OPTIONS
from experiments.demo.scenes.happening import types_for


def shapes():
    for seed in range(600):
        yield from (q.question for q in ask(make_clip("train", seed), np.random.default_rng(seed), 40))


def scenes():
    """All that can be asked about some clips, one or two in a prompt, in the training of the model for scenes."""
    for seed in (*range(60), 515):  # the last is the first clip of which "What changes its colour?" is asked
        clip, rng = compose.make_clip("train", seed), np.random.default_rng(seed)
        noun = "picture" if clip.is_still else "video"
        taught = scenes_lessons.LOOKING if clip.is_still else scenes_lessons.LOOKING | scenes_lessons.HAPPENING
        for kind in (*types_for(clip).values(), *taught.values()):
            for draft in kind.make(clip, rng):
                options = (draft.answer, *draft.wrong) if len(draft.wrong) >= OPTIONS - 1 else ()
                yield Row("", (), (), draft.text, options=options[:OPTIONS]).prompt
        yield from (f"In the {which} {noun}: " for which in ("first", "second"))


@pytest.mark.parametrize("asked", [shapes, scenes])
def test_the_words_are_those_of_the_generator(asked):
    found = {word for question in asked() for word in re.findall(r"\w+", question)}
    found = {word.lower() for word in found if asked is shapes or not SIGN.fullmatch(word)}
    assert found == WORDS[asked.__name__]
