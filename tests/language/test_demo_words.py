import re

import numpy as np

from evoprune.demo.clips import make_clip
from evoprune.demo.questions import ask
from evoprune.language.demo_words import WORDS, unknown_words


def test_the_words_are_those_of_the_generator():
    asked = (q.question for seed in range(600) for q in ask(make_clip("train", seed), np.random.default_rng(seed), 40))
    assert {word for question in asked for word in re.findall(r"\w+", question.lower())} == WORDS


def test_what_is_unknown():
    assert unknown_words("What colour is the Square?") == []
    assert unknown_words("Does the man smile?") == ["man", "smile"]
