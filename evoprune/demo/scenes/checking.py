"""Questions that are answered with yes or no: whether a thing is there, where it lies, whether it moves."""

from evoprune.demo.questions import pick
from evoprune.demo.scenes.asking import Draft, Kind, absent, name, refer, referred, unhurried
from evoprune.demo.scenes.clip import Clip, Thing

# Chance that a draft with this answer is asked about, so that no answer is the best guess.
THERE, STILL = 0.3, 0.3


def times_asked(clip: Clip) -> dict[str, float]:
    """The middle of the first and of the last frame pair, as they are asked about; of a still the only one."""
    half = clip.seconds / clip.pairs / 2
    return {"": half} if clip.is_still else {" at the start": half, " at the end": clip.seconds - half}


def placed(clip: Clip, t: float) -> list[tuple[Thing, float, float]]:
    """What is there at a time and lies on the frame, with the pixel of its middle."""
    found = [(thing, *clip.on_frame(*thing.centre(t), t)) for thing in clip.things if thing.visible(t)]
    return [(thing, x, y) for thing, x, y in found if 0 <= x < clip.width and 0 <= y < clip.height]


def yes(it: bool) -> str:
    return "yes" if it else "no"


def _any(clip, rng):
    """Whether a thing is there at all."""
    named = [name(t) for t in unhurried(clip)]
    if named and clip.is_whole:
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


def _at(clip, rng):
    """Whether a thing that is there at some time is there at the start, or at the end."""
    for thing, called in referred(clip, rng):
        if thing.event(clip.seconds) not in ("stays", "blinks") or rng.random() <= THERE:
            when, t = pick(rng, *times_asked(clip).items())
            yield Draft(f"Is the {called} there{when}?", yes(thing.visible(t)), about=(thing,))


def _moves(clip, rng):
    for thing, called in referred(clip, rng) if not clip.camera.travels else ():
        if thing.speed or rng.random() < STILL:
            yield Draft(f"Does the {called} move?", yes(bool(thing.speed)), about=(thing,))


CHECKED = {"any": Kind(_any, "look", 2.0), "half": Kind(_halves, "place", 2.0)}
CHECKED_OVER_TIME = {"then": Kind(_at, "events", 0.8), "does_move": Kind(_moves, "motion", 3.0)}
