"""Questions about a clip of shapes. The answers are derived from the scene, and only unambiguous questions are asked."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from operator import attrgetter

import numpy as np

from experiments.demo.clips import COLOURS, SHAPES, Clip, Thing

# Relative frequency by question type. Types that take the longest to learn are asked most often.
WEIGHTS = {"relation": 3.0, "order": 5.0, "place": 2.0, "event": 1.5, "describe": 0.5}
# Question types, grouped by the ability that they test.
GROUPS = {
    "detail": ("digit", "digit_colour", "colour", "shape", "size"),
    "time": ("event", "which", "order", "count_end", "motion"),
    "space": ("relation", "place", "count"),
    "rest": ("exists", "describe"),
}
# Function that yields all questions of one type about a clip, as tuples: question, answer, and the objects that the question refers
# to.
Maker = Callable[[Clip, np.random.Generator], Iterable[tuple]]


@dataclass(frozen=True)
class Question:
    """A question about a clip in either world. If it has `options`, the answer is one of them."""

    type: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    groups: tuple[
        str, ...
    ] = ()  # for shapes: abilities, flash, camera; for scenes: the clip's family, followed by finer groups


def ask(
    clip: Clip,
    rng: np.random.Generator,
    count: int,
    makers: Mapping[str, Maker] | None = None,
    weights: Mapping[str, float] = WEIGHTS,
) -> list[Question]:
    """Ask up to `count` different questions about a clip.

    Args:
        makers: The question types. Defaults to MAKERS.
        weights: The relative frequency by type. Missing types have a weight of 1.
    """
    if makers is None:
        makers = MAKERS
    pool = [(t, f) for t, make in makers.items() for f in make(clip, rng)]
    if not pool:
        return []
    per_type = Counter(t for t, _ in pool)
    weight = np.array([weights.get(t, 1.0) / per_type[t] for t, _ in pool])
    chosen = rng.choice(len(pool), size=min(count, len(pool)), replace=False, p=weight / weight.sum())
    return [
        Question(t, text, answer, groups=_groups(clip, t, things))
        for t, (text, answer, *things) in (pool[i] for i in chosen)
    ]


def _groups(clip: Clip, type: str, things: list[Thing]) -> tuple[str, ...]:
    groups = [name for name, types in GROUPS.items() if type in types]
    if any(thing.event(clip.seconds) == "flashes" for thing in things):
        groups.append("flash")
    groups.append("panning" if any(clip.pan) else "static")
    return tuple(groups)


def pick(rng, *phrases):
    return phrases[int(rng.integers(len(phrases)))]


def refer(clip: Clip, thing: Thing, rng) -> str:
    """Return an unambiguous name for an object, such as `circle`, `red shape`, `red circle`, or `digit`."""
    if thing.is_digit:
        return "digit"
    names = [thing.name]
    if thing in _only(clip, "kind"):
        names.append(thing.kind)
    if thing in _only(clip, "colour"):
        names.append(f"{thing.colour} shape")
    return pick(rng, *names)


def _only(clip: Clip, part: str) -> list[Thing]:
    """Return all shapes whose attribute `part` (kind or color) is unique in the clip."""
    counts = Counter(getattr(t, part) for t in clip.shapes)
    return [t for t in clip.shapes if counts[getattr(t, part)] == 1]


def _digits(clip: Clip) -> list[Thing]:
    return [t for t in clip.things if t.is_digit]


def _each(things: Callable[[Clip], Iterable[Thing]], part: str, *phrases: str, called=refer) -> Maker:
    """Return a maker that asks for one attribute of each object, inserting the object's name into one of the phrases.

    `part` is the name of the attribute, and `called` returns an object's name.
    """

    def make(clip, rng):
        for t in things(clip):
            x = called(clip, t, rng)
            yield pick(rng, *phrases).format(x), getattr(t, part), t

    return make


def _colour(clip, rng):
    word = pick(rng, "colour", "color")
    for t in _only(clip, "kind"):
        yield pick(rng, f"What {word} is the {t.kind}?", f"Which {word} does the {t.kind} have?"), t.colour, t


def _digit_colour(clip, rng):
    word = pick(rng, "colour", "color")
    return [(f"What {word} is the digit?", t.colour, t) for t in _digits(clip)]


def _count(clip, rng):
    if clip.shapes or clip.seconds <= 1:
        text = pick(rng, "How many shapes are there?", "How many shapes appear in the video?", "Count the shapes.")
        yield text, str(len(clip.shapes))


def _count_end(clip, rng):
    # If an object vanishes shortly before the end, it might be visible in all sampled frames. No question is asked about such
    # clips.
    if not any(0 < clip.seconds - t.end < clip.seconds * 0.12 for t in clip.shapes):
        seen = sum(t.visible(clip.seconds * (1 - 1e-6)) for t in clip.shapes)
        yield pick(rng, "How many shapes are there at the end?", "How many shapes are left at the end?"), str(seen)


def _event(clip, rng):
    phrases = "What happens to the {}?", "Does the {} appear, vanish, flash or stay?"
    made = [
        (pick(rng, *(phrase.format(x) for phrase in phrases)), t.event(clip.seconds), t)
        for t in clip.things
        for x in [refer(clip, t, rng)]
    ]
    # Most objects stay. Questions about them are asked less often, so that "stays" isn't the best guess.
    return [m for m in made if m[1] != "stays" or rng.random() < 0.5]


def _which(clip, rng):
    for event in ("appears", "vanishes", "flashes"):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        if len(found) == 1:
            answer = found[0].name
            if found[0].is_digit:
                answer = f"digit {found[0].kind}"
            yield pick(rng, f"What {event}?", f"Which thing {event}?"), answer, found[0]


def _order(clip, rng):
    for event, time_of in (("appears", lambda t: t.start), ("vanishes", lambda t: t.end)):
        found = [t for t in clip.things if t.event(clip.seconds) == event]
        for a, b in combinations(found, 2):
            if abs(time_of(a) - time_of(b)) < clip.seconds * 0.2:
                continue
            swapped = rng.random() >= 0.5
            names = [refer(clip, t, rng) for t in (a, b)]
            first = names[time_of(a) >= time_of(b)]
            if swapped:
                names.reverse()
            one, two = names
            yield f"Which {event} first, the {one} or the {two}?", first, a, b


def _relation(clip, rng):
    for a, b in combinations(clip.things, 2):
        pair = [a, b]
        if rng.random() >= 0.5:
            pair.reverse()
        p, q = (thing.box(clip.seconds) for thing in pair)
        x, y = [refer(clip, thing, rng) for thing in pair]
        for axis, less, more, of in ((0, "left", "right", "of the"), (1, "above", "below", "the")):
            text = f"Is the {x} {less} or {more} {of} {y}?"
            if p[axis + 2] < q[axis]:
                yield text, less, a, b
            elif q[axis + 2] < p[axis]:
                yield text, more, a, b


def _place(clip, rng):
    for t in clip.things:
        box = t.box(clip.seconds)
        x = refer(clip, t, rng)
        for axis, middle, less, more in ((0, clip.width / 2, "left", "right"), (1, clip.height / 2, "top", "bottom")):
            text = f"Is the {x} in the {less} or {more} half?"
            if box[axis + 2] < middle:
                yield text, less, t
            elif box[axis] > middle:
                yield text, more, t


def _exists(clip, rng):
    names = {t.name for t in clip.shapes}
    if names and rng.random() < 0.5:
        name = pick(rng, *sorted(names))
        answer = "yes"
    else:  # a shape and a color that both occur in the clip, but if possible not in the same object
        kinds = list(SHAPES)
        if rng.random() < 0.7:
            kinds = sorted({t.kind for t in clip.shapes})
        colours = list(COLOURS)
        if rng.random() < 0.7:
            colours = sorted({t.colour for t in clip.shapes})
        absent = [n for n in (f"{c} {k}" for c in colours for k in kinds) if n not in names]
        if not absent:
            return
        name = pick(rng, *absent)
        answer = "no"
    yield pick(rng, f"Is there a {name}?", f"Can you see a {name}?"), answer


def _describe(clip, rng):
    """Describe the clip in complete sentences, listing the objects from left to right."""
    said = []
    for t in sorted(clip.things, key=lambda t: t.centre(max(t.start, 0.0))[0]):
        event = t.event(clip.seconds)
        if t.is_digit:
            happens = "is shown" if event == "stays" else event
            said.append(f"The {t.colour} digit {t.kind} {happens}.")
            continue
        does = "stays still" if t.motion == "still" else f"moves {t.motion}"
        if event != "stays":
            does += f" and {event}"
        said.append(f"A {t.size} {t.name} {does}.")
    if said:
        yield pick(rng, "Describe the video.", "What happens?", "What happens in the video?"), " ".join(said)


MAKERS = {
    "colour": _colour,
    "shape": _each(
        lambda clip: _only(clip, "colour"), "kind",
        "What shape is {}?", "Which shape is the {} one?", "What is the {} shape?", called=lambda clip, t, rng: t.colour,
    ),
    "motion": _each(
        attrgetter("shapes"), "motion",
        "Which way does the {} move?", "In which direction does the {} move?", "Where does the {} go?",
    ),
    "size": _each(attrgetter("shapes"), "size", "Is the {} small or large?", "How big is the {}?"),
    "count": _count, "count_end": _count_end,
    "digit": _each(_digits, "kind", "Which digit is shown?", "What number can be seen?", "What digit is it?"),
    "digit_colour": _digit_colour, "event": _event, "which": _which, "order": _order,
    "relation": _relation, "place": _place, "exists": _exists, "describe": _describe,
}  # fmt: skip
TYPES = tuple(MAKERS)
