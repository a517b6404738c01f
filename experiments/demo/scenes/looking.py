"""Questions that can be answered from a single moment: text on signs, appearance, positions, and counts."""

from experiments.demo.questions import pick
from experiments.demo.scenes.asking import (
    Draft,
    QuestionType,
    absent,
    distinct,
    name,
    refer,
    referred,
    shuffled,
    unhurried,
)
from experiments.demo.scenes.clip import COLOURS, OUTLINES, TEXTURES, Clip, Thing
from experiments.demo.scenes.signs import similar_text

CORNERS = ("top left", "top right", "bottom left", "bottom right")
MOST_COUNTED = 4
COUNTED = (0.5, 0.6, 0.7, 0.9)  # probability of asking about counts 1 to 4; small counts occur most often


def times_asked(clip: Clip) -> dict[str, float]:
    """Return the times that questions refer to, keyed by their wording: the middle of the first and last frame pairs."""
    half = clip.seconds / clip.pairs / 2
    return {"": half} if clip.is_still else {" at the start": half, " at the end": clip.seconds - half}


def placed(clip: Clip, t: float) -> list[tuple[Thing, float, float]]:
    """Return all objects within the frame at time `t`, each with the pixel position of its center."""
    found = [(thing, *clip.on_frame(*thing.centre(t), t)) for thing in clip.things if thing.visible(t)]
    return [(thing, x, y) for thing, x, y in found if 0 <= x < clip.width and 0 <= y < clip.height]


def yes(it: bool) -> str:
    return "yes" if it else "no"


def _read(clip, rng):
    for t, x in referred(clip, rng, clip.signs):
        if t.after:
            continue
        wrong = [o.text for o in clip.signs if o is not t and len(o.text) == len(t.text)][:1]
        while len(set(wrong)) < 3:
            wrong.append(similar_text(t.text, rng))
            wrong = [w for w in wrong if w != t.text]
        text = pick(rng, f"What does the {x} say?", f"What is written on the {x}?")
        yield Draft(text, t.text, shuffled(rng, wrong), (t,))


def _sign_colour(clip, rng):
    for t in clip.signs:
        if not t.after:
            text = f"What colour is the sign that says {t.text}?"
            yield Draft(text, t.colour, shuffled(rng, set(COLOURS) - {t.colour}), (t,))


def _attribute(hide: str, values, *phrases: str):
    def make(clip, rng):
        for t, x in referred(clip, rng, [t for t in clip.shapes if not t.after], hide):
            right = getattr(t, hide)
            # Half of the time, attributes of other objects in the clip come first among the incorrect answers.
            others = shuffled(rng, {getattr(o, hide) for o in clip.shapes} - {right})
            rest = shuffled(rng, set(values) - {right, *others})
            wrong = (*others, *rest) if rng.random() < 0.5 else shuffled(rng, {*others, *rest})
            yield Draft(pick(rng, *phrases).format(x), right, wrong, (t,))

    return make


def _where(clip, rng):
    for t, x in referred(clip, rng) if not clip.camera.travels else ():
        if not t.speed and abs(t.x / clip.width - 0.5) > 0.06 and abs(t.y / clip.height - 0.5) > 0.06:
            right = CORNERS[2 * (t.y > clip.height / 2) + (t.x > clip.width / 2)]
            yield Draft(f"Where is the {x}?", right, shuffled(rng, set(CORNERS) - {right}), (t,))


def _top(clip, rng):
    """Ask what lies on top of an object. The incorrect answers are other objects in the clip."""
    named = distinct(clip)
    for t in named:
        if t.under < 0:
            continue
        for below, x in referred(clip, rng, [clip.things[t.under]]):
            others = *shuffled(rng, [name(o) for o in named if o not in (t, below)]), *absent(clip, rng, 3)
            yield Draft(f"What lies on top of the {x}?", name(t), others, (t, below))


