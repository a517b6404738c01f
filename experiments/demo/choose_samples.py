"""Look for sample clips that the demo model understands: `python -m experiments.demo.choose_samples three.mp4`.

A clip is judged by the model's weakest answer to what it is to be asked, with nothing pruned and at the default budget. Each
question counts in all wordings of the generator; one about two things in either order of their names. The strongest clips are
printed; `samples.py` holds the seeds that were taken.
"""

import argparse
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from evoprune import VideoQA
from evoprune.session.asking import EncodedInputs
from experiments.demo.clips import COLOURS, SHAPES, Clip
from experiments.demo.drawing import write_video
from experiments.demo.questions import MAKERS
from experiments.demo.samples import CLIPS, drawn

BUDGETS = (1.0, 0.25)
DRAWS = 40
SHOWN = 10
NAME = re.compile(rf"the ((?:(?:{'|'.join(COLOURS)}) )?(?:{'|'.join(SHAPES)}|shape))")


def _has(clip: Clip, event: str, least: int) -> bool:
    """Return whether `event` happens to at least so many shapes, without a digit and before a camera that stands still."""
    found = sum(thing.event(clip.seconds) == event for thing in clip.things)
    return found >= least and clip.things == clip.shapes and not any(clip.pan)


# What a clip must show, and the types of the questions that it must answer for.
WANTED: dict[str, tuple[Callable[[Clip], bool], tuple[str, ...]]] = {
    "three.mp4": (lambda clip: len(clip.shapes) == 3 == len(clip.things) - 1, ("count", "shape")),
    "vanish.webm": (
        lambda clip: _has(clip, "vanishes", max(2, len(clip.things))) and any(t.speed for t in clip.things),
        ("event", "motion", "count"),
    ),
    "arrivals.webm": (lambda clip: _has(clip, "appears", 2), ("order", "relation", "count")),
}


def wordings(clip: Clip, kind: str) -> list[dict[str, str]]:
    """Each question of a type in all its wordings, with the right answers."""
    found: dict[tuple, dict[str, str]] = defaultdict(dict)
    for draw in range(DRAWS):
        for text, answer, *things in MAKERS[kind](clip, np.random.default_rng((*clip.seed, draw))):
            names = NAME.findall(text) if len(things) == 2 else ()
            found[*things, *sorted(names)][text] = answer
    return list(found.values())


def lead(qa: VideoQA, video: EncodedInputs, question: str, answer: str) -> float:
    """By how much the logits of the answer's tokens lead those of the best others, at least; below 0 if the model says another."""
    loaded = qa.loaded
    ids = [*loaded.tokenizer.encode(answer), min(loaded.eos_ids)]
    logits, _ = video.read_along(question, ids)
    others = logits.clone()
    for place, token in enumerate(ids):
        others[place, token] = float("-inf")
    return min((logits[i, token] - others[i].max()).item() for i, token in enumerate(ids))


def judged(name: str, seeds: range, models: list[VideoQA]) -> Iterator[tuple[float, int]]:
    """Yield the weakest answer about each clip that shows what `name` is to show, and the clip's seed."""
    shows, kinds = WANTED[name]
    with TemporaryDirectory() as folder:
        path = Path(folder, name)
        for seed in seeds:
            clip = drawn(name, seed)
            asked = [wordings(clip, kind) for kind in kinds] if shows(clip) else [[]]
            if not all(asked):
                continue
            write_video(clip, path, codec=CLIPS[name][4], crf=23)
            leads = [partial(lead, qa, qa.encode(path)) for qa in models]
            yield min(max(min(f(*row) for f in leads for row in q.items()) for q in of) for of in asked), seed


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo.choose_samples", description=__doc__)
    parser.add_argument("name", choices=sorted(WANTED))
    parser.add_argument("--seeds", type=int, default=1000, help="how many are tried; default: %(default)s")
    given = parser.parse_args(args)
    models = [VideoQA.load("demo", device="cpu", budget=budget) for budget in BUDGETS]
    best = sorted(judged(given.name, range(given.seeds), models), reverse=True)
    sys.stdout.writelines(f"{seed}  {least:.2f}\n" for least, seed in best[:SHOWN])


if __name__ == "__main__":
    main()
