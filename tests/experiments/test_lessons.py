"""Every answer of a lesson is worked out again, with nothing of the generator's own."""

from collections import Counter

import numpy as np
import pytest

from experiments.demo.clips import make_clip
from experiments.demo.lessons import LESSONS, ask_all
from experiments.demo.questions import TYPES
from tests.experiments.demo.test_questions import MANY, fate, parse, referred, way


def asked(kind=None, clips=150, **how):
    """All questions of a type, or of any, about some clips."""
    return [
        (clip, question)
        for clip in (make_clip("validation", seed, **how) for seed in range(clips))
        for question in ask_all(clip, np.random.default_rng(clip.seed), MANY)
        if kind in (None, question.type)
    ]


def cell(clip, question, axis, word):
    (name,) = parse(question, rf"Which {word} is the (.+) in\?")
    thing = referred(clip, name)
    assert way(clip, thing) == "still"
    return str(1 + sum(thing.centre(0.0)[axis] >= edge for edge in range(28, 28 * 20, 28)))


def row(clip, question):
    return cell(clip, question, 1, "row")


def column(clip, question):
    return cell(clip, question, 0, "column")


def when(clip, question):
    name, verb = parse(question, r"When does the (.+) (appear|vanish|flash)\?")
    thing = referred(clip, name)
    assert {"appears": "appear", "vanishes": "vanish", "flashes": "flash"}[fate(clip, thing)] == verb
    there = [t for t in np.linspace(0, clip.seconds, 3001)[:-1] if thing.visible(t)]
    when_ = (there[-1] if verb == "vanish" else there[0]) / clip.seconds
    return "early" if when_ < 1 / 3 else "midway" if when_ < 2 / 3 else "late"


def there(clip, question):
    name, when_ = parse(question, r"Is the (.+) there at the (start|end)\?")
    return "yes" if referred(clip, name).visible(0.0 if when_ == "start" else clip.seconds * 0.999) else "no"


def listed(things):
    return ", ".join(f"digit {t.kind}" if t.kind in "0123456789" else f"{t.colour} {t.kind}" for t in things)


def list_across(clip, question):
    parse(question, r"List everything from left to right\.")
    return listed(sorted(clip.things, key=lambda t: t.centre(t.start)[0]))


def list_down(clip, question):
    parse(question, r"List everything from top to bottom\.")
    return listed(sorted(clip.things, key=lambda t: t.centre(t.start)[1]))


def list_times(clip, question):
    (verb,) = parse(question, r"List what (appears|vanishes), in order\.")
    things = [t for t in clip.things if fate(clip, t) == verb]
    return listed(sorted(things, key=lambda t: t.start if verb == "appears" else t.end))


ANSWERS = {
    "row": row, "column": column, "when": when, "there": there,
    "list_across": list_across, "list_down": list_down, "list_times": list_times,
}  # fmt: skip


def test_every_lesson_is_checked_here():
    assert set(ANSWERS) == set(LESSONS)
    assert {question.type for _, question in asked()} == {*TYPES, *LESSONS}


@pytest.mark.parametrize("kind", LESSONS)
@pytest.mark.parametrize("how", [{}, {"height": 112, "width": 168, "seconds": 12.0, "grids": 12}], ids=["drawn", "12s"])
def test_answers_follow_from_the_scene(kind, how):
    found = asked(kind, clips=60, **how)
    assert len(found) > 15
    for clip, question in found:
        assert ANSWERS[kind](clip, question) == question.answer, question


@pytest.mark.parametrize(("kind", "answers"), [("there", {"yes", "no"}), ("when", {"early", "midway", "late"})])
def test_no_answer_is_never_or_nearly_always_right(kind, answers):
    given = Counter(question.answer for _, question in asked(kind))
    assert set(given) == answers
    assert max(given.values()) <= 0.65 * given.total()


def test_a_question_has_one_answer_within_a_clip():
    answers = {}
    for clip, question in asked():
        answers.setdefault((clip.seed, question.question), set()).add(question.answer)
    assert all(len(given) == 1 for given in answers.values())