def _extreme(clip, rng):
    named = [t for t in distinct(clip) if not t.speed and t.event(clip.seconds) == "stays" and t.visible(0)]
    if len(named) < 4 or not clip.is_uncut:
        return
    for side, key in (
        ("left", lambda t: t.x), ("right", lambda t: -t.x), ("top", lambda t: t.y), ("bottom", lambda t: -t.y),
    ):  # fmt: skip
        four = sorted((named[i] for i in rng.choice(len(named), 4, replace=False)), key=key)
        if key(four[1]) - key(four[0]) > 20:
            wrong = shuffled(rng, map(name, four[1:]))
            yield Draft(f"Which of these is furthest to the {side}?", name(four[0]), wrong, tuple(four), open=False)


def _count(clip, rng):
    """Ask how many objects share an attribute, if all objects stay. Small counts are common, so they are asked about less often."""
    if any(t.event(clip.seconds) != "stays" or t.after for t in clip.things) or not clip.is_uncut:
        return
    found: dict[int, list[str]] = {}
    for values, part, plural in (
        (OUTLINES, "outline", "{}s"), (TEXTURES, "texture", "{} things"), (COLOURS, "colour", "{} things"),
    ):  # fmt: skip
        for value in values:
            n = sum(getattr(t, part) == value for t in clip.shapes)
            if 1 <= n <= MOST_COUNTED:
                found.setdefault(n, []).append("crosses" if value == "cross" else plural.format(value))
    for n, phrases in found.items():
        if rng.random() <= COUNTED[n - 1]:
            wrong = tuple(str(m) for m in range(1, MOST_COUNTED + 1) if m != n)
            yield Draft(f"How many {pick(rng, *phrases)} are there?", str(n), wrong)


def _there(clip, rng):
    """Ask which of four objects appears in the clip."""
    if named := unhurried(clip):
        t = pick(rng, *named)
        text = pick(rng, "Which of these can be seen?", "Which of these is there?")
        yield Draft(text, name(t), tuple(absent(clip, rng, 3)), (t,), open=False)


def _missing(clip, rng):
    """Ask which of four objects does not appear in the clip."""
    named = shuffled(rng, map(name, unhurried(clip)))
    if len(named) >= 3:
        text = pick(rng, "Which of these is missing?", "Which of these cannot be seen?")
        yield Draft(text, absent(clip, rng, 1)[0], named[:3], open=False)


def _any(clip, rng):
    """Ask whether the clip contains an object with a given name."""
    named = [name(t) for t in unhurried(clip)]
    if named and clip.is_uncut:
        for there in (pick(rng, *named), pick(rng, *named)):
            yield Draft(f"Is there any {there}?", "yes")
        for missing in absent(clip, rng, 2):
            yield Draft(f"Is there any {missing}?", "no")


def _halves(clip, rng):
    for when, t in times_asked(clip).items():
        for thing, x, y in placed(clip, t):
            called = refer(clip, thing, rng)
            side, at = pick(rng, ("left", x / clip.width), ("top", y / clip.height))
            if called is not None and abs(at - 0.5) > 0.06:
                yield Draft(f"Is the {called} in the {side} half{when}?", yes(at < 0.5), about=(thing,))


_colour = _attribute("colour", COLOURS, "What colour is the {}?", "Which colour does the {} have?")
LOOKING = {
    "read": QuestionType(_read, "text", 2.1), "sign_colour": QuestionType(_sign_colour, "text", 0.8),
    "colour": QuestionType(_colour, "look", 0.8),
    "texture": QuestionType(_attribute("texture", TEXTURES, "What pattern does the {} have?"), "look", 1.3),
    "outline": QuestionType(_attribute("outline", OUTLINES, "What shape is the {}?"), "look", 0.8),
    "where": QuestionType(_where, "place", 1.4), "top": QuestionType(_top, "place", 0.2),
    "extreme": QuestionType(_extreme, "place", 0.3), "count": QuestionType(_count, "count", 0.7),
    "there": QuestionType(_there, "look", 0.9), "missing": QuestionType(_missing, "look", 0.3),
}  # fmt: skip
# Yes/no questions.
CHECKED = {"any": QuestionType(_any, "look", 2.0), "half": QuestionType(_halves, "place", 2.0)}
