"""Answers that follow from what happens and how things move, worked out again; test_frozen.py holds the others."""

import re
from collections import Counter

import numpy as np
import pytest

from experiments.demo.clips import Clip, Thing, make_clip
from experiments.demo.questions import TYPES, Question, ask

MANY = 1000


def asked(types=None, clips=150, **how) -> list[tuple[Clip, Question]]:
    """All questions of these types about some clips."""
    return [
        (clip, question)
        for clip in (make_clip("validation", seed, **how) for seed in range(clips))
        for question in ask(clip, np.random.default_rng(clip.seed), MANY)
        if types is None or question.type in types
    ]


def referred(clip: Clip, name: str) -> Thing:
    """The one thing that `red circle`, `circle`, `red shape` or `digit` can mean."""
    words = name.split()
    fits = []
    for thing in clip.things:
        is_digit = thing.kind in "0123456789"
        kind_fits = words[-1] in (("digit",) if is_digit else ("shape", thing.kind))
        if kind_fits and (len(words) == 1 or words[0] == thing.colour):
            fits.append(thing)
    assert len(fits) == 1, f"{name!r} fits {len(fits)} things"
    return fits[0]


def parse(question: Question, *patterns: str) -> tuple[str, ...]:
    found = [match.groups() for pattern in patterns if (match := re.fullmatch(pattern, question.question))]
    assert len(found) == 1, question
    return found[0]


def way(clip: Clip, thing: Thing) -> str:
    (x0, y0), (x1, y1) = thing.centre(0.0), thing.centre(clip.seconds)
    if abs(x1 - x0) < 1 and abs(y1 - y0) < 1:
        return "still"
    if abs(x1 - x0) > abs(y1 - y0):
        return "right" if x1 > x0 else "left"
    return "down" if y1 > y0 else "up"


def fate(clip: Clip, thing: Thing) -> str:
    there = [thing.visible(t) for t in [0.0, *np.linspace(0, clip.seconds, 2000, endpoint=False)[1:]]]
    return {(1, 1): "stays", (0, 1): "appears", (1, 0): "vanishes", (0, 0): "flashes"}[there[0], there[-1]]


def motion(clip, question):
    (name,) = parse(
        question,
        r"Which way does the (.+) move\?",
        r"In which direction does the (.+) move\?",
        r"Where does the (.+) go\?",
    )
    return way(clip, referred(clip, name))


def event(clip, question):
    (name,) = parse(question, r"What happens to the (.+)\?", r"Does the (.+) appear, vanish, flash or stay\?")
    return fate(clip, referred(clip, name))


ANSWERS = {"motion": motion, "event": event}


@pytest.mark.parametrize("kind", ANSWERS)
@pytest.mark.parametrize("how", [{}, {"height": 112, "width": 168, "seconds": 12.0, "grids": 12}], ids=["drawn", "12s"])
def test_answers_follow_from_the_scene(kind, how):
    found = asked({kind}, clips=60, **how)
    assert len(found) > 15
    for clip, question in found:
        assert ANSWERS[kind](clip, question) == question.answer, question
    given = Counter(question.answer for _, question in found)
    assert max(given.values()) <= 0.65 * given.total()


@pytest.mark.parametrize("count_", [0, 1, 5, MANY])
def test_ask_gives_different_questions_up_to_the_count(count_):
    for seed in range(40):
        clip = make_clip("train", seed)
        whole = ask(clip, np.random.default_rng(0), MANY)
        assert {q.type for q in whole} <= set(TYPES)
        some = ask(clip, np.random.default_rng(0), count_)
        assert len(some) == min(count_, len(whole))
        assert len({q.question for q in some}) == len(some)
        assert some == ask(clip, np.random.default_rng(0), count_)
