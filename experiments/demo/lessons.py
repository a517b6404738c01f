"""Lessons, which are training-only questions that ask for a single step of a harder question type.

For example, lessons ask for the position of one object to prepare for questions about the relation between two objects, and for the
time of one event to prepare for questions about the order of events. Imported by `experiments.demo.batches` and
`experiments.demo.build`; not a script.
"""

import numpy as np

from experiments.demo.clips import Clip
from experiments.demo.questions import MAKERS, WEIGHTS, Question, ask, pick, refer


def _row(clip, rng):
    still = [t for t in clip.things if t.motion == "still"]
    return [(f"Which row is the {refer(clip, t, rng)} in?", str(int(t.y // 28) + 1), t) for t in still]


def _column(clip, rng):
    still = [t for t in clip.things if t.motion == "still"]
    return [(f"Which column is the {refer(clip, t, rng)} in?", str(int(t.x // 28) + 1), t) for t in still]


def _when(clip, rng):
    made = []
    verbs = {
        "appears": ("appear", lambda t: t.start),
        "vanishes": ("vanish", lambda t: t.end),
        "flashes": ("flash", lambda t: t.start),
    }
    for t in clip.things:
        if (event := t.event(clip.seconds)) in verbs:
            verb, time_of = verbs[event]
            third = int(min(time_of(t) / clip.seconds * 3, 2))
            made.append((f"When does the {refer(clip, t, rng)} {verb}?", ("early", "midway", "late")[third], t))
    return made


def _there(clip, rng):
    made = []
    for t in clip.things:
        if (event := t.event(clip.seconds)) == "stays" and rng.random() < 0.5:
            continue
        seen = {"start": event in ("stays", "vanishes"), "end": event in ("stays", "appears")}
        when = pick(rng, "start", "end")
        text = f"Is the {refer(clip, t, rng)} there at the {when}?"
        made.append((text, "yes" if seen[when] else "no", t))
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
    for event, time_of in (("appears", lambda t: t.start), ("vanishes", lambda t: t.end)):
        things = sorted((t for t in clip.things if t.event(clip.seconds) == event), key=time_of)
        if len(things) > 1:
            made.append((f"List what {event}, in order.", _listed(things)))
    return made


LESSONS = {
    "row": _row, "column": _column, "when": _when, "there": _there,
    "list_across": _list_across, "list_down": _list_down, "list_times": _list_times,
}  # fmt: skip


def ask_all(clip: Clip, rng: np.random.Generator, count: int) -> list[Question]:
    """Ask questions about a clip as in `questions.ask`, but including lessons."""
    return ask(clip, rng, count, MAKERS | LESSONS, WEIGHTS | {"when": 1.5})
