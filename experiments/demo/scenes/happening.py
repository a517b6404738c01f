"""Questions about more than one moment of a clip: events and their order, directions, counts, changes, and persistent objects."""

from experiments.demo.questions import pick
from experiments.demo.scenes.asking import Draft, QuestionType, distinct, one_of_four, referred, shuffled
from experiments.demo.scenes.clip import COLOURS, MOTIONS, Clip
from experiments.demo.scenes.looking import CHECKED, COUNTED, LOOKING, times_asked, yes
from experiments.demo.scenes.signs import similar_text

EVENTS = ("stays", "appears", "vanishes", "flashes", "blinks")
# Probability of keeping a draft with this answer, so that no answer is the best guess.
STAYS = 0.12
FLASHES = 0.15
STILL = 0.15
# the same probability for yes/no questions
THERE = 0.3
STILL_ASKED = 0.3
CAMERA = ("stands still", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")


def _event(clip, rng):
    for t, x in referred(clip, rng) if clip.is_uncut else ():
        event = t.event(clip.seconds)
        if not t.after and rng.random() <= {"stays": STAYS, "flashes": FLASHES}.get(event, 1.0):
            text = pick(rng, f"What happens to the {x}?", f"What does the {x} do?")
            yield Draft(text, event, shuffled(rng, set(EVENTS) - {event}), (t,))


def _order(clip, rng):
    apart = max(0.12 * clip.seconds, 1.1 * clip.seconds / clip.pairs)
    for edge, event in enumerate(("appears", "vanishes") if clip.is_uncut else ()):
        timed = [(t.spans[0][edge], t) for t in distinct(clip) if t.event(clip.seconds) == event]
        timed.sort(key=lambda pair: pair[0])
        if len(timed) < 2:
            continue
        for which, (when, right), rest in (("first", timed[0], timed[1:]), ("last", timed[-1], timed[:-1])):
            if min(abs(when - other) for other, _ in rest) > apart:
                text = f"Which of these {event} {which}?"
                yield from one_of_four(clip, rng, text, [right], [t for _, t in rest], fill=True)


def _way(clip, rng):
    drift = max(abs(clip.camera.dx), abs(clip.camera.dy))
    for t, x in referred(clip, rng):
        if not t.speed or drift > 0.5 * t.speed or clip.camera.motion == "zoom" or not clip.is_uncut:
            continue
        if t.event(clip.seconds) in ("stays", "appears", "vanishes"):
            text = pick(rng, f"Which way does the {x} move?", f"Where does the {x} go?")
            yield Draft(text, t.motion, shuffled(rng, set(MOTIONS) - {t.motion}), (t,))


def _moves(clip, rng):
    """Ask which of four objects moves, and which of four does not."""
    if not clip.camera.travels and clip.is_uncut:
        named = [t for t in distinct(clip) if t.event(clip.seconds) == "stays"]
        moving = [t for t in named if t.speed]
        still = [t for t in named if not t.speed]
        yield from one_of_four(clip, rng, "Which of these moves?", moving, still)
        yield from one_of_four(clip, rng, "Which of these does not move?", still, moving)


def _often(clip, rng):
    for t, x in referred(clip, rng):
        gaps = len(t.spans) - 1
        if gaps and rng.random() <= COUNTED[gaps - 1]:
            wrong = tuple(n for n in "1234" if n != str(gaps))
            yield Draft(f"How often does the {x} disappear?", str(gaps), wrong, (t,))


def _turns(clip, rng):
    """Ask how an object or sign looks before and after it changes, and which object changes."""
    changing = [t for t in clip.things if t.after]
    for t, x in referred(clip, rng, changing):
        for when, answer in (("start", t.text or t.colour), ("end", t.after)):
            other = t.after if when == "start" else t.text or t.colour
            if t.is_sign:
                values = {similar_text(t.text, rng) for _ in range(6)}
                text = pick(rng, f"What does the {x} say at the {when}?", f"What is written on the {x} at the {when}?")
            else:
                values = set(COLOURS)
                text = f"What colour is the {x} at the {when}?"
            yield Draft(text, answer, (other, *shuffled(rng, values - {answer, other})), (t,))
    shapes = [t for t in changing if not t.is_sign]
    if len(shapes) == 1:
        others = [t.outline for t in clip.shapes if t.outline != shapes[0].outline]
        if len(others) == len(clip.shapes) - 1 and len(set(others)) >= 3:
            yield Draft("What changes its colour?", shapes[0].outline, shuffled(rng, others), tuple(shapes))


def _lasts(clip, rng):
    """Ask which of four objects is visible all the time, and which is not."""
    if clip.is_uncut:
        events = [(t.event(clip.seconds), t) for t in distinct(clip)]
        lasting = [t for event, t in events if event == "stays"]
        passing = [t for event, t in events if event != "stays"]
        yield from one_of_four(clip, rng, "Which of these is there all the time?", lasting, passing)
        told = [t for event, t in events if event not in ("stays", "flashes")]
        yield from one_of_four(clip, rng, "Which of these is not there all the time?", told, lasting)


def _camera(clip, rng):
    camera = clip.camera
    right = ""
    if not clip.is_uncut:
        return
    if camera.motion == "pan":
        across, along = "right" if camera.dx > 0 else "left", "down" if camera.dy > 0 else "up"
        right = f"pans {across if abs(camera.dx) > abs(camera.dy) else along}"
    elif camera.motion == "zoom":
        right = "zooms in" if camera.zoom[1] > camera.zoom[0] else "zooms out"
    elif camera.motion == "still" and rng.random() < STILL:
        right = "stands still"
    if right:
        yield Draft("What does the camera do?", right, shuffled(rng, set(CAMERA) - {right}))


def _scenes(clip, rng):
    """Ask what is visible before or after the cut."""
    if not clip.is_uncut:
        before, after = ([t for t in distinct(clip) if t.visible(at)] for at in (0.0, clip.seconds * 0.999))
        yield from one_of_four(clip, rng, "Which of these is there before the cut?", before, after, fill=True)
        yield from one_of_four(clip, rng, "Which of these is there after the cut?", after, before, fill=True)


def _at(clip, rng):
    """Ask whether an object is visible at the start or at the end."""
    for thing, called in referred(clip, rng):
        if thing.event(clip.seconds) not in ("stays", "blinks") or rng.random() <= THERE:
            when, t = pick(rng, *times_asked(clip).items())
            yield Draft(f"Is the {called} there{when}?", yes(thing.visible(t)), about=(thing,))


def _does_move(clip, rng):
    for thing, called in referred(clip, rng) if not clip.camera.travels else ():
        if thing.speed or rng.random() < STILL_ASKED:
            yield Draft(f"Does the {called} move?", yes(bool(thing.speed)), about=(thing,))


HAPPENING = {
    "event": QuestionType(_event, "events", 1.0), "order": QuestionType(_order, "events", 0.3),
    "often": QuestionType(_often, "events", 0.3), "turns": QuestionType(_turns, "events", 0.6),
    "lasts": QuestionType(_lasts, "events", 0.4), "scenes": QuestionType(_scenes, "events", 0.6),
    "way": QuestionType(_way, "motion", 1.3), "moves": QuestionType(_moves, "motion", 0.3),
    "camera": QuestionType(_camera, "motion", 0.9),
}  # fmt: skip
CHECKED_OVER_TIME = {"then": QuestionType(_at, "events", 0.8), "does_move": QuestionType(_does_move, "motion", 3.0)}
# Videos also get the image questions, which mostly ask about objects that can be seen at a glance.
GLANCE = 1.8
CLOSER = 0.6
GIST = {name: QuestionType(found.make, "gist", CLOSER * found.weight) for name, found in LOOKING.items()}
GIST |= {name: QuestionType(found.make, "gist", GLANCE * found.weight) for name, found in CHECKED.items()}


def types_for(clip: Clip) -> dict[str, QuestionType]:
    """Return the question types for a clip's family."""
    return LOOKING | CHECKED if clip.is_still else GIST | HAPPENING | CHECKED_OVER_TIME
