"""Questions that one moment answers: what signs say, how things look, where they lie, how many there are."""

import numpy as np

from evoprune.demo.scenes.asking import Draft, Kind, absent, distinct, name, pick, refer, shuffled
from evoprune.demo.scenes.clip import COLOURS, OUTLINES, TEXTURES, Clip, Thing
from evoprune.demo.scenes.signs import similar_text

PLURALS = {"cross": "crosses"}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
MOST_COUNTED = 4
COUNTED = (0.5, 0.6, 0.7, 0.9)  # chance that a number is asked about: small ones are found most often


def _steady(clip: Clip) -> list[Thing]:
    """Things that do not change."""
    return [t for t in clip.things if not t.after]


def _read(clip, rng):
    drafts = []
    for t in clip.signs:
        x = refer(clip, t, rng)
        if x is None or t.after:
            continue
        wrong = [o.text for o in clip.signs if o is not t and len(o.text) == len(t.text)][:1]
        while len(set(wrong)) < 3:
            wrong.append(similar_text(t.text, rng))
            wrong = [w for w in wrong if w != t.text]
        text = pick(rng, f"What does the {x} say?", f"What is written on the {x}?")
        drafts.append(Draft(text, t.text, shuffled(rng, wrong), (t,)))
    return drafts


def _sign_colour(clip, rng):
    return [
        Draft(f"What colour is the sign that says {t.text}?", t.colour, shuffled(rng, set(COLOURS) - {t.colour}), (t,))
        for t in clip.signs
        if not t.after
    ]


def _attribute(hide: str, values, phrase):
    def make(clip, rng):
        drafts = []
        for t in _steady(clip):
            x = None if t.is_sign else refer(clip, t, rng, hide)
            if x is not None:
                right = getattr(t, hide)
                # Other things' looks come first among the wrong answers.
                others = shuffled(rng, {getattr(o, hide) for o in clip.shapes} - {right})
                rest = shuffled(rng, set(values) - {right, *others})
                wrong = [*others, *rest] if rng.random() < 0.5 else shuffled(rng, {*others, *rest})
                drafts.append(Draft(phrase(x, rng), right, tuple(wrong), (t,)))
        return drafts

    return make


def _where(clip, rng):
    drafts = []
    if clip.camera.travels:
        return drafts
    for t in clip.things:
        x = refer(clip, t, rng)
        if x is None or t.speed:
            continue
        if abs(t.x / clip.width - 0.5) > 0.06 and abs(t.y / clip.height - 0.5) > 0.06:
            right = CORNERS[2 * (t.y > clip.height / 2) + (t.x > clip.width / 2)]
            drafts.append(Draft(f"Where is the {x}?", right, shuffled(rng, set(CORNERS) - {right}), (t,)))
    return drafts


def _top(clip, rng):
    """What lies on what; the wrong answers are other things in the clip."""
    drafts, named = [], distinct(clip)
    for t in named:
        if t.under < 0:
            continue
        below = clip.things[t.under]
        x = refer(clip, below, rng)
        if x is None:
            continue
        others = [*shuffled(rng, [name(o) for o in named if o not in (t, below)]), *absent(clip, rng, 3)]
        drafts.append(Draft(f"What lies on top of the {x}?", name(t), tuple(others), (t, below)))
    return drafts


def _extreme(clip, rng):
    named = [t for t in distinct(clip) if not t.speed and t.event(clip.seconds) == "stays" and t.visible(0)]
    if len(named) < 4 or not clip.is_whole:
        return []
    drafts = []
    for side, key in (
        ("to the left", lambda t: t.x), ("to the right", lambda t: -t.x),
        ("to the top", lambda t: t.y), ("to the bottom", lambda t: -t.y),
    ):  # fmt: skip
        four = sorted((named[i] for i in rng.choice(len(named), 4, replace=False)), key=key)
        if key(four[1]) - key(four[0]) > 20:
            wrong = shuffled(rng, [name(t) for t in four[1:]])
            drafts.append(Draft(f"Which of these is furthest {side}?", name(four[0]), wrong, tuple(four), open=False))
    return drafts


def _count(clip, rng):
    """Things of one look, in a clip where all things stay; each count as often as the others where it can be."""
    if any(t.event(clip.seconds) != "stays" or t.after for t in clip.things) or not clip.is_whole:
        return []
    found: dict[int, list[str]] = {}
    for values, part, phrase in (
        (OUTLINES, "outline", lambda v: PLURALS.get(v, f"{v}s")),
        (TEXTURES, "texture", lambda v: f"{v} things"),
        (COLOURS, "colour", lambda v: f"{v} things"),
    ):
        for value in values:
            n = sum(getattr(t, part) == value for t in clip.shapes)
            if 1 <= n <= MOST_COUNTED:
                found.setdefault(n, []).append(phrase(value))
    drafts = []
    for n, phrases in found.items():
        if rng.random() > COUNTED[n - 1]:
            continue
        wrong = tuple(str(m) for m in range(1, MOST_COUNTED + 1) if m != n)
        text = f"How many {pick(rng, *phrases)} are there?"
        drafts.append(Draft(text, str(n), wrong))
    return drafts


def _there(clip, rng):
    """One of four is in the clip."""
    named = [t for t in distinct(clip) if t.event(clip.seconds) != "flashes"]
    if not named:
        return []
    t = named[int(rng.integers(len(named)))]
    text = pick(rng, "Which of these can be seen?", "Which of these is there?")
    return [Draft(text, name(t), tuple(absent(clip, rng, 3)), (t,), open=False)]


def _missing(clip, rng):
    """One of four is not in the clip."""
    named = shuffled(rng, [name(t) for t in distinct(clip) if t.event(clip.seconds) != "flashes"])
    if len(named) < 3:
        return []
    text = pick(rng, "Which of these is missing?", "Which of these cannot be seen?")
    return [Draft(text, absent(clip, rng, 1)[0], named[:3], open=False)]


def _colour_phrase(x: str, rng: np.random.Generator) -> str:
    return pick(rng, f"What colour is the {x}?", f"Which colour does the {x} have?")


LOOKING = {
    "read": Kind(_read, "text", 2.1),
    "sign_colour": Kind(_sign_colour, "text", 0.8),
    "colour": Kind(_attribute("colour", COLOURS, _colour_phrase), "look", 0.8),
    "texture": Kind(_attribute("texture", TEXTURES, lambda x, rng: f"What pattern does the {x} have?"), "look", 1.3),
    "outline": Kind(_attribute("outline", OUTLINES, lambda x, rng: f"What shape is the {x}?"), "look", 0.8),
    "where": Kind(_where, "place", 1.4),
    "top": Kind(_top, "place", 0.2),
    "extreme": Kind(_extreme, "place", 0.3),
    "count": Kind(_count, "count", 0.7),
    "there": Kind(_there, "look", 0.9),
    "missing": Kind(_missing, "look", 0.3),
}
