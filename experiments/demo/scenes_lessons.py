"""Questions about scenes for training alone: each asks for one step of what a harder type needs at once.

Whether a thing is there comes before which of four is, where one lies before which lies furthest to the left, what is there at the
start and at the end before what happens. Imported by `scenes_batches`.
"""

from evoprune.demo.scenes.asking import Draft, Kind, absent, distinct, name, pick, refer
from evoprune.demo.scenes.clip import Clip, Thing

UNIT, APART = 28, 20  # pixels
LISTED = 6
VERBS = {"appears": "appear", "vanishes": "vanish", "flashes": "flash"}


def _moments(clip: Clip) -> dict[str, float]:
    """The middle of the first and of the last frame pair, as they are asked about; of a still the only one."""
    half = clip.seconds / clip.pairs / 2
    return {"": half} if clip.is_still else {" at the start": half, " at the end": clip.seconds - half}


def _placed(clip: Clip, t: float) -> list[tuple[Thing, float, float]]:
    """What is there at a time and lies on the frame, with the pixel of its middle."""
    found = [(thing, *clip.on_frame(*thing.centre(t), t)) for thing in clip.things if thing.visible(t)]
    return [(thing, x, y) for thing, x, y in found if 0 <= x < clip.width and 0 <= y < clip.height]


def _yes(it: bool) -> str:
    return "yes" if it else "no"


def _there(clip, rng):
    """Whether a thing is there at all."""
    named = [name(t) for t in distinct(clip) if t.event(clip.seconds) != "flashes"]
    if not named or not clip.is_whole:
        return []
    drafts = [Draft(f"Is there any {x}?", "yes") for x in (pick(rng, *named), pick(rng, *named))]
    return drafts + [Draft(f"Is there any {x}?", "no") for x in absent(clip, rng, 2)]


def _cells(clip, rng):
    """The row and the column of a thing, in units."""
    drafts = []
    for when, t in _moments(clip).items():
        for thing, x, y in _placed(clip, t):
            called = refer(clip, thing, rng)
            if called is not None:
                side, at = pick(rng, ("row", y), ("column", x))
                drafts.append(Draft(f"Which {side} is the {called} in{when}?", str(int(at) // UNIT + 1), (), (thing,)))
    return drafts


def _halves(clip, rng):
    drafts = []
    for when, t in _moments(clip).items():
        for thing, x, y in _placed(clip, t):
            called = refer(clip, thing, rng)
            side, at = pick(rng, ("left", x / clip.width), ("top", y / clip.height))
            if called is not None and abs(at - 0.5) > 0.06:
                drafts.append(Draft(f"Is the {called} in the {side} half{when}?", _yes(at < 0.5), (), (thing,)))
    return drafts


def _beside(clip, rng):
    """How two things that lie still lie to each other."""
    if clip.camera.travels or not clip.is_whole:
        return []
    lie = [t for t in clip.things if not t.speed]
    drafts = []
    for one in lie:
        other, a = lie[int(rng.integers(len(lie)))], refer(clip, one, rng)
        b = refer(clip, other, rng)
        way, far = pick(rng, ("left of", other.x - one.x), ("above", other.y - one.y))
        if other is not one and None not in (a, b) and abs(far) > APART:
            drafts.append(Draft(f"Is the {a} {way} the {b}?", _yes(far > 0), (), (one, other)))
    return drafts


def _lists(clip, rng):
    """Everything, or all of one look, from left to right."""
    if clip.camera.travels or not clip.is_whole:
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


def _at(clip, rng):
    """Whether a thing that is there at some time is there at the start, or at the end."""
    drafts = []
    for thing in clip.things:
        event, called = thing.event(clip.seconds), refer(clip, thing, rng)
        if called is None or (event in ("stays", "blinks") and rng.random() < 0.7):
            continue
        when, t = pick(rng, *_moments(clip).items())
        drafts.append(Draft(f"Is the {called} there{when}?", _yes(thing.visible(t)), (), (thing,)))
    return drafts


def _when(clip, rng):
    drafts = []
    for thing in clip.things if clip.is_whole else ():
        event, called, (start, end) = thing.event(clip.seconds), refer(clip, thing, rng), thing.spans[0]
        if called is None or event not in VERBS:
            continue
        third = int(min((end if event == "vanishes" else start) / clip.seconds * 3, 2))
        drafts.append(
            Draft(f"When does the {called} {VERBS[event]}?", ("early", "midway", "late")[third], (), (thing,))
        )
    return drafts


def _moves(clip, rng):
    drafts = []
    if clip.camera.travels:
        return drafts
    for thing in clip.things:
        called = refer(clip, thing, rng)
        if called is not None and (thing.speed or rng.random() < 0.3):
            drafts.append(Draft(f"Does the {called} move?", _yes(bool(thing.speed)), (), (thing,)))
    return drafts


LOOKING = {
    "is there": Kind(_there, "lesson"), "cells": Kind(_cells, "lesson", 1.5), "halves": Kind(_halves, "lesson"),
    "beside": Kind(_beside, "lesson"), "lists": Kind(_lists, "lesson", 2.0),
}  # fmt: skip
HAPPENING = {
    "at": Kind(_at, "lesson", 2.0), "when": Kind(_when, "lesson", 1.5), "does move": Kind(_moves, "lesson", 1.5),
}  # fmt: skip


def lessons(clip: Clip, share: float, of: dict[str, Kind]) -> dict[str, Kind]:
    """The lessons that fit a clip, so weighted that they are about this share of the questions beside those of `of`."""
    fitting = LOOKING if clip.is_still else LOOKING | HAPPENING
    weight = sum(kind.weight for kind in of.values()) * share / (1 - share) / sum(k.weight for k in fitting.values())
    return {key: Kind(kind.make, kind.group, kind.weight * weight) for key, kind in fitting.items()}
