import re

import numpy as np
import pytest

from evoprune.batch.rows import Row
from evoprune.bundled import SIGN, WORDS, unknown_words
from evoprune.demo.clips import make_clip
from evoprune.demo.questions import ask
from evoprune.demo.scenes import compose
from evoprune.demo.scenes.asking import OPTIONS
from evoprune.demo.scenes.happening import types_for
from experiments.demo import scenes_lessons


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


@pytest.mark.full
@pytest.mark.parametrize("asked", [shapes, scenes])
def test_the_words_are_those_of_the_generator(asked):
    found = {word for question in asked() for word in re.findall(r"\w+", question)}
    found = {word.lower() for word in found if asked is shapes or not SIGN.fullmatch(word)}
    assert found == WORDS[asked.__name__]


@pytest.mark.parametrize(
    ("world", "question", "unknown"),
    [
        ("shapes", "What colour is the Square?", []),
        ("shapes", "Does the man smile?", ["man", "smile"]),
        ("shapes", "What does the sign say?", ["sign", "say"]),
        ("scenes", "In the second picture: What colour is the sign that says NORTH?\nA. red\nB. 4711", []),
        ("scenes", "Is the digit on the North sign?", ["digit", "north"]),
    ],
)
def test_what_is_unknown(world, question, unknown):
    assert unknown_words(question, world) == unknown
