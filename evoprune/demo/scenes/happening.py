"""Questions that need more than one moment: what happens, in which order, which way, how often, what changes, what stays."""

from dataclasses import replace

from evoprune.demo.scenes.asking import Draft, Kind, absent, distinct, name, pick, refer, shuffled
from evoprune.demo.scenes.checking import CHECKED, CHECKED_OVER_TIME
from evoprune.demo.scenes.clip import COLOURS, MOTIONS, Clip
from evoprune.demo.scenes.looking import COUNTED, LOOKING
from evoprune.demo.scenes.signs import similar_text

EVENTS = ("stays", "appears", "vanishes", "flashes", "blinks")
# Chance that a draft with this answer is asked about, so that no answer is the best guess.
STAYS, FLASHES, STILL = 0.12, 0.15, 0.15
CAMERA = ("stands still", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")


def _event(clip, rng):
    drafts = []
    for t in clip.things if clip.is_whole else ():
        event, x = t.event(clip.seconds), refer(clip, t, rng)
        if x is None or t.after or rng.random() > {"stays": STAYS, "flashes": FLASHES}.get(event, 1.0):
            continue
        text = pick(rng, f"What happens to the {x}?", f"What does the {x} do?")
        drafts.append(Draft(text, event, shuffled(rng, set(EVENTS) - {event}), (t,)))
    return drafts


def _order(clip, rng):
    drafts = []
    if not clip.is_whole:
        return drafts
    for event, verb, time_of in (
        ("appears", "appears", lambda t: t.spans[0][0]), ("vanishes", "vanishes", lambda t: t.spans[0][1]),
    ):  # fmt: skip
        found = sorted((t for t in distinct(clip) if t.event(clip.seconds) == event), key=time_of)
        if len(found) < 2:
            continue
        for which, right, rest in (("first", found[0], found[1:]), ("last", found[-1], found[:-1])):
            if min(abs(time_of(right) - time_of(t)) for t in rest) > max(
                0.12 * clip.seconds, 1.1 * clip.seconds / clip.pairs
            ):
                wrong = [*shuffled(rng, [name(t) for t in rest])[:3], *absent(clip, rng, 3)]
                drafts.append(
                    Draft(f"Which of these {verb} {which}?", name(right), tuple(wrong[:3]), (right,), open=False)
                )
    return drafts


def _way(clip, rng):
    drafts = []
    for t in clip.things:
        x = refer(clip, t, rng)
        drift = max(abs(clip.camera.dx), abs(clip.camera.dy))
        if x is None or not t.speed or drift > 0.5 * t.speed or clip.camera.kind == "zoom" or not clip.is_whole:
            continue
        if t.event(clip.seconds) in ("stays", "appears", "vanishes"):
            text = pick(rng, f"Which way does the {x} move?", f"Where does the {x} go?")
            drafts.append(Draft(text, t.motion, shuffled(rng, set(MOTIONS) - {t.motion}), (t,)))
    return drafts


def _moves(clip, rng):
    """One of four moves, or one of four does not."""
    named = [t for t in distinct(clip) if t.event(clip.seconds) == "stays"]
    if clip.camera.travels or not clip.is_whole:
        return []
    moving, still = ([t for t in named if bool(t.speed) == moves] for moves in (True, False))
    drafts = []
    for text, ones, others in (
        ("Which of these moves?", moving, still),
        ("Which of these does not move?", still, moving),
    ):
        if ones and len(others) >= 3:
            t = ones[int(rng.integers(len(ones)))]
            drafts.append(Draft(text, name(t), shuffled(rng, [name(o) for o in others])[:3], (t,), open=False))
    return drafts


def _often(clip, rng):
    drafts = []
    for t in clip.things:
        x = refer(clip, t, rng)
        if x is not None and t.event(clip.seconds) == "blinks":
            right = str(len(t.spans) - 1)
            if rng.random() > COUNTED[len(t.spans) - 2]:
                continue
            text = f"How often does the {x} disappear?"
            drafts.append(Draft(text, right, tuple(n for n in "1234" if n != right), (t,)))
    return drafts


def _turns(clip, rng):
    """What changes, and what it was before and is afterwards."""
    drafts = []
    changing = [t for t in clip.things if t.after]
    for t in changing:
        x = refer(clip, t, rng)
        if x is None:
            continue
        for when, right, other in (("start", t, t.after), ("end", replace(t, colour=t.after, text=t.after), None)):
            if t.is_sign:
                other, values = other or t.text, {similar_text(t.text, rng) for _ in range(6)}
                text = pick(rng, f"What does the {x} say at the {when}?", f"What is written on the {x} at the {when}?")
                answer = right.text
            else:
                other, values = other or t.colour, set(COLOURS)
                text, answer = f"What colour is the {x} at the {when}?", right.colour
            wrong = (other, *shuffled(rng, values - {answer, other}))
            drafts.append(Draft(text, answer, wrong, (t,)))
    shapes = [t for t in changing if not t.is_sign]
    if len(shapes) == 1:
        others = [t.outline for t in clip.shapes if t.outline != shapes[0].outline]
        alone = sum(t.outline == shapes[0].outline for t in clip.shapes) == 1
        if alone and len(set(others)) >= 3:
            wrong = shuffled(rng, others)
            drafts.append(Draft("What changes its colour?", shapes[0].outline, wrong, tuple(shapes)))
    return drafts


def _lasts(clip, rng):
    """One of four is there all the time; one of four is not."""
    if not clip.is_whole:
        return []
    named = distinct(clip)
    lasting, passing = ([t for t in named if (t.event(clip.seconds) == "stays") == stays] for stays in (True, False))
    drafts = []
    for text, ones, others in (
        ("Which of these is there all the time?", lasting, passing),
        (
            "Which of these is not there all the time?",
            [t for t in passing if t.event(clip.seconds) != "flashes"],
            lasting,
        ),
    ):
        if ones and len(others) >= 3:
            t = ones[int(rng.integers(len(ones)))]
            drafts.append(Draft(text, name(t), shuffled(rng, [name(o) for o in others])[:3], (t,), open=False))
    return drafts


def _camera(clip, rng):
    camera = clip.camera
    if not clip.is_whole:
        return []
    if camera.kind == "pan":
        right = "pans " + (
            ("right" if camera.dx > 0 else "left")
            if abs(camera.dx) > abs(camera.dy)
            else ("down" if camera.dy > 0 else "up")
        )
    elif camera.kind == "zoom":
        right = "zooms in" if camera.zoom[1] > camera.zoom[0] else "zooms out"
    elif camera.kind == "still" and rng.random() < STILL:
        right = "stands still"
    else:
        return []
    return [Draft("What does the camera do?", right, shuffled(rng, set(CAMERA) - {right}))]


def _scenes(clip, rng):
    """What is to be seen in one of two scenes."""
    if clip.is_whole:
        return []
    named = distinct(clip)
    before, after = ([t for t in named if t.visible(at)] for at in (0.0, clip.seconds * 0.999))
    drafts = []
    for text, ones, others in (
        ("Which of these is there before the cut?", before, after), ("Which of these is there after the cut?", after, before),
    ):  # fmt: skip
        if ones and others:
            t = ones[int(rng.integers(len(ones)))]
            wrong = [*shuffled(rng, [name(o) for o in others])[:3], *absent(clip, rng, 3)]
            drafts.append(Draft(text, name(t), tuple(wrong[:3]), (t,), open=False))
    return drafts


HAPPENING = {
    "event": Kind(_event, "events", 1.0),
    "order": Kind(_order, "events", 0.3),
    "often": Kind(_often, "events", 0.3),
    "turns": Kind(_turns, "events", 0.6),
    "lasts": Kind(_lasts, "events", 0.4),
    "scenes": Kind(_scenes, "events", 0.6),
    "way": Kind(_way, "motion", 1.3),
    "moves": Kind(_moves, "motion", 0.3),
    "camera": Kind(_camera, "motion", 0.9),
}
# What is asked of pictures is asked of videos too, and counts as the gist of a clip: mostly what a glance tells.
GLANCE, CLOSER = 1.8, 0.6
GIST = {kind: Kind(found.make, "gist", CLOSER * found.weight) for kind, found in LOOKING.items()}
GIST |= {kind: Kind(found.make, "gist", GLANCE * found.weight) for kind, found in CHECKED.items()}


def kinds(clip: Clip) -> dict[str, Kind]:
    """The types of questions that fit a clip of this family."""
    return LOOKING | CHECKED if clip.is_still else GIST | HAPPENING | CHECKED_OVER_TIME
