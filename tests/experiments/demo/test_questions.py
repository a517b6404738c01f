"""Every answer is worked out again: from names, positions and visibility over time, with nothing of the generator's own."""

import re
from collections import Counter

import numpy as np
import pytest

from experiments.demo.clips import COLOURS, SHAPES, Clip, Thing, make_clip
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


def times(clip: Clip) -> list[float]:
    return [float(t) for t in np.linspace(0, clip.seconds, 60, endpoint=False)]


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


def colour(clip, question):
    (kind,) = parse(question, r"What colou?r is the (\w+)\?", r"Which colou?r does the (\w+) have\?")
    return referred(clip, kind).colour


def shape(clip, question):
    (name,) = parse(question, r"What shape is (\w+)\?", r"Which shape is the (\w+) one\?", r"What is the (\w+) shape\?")
    return referred(clip, f"{name} shape").kind


def motion(clip, question):
    (name,) = parse(
        question,
        r"Which way does the (.+) move\?",
        r"In which direction does the (.+) move\?",
        r"Where does the (.+) go\?",
    )
    return way(clip, referred(clip, name))


def size(clip, question):
    (name,) = parse(question, r"Is the (.+) small or large\?", r"How big is the (.+)\?")
    return "large" if referred(clip, name).radius >= 9 else "small"


def count(clip, question):
    seen = {t.name for t in clip.things if t.kind in SHAPES and any(t.visible(m) for m in times(clip))}
    return str(len(seen))


def count_end(clip, question):
    return str(sum(t.kind in SHAPES and t.visible(clip.seconds * 0.999) for t in clip.things))


def digit(clip, question):
    return referred(clip, "digit").kind


def digit_colour(clip, question):
    return referred(clip, "digit").colour


def event(clip, question):
    (name,) = parse(question, r"What happens to the (.+)\?", r"Does the (.+) appear, vanish, flash or stay\?")
    return fate(clip, referred(clip, name))


def which(clip, question):
    (verb,) = parse(question, r"What (\w+)\?", r"Which thing (\w+)\?")
    (thing,) = [t for t in clip.things if fate(clip, t) == verb]
    return f"digit {thing.kind}" if thing.kind in "0123456789" else f"{thing.colour} {thing.kind}"


def order(clip, question):
    verb, one, two = parse(question, r"Which (\w+) first, the (.+) or the (.+)\?")
    a, b = referred(clip, one), referred(clip, two)
    assert a is not b and fate(clip, a) == fate(clip, b) == verb

    def time_of(thing):
        there = [t for t in times(clip) if thing.visible(t)]
        return there[0] if verb == "appears" else there[-1]

    assert abs(time_of(a) - time_of(b)) > clip.seconds * 0.15  # far enough apart to tell
    return one if time_of(a) < time_of(b) else two


def relation(clip, question):
    one, sideways, two = parse(question, r"Is the (.+) (left or right of|above or below) the (.+)\?")
    a, b = referred(clip, one), referred(clip, two)
    axis, words = (0, ("left", "right")) if "left" in sideways else (1, ("above", "below"))
    apart = {
        a.centre(s)[axis] + a.radius < b.centre(t)[axis] - b.radius
        if a.centre(0)[axis] < b.centre(0)[axis]
        else a.centre(s)[axis] - a.radius > b.centre(t)[axis] + b.radius
        for s in times(clip)
        for t in (0.0, clip.seconds / 2, clip.seconds)
    }
    assert a is not b and apart == {True}  # at all times, wherever either is
    return words[a.centre(0)[axis] > b.centre(0)[axis]]


def place(clip, question):
    name, halves = parse(question, r"Is the (.+) in the (left or right|top or bottom) half\?")
    thing, axis = referred(clip, name), int("top" in halves)
    middle = (clip.width, clip.height)[axis] / 2
    low = {thing.centre(t)[axis] + thing.radius <= middle for t in (0.0, clip.seconds)}
    high = {thing.centre(t)[axis] - thing.radius >= middle for t in (0.0, clip.seconds)}
    assert (low == {True}) != (high == {True})  # never across the middle
    return halves.split(" or ")[high == {True}]


def exists(clip, question):
    colour_name, kind = parse(question, r"(?:Is there|Can you see) a (\w+) (\w+)\?")
    assert colour_name in COLOURS and kind in SHAPES
    return "yes" if any((t.colour, t.kind) == (colour_name, kind) for t in clip.things) else "no"


def describe(clip, question):
    said = []
    for thing in sorted(clip.things, key=lambda t: t.centre(t.start)[0]):
        happens, goes = fate(clip, thing), way(clip, thing)
        if thing.kind in "0123456789":
            said.append(f"The {thing.colour} digit {thing.kind} {'is shown' if happens == 'stays' else happens}.")
        else:
            big = "large" if thing.radius >= 9 else "small"
            does = "stays still" if goes == "still" else f"moves {goes}"
            also = "" if happens == "stays" else f" and {happens}"
            said.append(f"A {big} {thing.colour} {thing.kind} {does}{also}.")
    return " ".join(said)


ANSWERS = {
    "colour": colour, "shape": shape, "motion": motion, "size": size, "count": count, "count_end": count_end,
    "digit": digit, "digit_colour": digit_colour, "event": event, "which": which, "order": order,
    "relation": relation, "place": place, "exists": exists, "describe": describe,
}  # fmt: skip


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("how", [{}, {"height": 112, "width": 168, "seconds": 12.0, "grids": 12}], ids=["drawn", "12s"])
def test_answers_follow_from_the_scene(kind, how):
    found = asked({kind}, clips=60, **how)
    assert len(found) > 15
    for clip, question in found:
        assert ANSWERS[kind](clip, question) == question.answer, question
    given = Counter(question.answer for _, question in found)
    assert kind in ("digit", "count_end", "describe") or max(given.values()) <= 0.65 * given.total()


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
