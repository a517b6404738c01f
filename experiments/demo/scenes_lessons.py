"""Lessons, which are training-only questions about scenes that ask for a single step of a harder question type.

For example, a lesson about the position of one object prepares for questions about which object is "furthest to the left", and a
lesson about the time of one event prepares for questions about "which happens first". Imported by `scenes_batches`.
"""

from experiments.demo.questions import pick
from experiments.demo.scenes.asking import Draft, QuestionType, name, refer
from experiments.demo.scenes.clip import Clip
from experiments.demo.scenes.looking import placed, times_asked, yes

UNIT = 28  # side length of a unit, in pixels
APART = 20  # minimum distance, in pixels
LISTED = 6
VERBS = {"appears": "appear", "vanishes": "vanish", "flashes": "flash"}


def _cells(clip, rng):
    """Ask for an object's row or column, in units."""
    drafts = []
    for when, t in times_asked(clip).items():
        for thing, x, y in placed(clip, t):
            called = refer(clip, thing, rng)
            if called is not None:
                side, at = pick(rng, ("row", y), ("column", x))
                drafts.append(Draft(f"Which {side} is the {called} in{when}?", str(int(at) // UNIT + 1), (), (thing,)))
    return drafts


def _beside(clip, rng):
    """Ask about the relative position of two static objects."""
    if clip.camera.travels or not clip.is_uncut:
        return []
    lie = [t for t in clip.things if not t.speed]
    drafts = []
    for one in lie:
        other = lie[int(rng.integers(len(lie)))]
        a = refer(clip, one, rng)
        b = refer(clip, other, rng)
        way, far = pick(rng, ("left of", other.x - one.x), ("above", other.y - one.y))
        if other is not one and None not in (a, b) and abs(far) > APART:
            drafts.append(Draft(f"Is the {a} {way} the {b}?", yes(far > 0), (), (one, other)))
    return drafts


def _lists(clip, rng):
    """Ask for a list of all objects, or all objects with one attribute, from left to right."""
    if clip.camera.travels or not clip.is_uncut:
        return []
    lie = sorted((t for t in clip.things if not t.speed and not t.after), key=lambda t: t.x)
    lie = [t for t in lie if t.event(clip.seconds) == "stays"]
    listed = lambda things: ", ".join(name(t) for t in things)  # noqa: E731
    drafts = []
    if len(lie) == len(clip.things) <= LISTED:
        drafts.append(Draft("List everything from left to right.", listed(lie)))
    shapes = [t for t in lie if not t.is_sign]
    if len(shapes) < len(clip.shapes):
        return drafts
    for part in ("colour", "outline", "texture"):
        for value in sorted({getattr(t, part) for t in shapes}):
            same = [t for t in shapes if getattr(t, part) == value]
            if len(same) <= LISTED:
                drafts.append(Draft(f"List what is {value} from left to right.", listed(same)))
                drafts.append(Draft(f"How often is there something {value}?", str(len(same))))
    return drafts


def _when(clip, rng):
    drafts = []
    for thing in clip.things if clip.is_uncut else ():
        event, called, (start, end) = thing.event(clip.seconds), refer(clip, thing, rng), thing.spans[0]
        if called is None or event not in VERBS:
            continue
        third = int(min((end if event == "vanishes" else start) / clip.seconds * 3, 2))
        drafts.append(
            Draft(f"When does the {called} {VERBS[event]}?", ("early", "midway", "late")[third], (), (thing,))
        )
    return drafts


LOOKING = {
    "cells": QuestionType(_cells, "lesson", 1.5),
    "beside": QuestionType(_beside, "lesson"),
    "lists": QuestionType(_lists, "lesson", 2.0),
}
HAPPENING = {"when": QuestionType(_when, "lesson", 1.5)}


def lessons(clip: Clip, share: float, of: dict[str, QuestionType]) -> dict[str, QuestionType]:
    """Return the lessons that fit a clip, weighted to make up about `share` of all questions when mixed with the types in `of`."""
    fitting = LOOKING if clip.is_still else LOOKING | HAPPENING
    weight = sum(kind.weight for kind in of.values()) * share / (1 - share) / sum(k.weight for k in fitting.values())
    return {key: QuestionType(kind.make, kind.group, kind.weight * weight) for key, kind in fitting.items()}
