"""Questions about a clip of scenes: drawn from what can be asked, with four options or open, each with one answer."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from evoprune.demo.scenes.clip import COLOURS, OUTLINES, Clip, Thing

OPTIONS = 4
CHOICE = 0.75  # share of questions that have options, of those that may be open too
MOMENT = 0.1  # chance that a question about a video is about what flashes, if something does


@dataclass(frozen=True)
class Question:
    """`options`: empty for an open question, else one of them is the answer. `groups`: the family of the clip, then finer ones."""

    type: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draft:
    """A question before it is asked.

    Attributes:
        wrong: texts that are no answer; the first three become options. Fewer than three: the question is open.
        about: the things in question. `open`: whether it can be answered without options.
    """

    text: str
    answer: str
    wrong: tuple[str, ...] = ()
    about: tuple[Thing, ...] = ()
    open: bool = True


Maker = Callable[[Clip, np.random.Generator], list[Draft]]


@dataclass(frozen=True)
class Kind:
    """One type of question: how it is made, the finer group in which it counts, how often it is asked relative to others."""

    make: Maker
    group: str
    weight: float = 1.0


def ask(
    clip: Clip,
    rng: np.random.Generator,
    count: int,
    kinds: Mapping[str, Kind],
    choice: float = CHOICE,
    brief: float = MOMENT,
) -> list[Question]:
    """Up to `count` different questions about the clip, drawn by weight; `choice` and `brief` as CHOICE and MOMENT."""
    pool = [(name, draft) for name, kind in kinds.items() for draft in kind.make(clip, rng)]
    flash = np.array([_is_brief(clip, draft) for _, draft in pool])
    per_type = Counter((name, b) for (name, _), b in zip(pool, flash, strict=True))
    weights = np.array([kinds[n].weight / per_type[n, b] for (n, _), b in zip(pool, flash, strict=True)])
    chosen: list[Question] = []
    for _ in range(min(count, len(pool))):
        wanted = flash == (rng.random() < brief)
        odds = weights * (wanted if (weights * wanted).any() else 1)
        at = int(rng.choice(len(pool), p=odds / odds.sum()))
        weights[at] = 0.0
        name, draft = pool[at]
        chosen.append(_finished(clip, name, draft, kinds[name].group, bool(flash[at]), rng, choice))
        if not weights.any():
            break
    return chosen


def _finished(clip: Clip, name: str, draft: Draft, group: str, brief: bool, rng, choice: float) -> Question:
    groups = ("picture" if clip.is_still else "video", group, *(("moment",) if brief else ()))
    enough = len(draft.wrong) >= OPTIONS - 1
    if not enough or (draft.open and rng.random() >= choice):
        return Question(name, draft.text, draft.answer, (), (*groups, "open"))
    options = [draft.answer, *draft.wrong[: OPTIONS - 1]]
    return Question(
        name, draft.text, draft.answer, tuple(options[i] for i in rng.permutation(OPTIONS)), (*groups, "choice")
    )


def _is_brief(clip: Clip, draft: Draft) -> bool:
    return any(thing.event(clip.seconds) == "flashes" for thing in draft.about)


def pick(rng, *phrases: str) -> str:
    return phrases[int(rng.integers(len(phrases)))]


def shuffled(rng, texts) -> tuple[str, ...]:
    """The different texts, in random order."""
    different = sorted(set(texts))
    return tuple(different[i] for i in rng.permutation(len(different)))


def refer(clip: Clip, thing: Thing, rng, hide: str = "") -> str | None:
    """A name that fits this thing alone, without the attribute `hide` (outline, texture or colour); None if there is none."""
    if thing.is_sign:
        if len(clip.signs) == 1:
            return "sign"
        alone = sum(thing.colour in t.colours for t in clip.signs) == 1
        return f"{thing.colour} sign" if alone and hide != "colour" else None
    fixed = len(thing.colours) == 1
    names = []
    for parts in (
        ("outline",),
        ("colour", "outline"),
        ("texture", "outline"),
        ("colour",),
        ("texture", "colour", "outline"),
    ):
        if hide in parts or ("colour" in parts and not fixed):
            continue
        if not any(
            t is not thing and all(_may_be(t, part, getattr(thing, part)) for part in parts) for t in clip.shapes
        ):
            names.append(" ".join([*(getattr(thing, p) for p in parts), *([] if "outline" in parts else ["thing"])]))
    return pick(rng, *names[:3]) if names else None


def _may_be(thing: Thing, part: str, value: str) -> bool:
    return value in thing.colours if part == "colour" else getattr(thing, part) == value


def name(thing: Thing) -> str:
    """A thing as an option or an answer: `red star`, or `sign WORD`."""
    return f"sign {thing.text}" if thing.is_sign else f"{thing.colour} {thing.outline}"


def distinct(clip: Clip) -> list[Thing]:
    """The shapes whose colour never changes and whose `name` nothing else has."""
    counts = Counter((colour, t.outline) for t in clip.shapes for colour in t.colours)
    return [t for t in clip.shapes if len(t.colours) == 1 and counts[t.colour, t.outline] == 1]


def absent(clip: Clip, rng, count: int) -> list[str]:
    """Names of things that are nowhere in the clip, of the colours and outlines of those that are where there are enough."""
    there = {f"{colour} {t.outline}" for t in clip.shapes for colour in t.colours}
    near = {f"{a.colour} {b.outline}" for a in clip.shapes for b in clip.shapes} - there
    far = {f"{c} {o}" for c in COLOURS for o in OUTLINES} - there - near
    return [*shuffled(rng, near), *shuffled(rng, far)][:count]
