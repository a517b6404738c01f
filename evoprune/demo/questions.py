"""Questions about a procedural clip whose answers follow from the scene, each asked only where it has one answer."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from evoprune.demo.clips import COLOURS, SHAPES, Clip, Thing

# How often each type is asked, relative to the others: types that take longest to learn come up most.
WEIGHTS = {"relation": 3.0, "order": 5.0, "place": 2.0, "event": 1.5, "describe": 0.5}
# All that one type asks about a clip: question, answer, and the things that the question is about.
Maker = Callable[[Clip, np.random.Generator], list[tuple]]


@dataclass(frozen=True)
class Question:
    type: str
    question: str
    answer: str
    flash: bool = False  # about something that only two or three of the sampled frames show


def ask(
    clip: Clip,
    rng: np.random.Generator,
    count: int,
    makers: Mapping[str, Maker] | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> list[Question]:
    """Up to `count` different questions about the clip, drawn by weight.

    Args:
        makers: of the types to ask, by name; default: all of MAKERS.
        weights: how often each type is asked; 1 where a type is missing.
    """
    makers = MAKERS if makers is None else makers
    pool = [(t, f) for t, make in makers.items() for f in make(clip, rng)]
    if not pool:
        return []
    per_type = Counter(t for t, _ in pool)
    weight = np.array([weights.get(t, 1.0) / per_type[t] for t, _ in pool])
    chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False, p=weight / weight.sum())
    return [
        Question(t, text, answer, any(thing.event(clip.seconds) == "flashes" for thing in things))
        for t, (text, answer, *things) in (pool[i] for i in chosen)
    ]


def pick(rng, *phrases: str) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def refer(clip: Clip, thing: Thing, rng) -> str:
    """A name that fits this thing alone: `circle`, `red shape`, `red circle` or `digit`."""
    if thing.is_digit:
        return "digit"
    names = [thing.name]
    if sum(t.kind == thing.kind for t in clip.shapes) == 1:
        names.append(thing.kind)
    if sum(t.colour == thing.colour for t in clip.shapes) == 1:
        names.append(f"{thing.colour} shape")
    return pick(rng, *names)


def _only_kind(clip):
    return [t for t in clip.shapes if sum(o.kind == t.kind for o in clip.shapes) == 1]


def _only_colour(clip):
    return [t for t in clip.shapes if sum(o.colour == t.colour for o in clip.shapes) == 1]


def _colour(clip, rng):
    word = pick(rng, "colour", "color")
    return [
        (pick(rng, f"What {word} is the {t.kind}?", f"Which {word} does the {t.kind} have?"), t.colour, t)
        for t in _only_kind(clip)
    ]


def _shape(clip, rng):
    return [
        (
            pick(
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
        x = refer(clip, t, rng)
        return pick(
            rng, f"Which way does the {x} move?", f"In which direction does the {x} move?", f"Where does the {x} go?"
        )

    return [(phrase(t), t.motion, t) for t in clip.shapes]


def _size(clip, rng):
    return [
        (pick(rng, f"Is the {(x := refer(clip, t, rng))} small or large?", f"How big is the {x}?"), t.size, t)
        for t in clip.shapes
    ]


def _count(clip, rng):
    if clip.seconds > 1 and not clip.shapes:
        return []
    return [
        (
            pick(rng, "How many shapes are there?", "How many shapes appear in the video?", "Count the shapes."),
            str(len(clip.shapes)),
        )
    ]


def _count_end(clip, rng):
    last = clip.seconds * (1 - 1e-6)
    # Something that goes shortly before the end may or may not be seen, so such clips raise no question.
    if any(0 < clip.seconds - t.end < clip.seconds * 0.12 for t in clip.shapes):
        return []
    seen = sum(t.visible(last) for t in clip.shapes)
    return [(pick(rng, "How many shapes are there at the end?", "How many shapes are left at the end?"), str(seen))]


def _digit(clip, rng):
    return [
        (pick(rng, "Which digit is shown?", "What number can be seen?", "What digit is it?"), t.kind, t)
        for t in clip.things
        if t.is_digit
    ]


def _digit_colour(clip, rng):
    word = pick(rng, "colour", "color")
    return [(f"What {word} is the digit?", t.colour, t) for t in clip.things if t.is_digit]


def _event(clip, rng):
    made = [
        (
            pick(
                rng,
                f"What happens to the {(x := refer(clip, t, rng))}?",
                f"Does the {x} appear, vanish, flash or stay?",
            ),
            t.event(clip.seconds),
            t,
        )
        for t in clip.things
    ]
    # Most things stay. They are asked about less often, so that "stays" is not the best guess.
    return [m for m in made if m[1] != "stays" or rng.random() < 0.5]


def _which(clip, rng):
    made = []
    for verb, event in (("appears", "appears"), ("vanishes", "vanishes"), ("flashes", "flashes")):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        if len(found) == 1:
            answer = f"digit {found[0].kind}" if found[0].is_digit else found[0].name
            made.append((pick(rng, f"What {verb}?", f"Which thing {verb}?"), answer, found[0]))
    return made


def _order(clip, rng):
    made = []
    gap = clip.seconds * 0.2
    for event, verb, time_of in (("appears", "appears", lambda t: t.start), ("vanishes", "vanishes", lambda t: t.end)):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        for i, a in enumerate(found):
            for b in found[i + 1 :]:
                if abs(time_of(a) - time_of(b)) < gap:
                    continue
                first = a if time_of(a) < time_of(b) else b
                one, two = (a, b) if rng.random() < 0.5 else (b, a)
                names = {id(t): refer(clip, t, rng) for t in (a, b)}
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
            names = refer(clip, one, rng), refer(clip, two, rng)
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
        name = refer(clip, t, rng)
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
    return [(pick(rng, f"Is there a {name}?", f"Can you see a {name}?"), answer)]


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
        [(pick(rng, "Describe the video.", "What happens?", "What happens in the video?"), " ".join(said))]
        if said
        else []
    )


MAKERS = {
    "colour": _colour, "shape": _shape, "motion": _motion, "size": _size, "count": _count, "count_end": _count_end,
    "digit": _digit, "digit_colour": _digit_colour, "event": _event, "which": _which, "order": _order,
    "relation": _relation, "place": _place, "exists": _exists, "describe": _describe,
}  # fmt: skip
TYPES = tuple(MAKERS)
