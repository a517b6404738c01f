"""Questions about a procedural clip whose answers follow from the scene, each asked only where it has one answer.

TYPES are what is evaluated. LESSONS come up in training alone: each asks for one step of what a harder type needs at once (where
one thing is before how two lie to each other, when before which first).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evoprune.demo.clips import COLOURS, SHAPES, Clip, Thing

# How often each type is asked, relative to the others: what takes longest to learn comes up most.
WEIGHTS = {"relation": 3.0, "order": 5.0, "place": 2.0, "event": 1.5, "describe": 0.5, "when": 1.5}
TYPES = (
    "colour", "shape", "motion", "size", "count", "count_end", "digit", "digit_colour", "event", "which", "order",
    "relation", "place", "exists", "describe",
)  # fmt: skip
LESSONS = ("row", "column", "when", "there", "list_across", "list_down", "list_times")


@dataclass(frozen=True)
class Question:
    type: str
    question: str
    answer: str
    flash: bool = False  # about something that only two or three of the sampled frames show


def ask(clip: Clip, rng: np.random.Generator, count: int, types: Sequence[str] = TYPES) -> list[Question]:
    """Up to `count` different questions about the clip, of these types, drawn by WEIGHTS."""
    pool = [(t, f) for t in types for f in _MAKERS[t](clip, rng)]
    if not pool:
        return []
    per_type = Counter(t for t, _ in pool)
    weight = np.array([WEIGHTS.get(t, 1.0) / per_type[t] for t, _ in pool])
    chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False, p=weight / weight.sum())
    return [
        Question(t, text, answer, any(thing.event(clip.seconds) == "flashes" for thing in things))
        for t, (text, answer, *things) in (pool[i] for i in chosen)
    ]


def _pick(rng, *phrases: str) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def _refer(clip: Clip, thing: Thing, rng) -> str:
    """A name that fits this thing alone: `circle`, `red shape`, `red circle` or `digit`."""
    if thing.is_digit:
        return "digit"
    names = [thing.name]
    if sum(t.kind == thing.kind for t in clip.shapes) == 1:
        names.append(thing.kind)
    if sum(t.colour == thing.colour for t in clip.shapes) == 1:
        names.append(f"{thing.colour} shape")
    return _pick(rng, *names)


def _only_kind(clip):
    return [t for t in clip.shapes if sum(o.kind == t.kind for o in clip.shapes) == 1]


def _only_colour(clip):
    return [t for t in clip.shapes if sum(o.colour == t.colour for o in clip.shapes) == 1]


def _colour(clip, rng):
    word = _pick(rng, "colour", "color")
    return [
        (_pick(rng, f"What {word} is the {t.kind}?", f"Which {word} does the {t.kind} have?"), t.colour, t)
        for t in _only_kind(clip)
    ]


def _shape(clip, rng):
    return [
        (
            _pick(
                rng,
                f"What shape is {t.colour}?",
                f"Which shape is the {t.colour} one?",
                f"What is the {t.colour} shape?",
            ),
            t.kind,
            t,
        )
        for t in _only_colour(clip)
    ]


def _motion(clip, rng):
    def phrase(t):
        x = _refer(clip, t, rng)
        return _pick(
            rng, f"Which way does the {x} move?", f"In which direction does the {x} move?", f"Where does the {x} go?"
        )

    return [(phrase(t), t.motion, t) for t in clip.shapes]


def _size(clip, rng):
    return [
        (_pick(rng, f"Is the {(x := _refer(clip, t, rng))} small or large?", f"How big is the {x}?"), t.size, t)
        for t in clip.shapes
    ]


def _count(clip, rng):
    if clip.seconds > 1 and not clip.shapes:
        return []
    return [
        (
            _pick(rng, "How many shapes are there?", "How many shapes appear in the video?", "Count the shapes."),
            str(len(clip.shapes)),
        )
    ]


def _count_end(clip, rng):
    last = clip.seconds * (1 - 1e-6)
    # Something that goes within the last moments may or may not be seen: such clips are not asked about.
    if any(0 < clip.seconds - t.end < clip.seconds * 0.12 for t in clip.shapes):
        return []
    seen = sum(t.visible(last) for t in clip.shapes)
    return [(_pick(rng, "How many shapes are there at the end?", "How many shapes are left at the end?"), str(seen))]


def _digit(clip, rng):
    return [
        (_pick(rng, "Which digit is shown?", "What number can be seen?", "What digit is it?"), t.kind, t)
        for t in clip.things
        if t.is_digit
    ]


def _digit_colour(clip, rng):
    word = _pick(rng, "colour", "color")
    return [(f"What {word} is the digit?", t.colour, t) for t in clip.things if t.is_digit]


def _event(clip, rng):
    made = [
        (
            _pick(
                rng,
                f"What happens to the {(x := _refer(clip, t, rng))}?",
                f"Does the {x} appear, vanish, flash or stay?",
            ),
            t.event(clip.seconds),
            t,
        )
        for t in clip.things
    ]
    # Staying is the commonest fate: asked less often, so that it is not the best guess.
    return [m for m in made if m[1] != "stays" or rng.random() < 0.5]


def _which(clip, rng):
    made = []
    for verb, event in (("appears", "appears"), ("vanishes", "vanishes"), ("flashes", "flashes")):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        if len(found) == 1:
            answer = f"digit {found[0].kind}" if found[0].is_digit else found[0].name
            made.append((_pick(rng, f"What {verb}?", f"Which thing {verb}?"), answer, found[0]))
    return made


def _order(clip, rng):
    made = []
    gap = clip.seconds * 0.2
    for event, verb, moment in (("appears", "appears", lambda t: t.start), ("vanishes", "vanishes", lambda t: t.end)):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        for i, a in enumerate(found):
            for b in found[i + 1 :]:
                if abs(moment(a) - moment(b)) < gap:
                    continue
                first = a if moment(a) < moment(b) else b
                one, two = (a, b) if rng.random() < 0.5 else (b, a)
                names = {id(t): _refer(clip, t, rng) for t in (a, b)}
                made.append(
                    (f"Which {verb} first, the {names[id(one)]} or the {names[id(two)]}?", names[id(first)], a, b)
                )
    return made


def _relation(clip, rng):
    made = []
    for i, a in enumerate(clip.things):
        for b in clip.things[i + 1 :]:
            one, two = (a, b) if rng.random() < 0.5 else (b, a)
            p, q = one.box(clip.seconds), two.box(clip.seconds)
            names = _refer(clip, one, rng), _refer(clip, two, rng)
            if p[2] < q[0] or q[2] < p[0]:
                text = f"Is the {names[0]} left or right of the {names[1]}?"
                made.append((text, "left" if p[2] < q[0] else "right", a, b))
            if p[3] < q[1] or q[3] < p[1]:
                text = f"Is the {names[0]} above or below the {names[1]}?"
                made.append((text, "above" if p[3] < q[1] else "below", a, b))
    return made


def _place(clip, rng):
    made = []
    for t in clip.things:
        x0, y0, x1, y1 = t.box(clip.seconds)
        name = _refer(clip, t, rng)
        if x1 < clip.width / 2 or x0 > clip.width / 2:
            made.append((f"Is the {name} in the left or right half?", "left" if x1 < clip.width / 2 else "right", t))
        if y1 < clip.height / 2 or y0 > clip.height / 2:
            made.append((f"Is the {name} in the top or bottom half?", "top" if y1 < clip.height / 2 else "bottom", t))
    return made


def _exists(clip, rng):
    names = {t.name for t in clip.shapes}
    if names and rng.random() < 0.5:
        name, answer = sorted(names)[int(rng.integers(len(names)))], "yes"
    else:  # a shape and a colour that are there, but not together, where there are enough
        kinds = sorted({t.kind for t in clip.shapes}) if rng.random() < 0.7 else list(SHAPES)
        colours = sorted({t.colour for t in clip.shapes}) if rng.random() < 0.7 else list(COLOURS)
        absent = [n for n in (f"{c} {k}" for c in colours for k in kinds) if n not in names]
        if not absent:
            return []
        name, answer = absent[int(rng.integers(len(absent)))], "no"
    return [(_pick(rng, f"Is there a {name}?", f"Can you see a {name}?"), answer)]


def _describe(clip, rng):
    """Full sentences, things from left to right."""
    said = []
    for t in sorted(clip.things, key=lambda t: t.centre(max(t.start, 0.0))[0]):
        event = t.event(clip.seconds)
        if t.is_digit:
            said.append(f"The {t.colour} digit {t.kind} " + ("is shown." if event == "stays" else f"{event}."))
            continue
        does = "stays still" if t.motion == "still" else f"moves {t.motion}"
        also = "" if event == "stays" else f" and {event}"
        said.append(f"A {t.size} {t.name} {does}{also}.")
    return (
        [(_pick(rng, "Describe the video.", "What happens?", "What happens in the video?"), " ".join(said))]
        if said
        else []
    )


def _row(clip, rng):
    still = [t for t in clip.things if t.motion == "still"]
    return [(f"Which row is the {_refer(clip, t, rng)} in?", str(int(t.y // 28) + 1), t) for t in still]


def _column(clip, rng):
    still = [t for t in clip.things if t.motion == "still"]
    return [(f"Which column is the {_refer(clip, t, rng)} in?", str(int(t.x // 28) + 1), t) for t in still]


def _when(clip, rng):
    made = []
    verbs = {
        "appears": ("appear", lambda t: t.start),
        "vanishes": ("vanish", lambda t: t.end),
        "flashes": ("flash", lambda t: t.start),
    }
    for t in clip.things:
        if (event := t.event(clip.seconds)) in verbs:
            verb, moment = verbs[event]
            third = int(min(moment(t) / clip.seconds * 3, 2))
            made.append((f"When does the {_refer(clip, t, rng)} {verb}?", ("early", "midway", "late")[third], t))
    return made


def _there(clip, rng):
    made = []
    for t in clip.things:
        if (event := t.event(clip.seconds)) == "stays" and rng.random() < 0.5:
            continue
        seen = {"start": event in ("stays", "vanishes"), "end": event in ("stays", "appears")}
        moment = _pick(rng, "start", "end")
        text = f"Is the {_refer(clip, t, rng)} there at the {moment}?"
        made.append((text, "yes" if seen[moment] else "no", t))
    return made


def _listed(things) -> str:
    return ", ".join(f"digit {t.kind}" if t.is_digit else t.name for t in things)


def _list_across(clip, rng):
    things = sorted(clip.things, key=lambda t: t.centre(t.start)[0])
    return [("List everything from left to right.", _listed(things))] if things else []


def _list_down(clip, rng):
    things = sorted(clip.things, key=lambda t: t.centre(t.start)[1])
    return [("List everything from top to bottom.", _listed(things))] if things else []


def _list_times(clip, rng):
    made = []
    for event, moment in (("appears", lambda t: t.start), ("vanishes", lambda t: t.end)):
        things = sorted((t for t in clip.things if t.event(clip.seconds) == event), key=moment)
        if len(things) > 1:
            made.append((f"List what {event}, in order.", _listed(things)))
    return made


_MAKERS = {
    "colour": _colour, "shape": _shape, "motion": _motion, "size": _size, "count": _count, "count_end": _count_end,
    "digit": _digit, "digit_colour": _digit_colour, "event": _event, "which": _which, "order": _order,
    "relation": _relation, "place": _place, "exists": _exists, "describe": _describe,
    "row": _row, "column": _column, "when": _when, "there": _there,
    "list_across": _list_across, "list_down": _list_down, "list_times": _list_times,
}  # fmt: skip
