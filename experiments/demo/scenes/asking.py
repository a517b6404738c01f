"""Draw questions about a clip of scenes. Each question has exactly one correct answer and offers either four options or none."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.demo.questions import Question, pick
from experiments.demo.scenes.clip import COLOURS, OUTLINES, Clip, Thing

OPTIONS = 4
CHOICE = 0.75  # fraction of questions with options, among those that could also be asked without options
MOMENT = 0.1  # probability that a question about a video is about a flash, if there is one


@dataclass(frozen=True)
class Draft:
    """A potential question about a clip, before its options are drawn."""

    text: str
    answer: str
    wrong: tuple[str, ...] = ()  # the first three become options; if there are fewer, the question has no options
    about: tuple[Thing, ...] = ()
    open: bool = True  # whether the question can be answered without options


Maker = Callable[[Clip, np.random.Generator], Iterable[Draft]]


@dataclass(frozen=True)
class QuestionType:
    make: Maker
    group: str  # group name, more specific than picture or video
    weight: float = 1.0  # relative frequency


def ask(
    clip: Clip, rng: np.random.Generator, count: int, types: Mapping[str, QuestionType], choice: float = CHOICE
) -> list[Question]:
    """Draw up to `count` different questions about a clip, by weight. See CHOICE for `choice`."""
    pool = [(name, draft) for name, type in types.items() for draft in type.make(clip, rng)]
    flash = np.array([any(t.event(clip.seconds) == "flashes" for t in draft.about) for _, draft in pool])
    per_type = Counter((name, b) for (name, _), b in zip(pool, flash, strict=True))
    weights = np.array([types[n].weight / per_type[n, b] for (n, _), b in zip(pool, flash, strict=True)])
    chosen: list[Question] = []
    while len(chosen) < min(count, len(pool)) and (weights.any() or not chosen):
        wanted = flash == (rng.random() < MOMENT)
        odds = weights * wanted
        if not odds.any():
            odds = weights
        at = int(rng.choice(len(pool), p=odds / odds.sum()))
        weights[at] = 0.0
        name, draft = pool[at]
        groups = ["picture" if clip.is_still else "video", types[name].group]
        if flash[at]:
            groups.append("moment")
        options: tuple[str, ...] = ()
        if len(draft.wrong) >= OPTIONS - 1 and not (draft.open and rng.random() >= choice):
            offered = draft.answer, *draft.wrong[: OPTIONS - 1]
            options = tuple(offered[i] for i in rng.permutation(OPTIONS))
        groups.append("choice" if options else "open")
        chosen.append(Question(name, draft.text, draft.answer, options, tuple(groups)))
    return chosen


def shuffled(rng, texts) -> tuple[str, ...]:
    """Return the distinct strings in random order."""
    different = sorted(set(texts))
    return tuple(different[i] for i in rng.permutation(len(different)))


def refer(clip: Clip, thing: Thing, rng, hide: str = "") -> str | None:
    """Return a name that identifies the object within the clip, or None if there is no such name.

    `hide` is an attribute (outline, texture, or colour) that must not appear in the name.
    """
    if thing.is_sign:
        if len(clip.signs) == 1:
            return "sign"
        alone = sum(thing.colour in t.colours for t in clip.signs) == 1
        if hide == "colour" or not alone:
            return None
        return f"{thing.colour} sign"
    names = []
    for parts in ("outline", "colour outline", "texture outline", "colour", "texture colour outline"):
        parts = parts.split()
        if hide in parts or ("colour" in parts and len(thing.colours) > 1):
            continue
        others = (t for t in clip.shapes if t is not thing)
        if not any(all(getattr(thing, p) in t.looks(p) for p in parts) for t in others):
            words = [getattr(thing, p) for p in parts]
            if "outline" not in parts:
                words.append("thing")
            names.append(" ".join(words))
    if not names:
        return None
    return pick(rng, *names[:3])


def referred(clip: Clip, rng, things: Iterable[Thing] | None = None, hide: str = "") -> Iterator[tuple[Thing, str]]:
    """Yield objects (by default, all objects in the clip) with names from `refer`, skipping objects without a unique name."""
    if things is None:
        things = clip.things
    for thing in things:
        if (called := refer(clip, thing, rng, hide)) is not None:
            yield thing, called


def name(thing: Thing) -> str:
    """Return an object's name for use in options and answers, such as `red star` or `sign WORD`."""
    return f"sign {thing.text}" if thing.is_sign else f"{thing.colour} {thing.outline}"


def distinct(clip: Clip) -> list[Thing]:
    """Return all shapes with a constant color and a unique `name` in the clip."""
    counts = Counter((colour, t.outline) for t in clip.shapes for colour in t.colours)
    return [t for t in clip.shapes if len(t.colours) == 1 and counts[t.colour, t.outline] == 1]


def unhurried(clip: Clip) -> list[Thing]:
    """Return all non-flashing shapes with a unique name (see `distinct`)."""
    return [t for t in distinct(clip) if t.event(clip.seconds) != "flashes"]


def absent(clip: Clip, rng, count: int) -> list[str]:
    """Return names of objects missing from the clip, preferring colors and outlines that do occur in it."""
    there = {f"{colour} {t.outline}" for t in clip.shapes for colour in t.colours}
    near = {f"{a.colour} {b.outline}" for a in clip.shapes for b in clip.shapes} - there
    far = {f"{c} {o}" for c in COLOURS for o in OUTLINES} - there - near
    return [*shuffled(rng, near), *shuffled(rng, far)][:count]


def one_of_four(clip: Clip, rng, text: str, ones: Sequence[Thing], others, fill: bool = False) -> Iterator[Draft]:
    """Ask which of four objects is in `ones`. The incorrect options come from `others`, which must contain at least three objects.

    If `fill` is True, `others` needs only one object, and objects missing from the clip make up the other options.
    """
    least = 3
    if fill:
        least = 1
    if ones and len(others) >= least:
        right = pick(rng, *ones)
        wrong = shuffled(rng, map(name, others))[:3]
        if fill:
            wrong = (*wrong, *absent(clip, rng, 3))[:3]
        yield Draft(text, name(right), wrong, (right,), open=False)
