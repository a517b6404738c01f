"""Render the clips in `samples/` and their questions: `python -m experiments.demo.samples samples`.

The clips have their own split, "samples". They were chosen for variety, and so that the demo model answers their questions
correctly both without pruning and with the default settings. Therefore, its answers about these clips are not a measurement.

The clip from the second world, in `samples/scenes/`, has no questions. It was chosen by inspecting its frames and its overlay,
because its objects move at different times in front of a static camera.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from experiments.demo.clips import Clip as Shapes
from experiments.demo.clips import make_clip
from experiments.demo.drawing import write_video
from experiments.demo.questions import ask
from experiments.demo.scenes.clip import Clip
from experiments.demo.scenes.compose import SPLITS, compose
from experiments.demo.worlds import SCENES

# name -> seed, height, width, seconds, codec, and question types, each with words that the question must contain
CLIPS = {
    "square.mp4": (
        198,
        112,
        168,
        6,
        "libx264",
        [("colour", "What colour is the square?"), ("event", "What happens to the square?")],
    ),
    "three.mp4": (
        306,
        112,
        168,
        6,
        "libx264",
        [("count", "How many shapes are there?"), ("shape", "What shape is green?")],
    ),
    "vanish.webm": (
        853,
        112,
        168,
        6,
        "libvpx-vp9",
        [("event", "What happens to the circle?"), ("motion", "Which way does the green diamond move?")],
    ),
    "flash.mp4": (
        172,
        168,
        224,
        6,
        "libx264",
        [("event", "What happens to the cyan cross?"), ("which", "What vanishes?")],
    ),
    "arrivals.webm": (
        440,
        112,
        168,
        8,
        "libvpx-vp9",
        [("order", "the blue shape or the ring"), ("relation", "Is the ring above or below the circle?")],
    ),
    "pan.mp4": (98, 224, 336, 6, "libx264", [("digit", "Which digit is shown?"), ("exists", "blue cross")]),
}
SCENE_CLIPS = {"crossing.mp4": (2719, 8, 12, 6)}  # name -> seed, height and width in units, seconds


def render(folder: Path) -> None:
    """Write the clips and `questions.jsonl` into `folder`."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    for name, (seed, *_, codec, _) in CLIPS.items():
        write_video(drawn(name, seed), folder / name, codec=codec, crf=23)
    for name in SCENE_CLIPS:
        SCENES.write(scene(name), folder / "scenes" / name, 23)
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions()))


def questions() -> list[dict[str, str]]:
    """Return the `questions.jsonl` records, one per question."""
    rows = []
    for name, (seed, *_, wanted) in CLIPS.items():
        clip = drawn(name, seed)
        for kind, words in wanted:
            draws = (q for draw in range(100) for q in ask(clip, np.random.default_rng((seed, draw)), 100))
            found = next(q for q in draws if q.type == kind and words in q.question)
            rows.append({"video": name, "question": found.question, "answer": found.answer})
    return [{"id": f"{i + 1:02d}", **row} for i, row in enumerate(rows)]


def drawn(name: str, seed: int) -> Shapes:
    """Generate the clip for a file in `samples/` from its seed."""
    _, height, width, seconds, *_ = CLIPS[name]
    return make_clip("samples", seed, height, width, float(seconds), seconds)


def scene(name: str) -> Clip:
    """Generate the clip for a file in `samples/scenes/`, with one frame pair per second."""
    seed, height, width, seconds = SCENE_CLIPS[name]
    return compose((SPLITS["samples"], seed), height, width, seconds, float(seconds))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo.samples", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("samples"), help="default: %(default)s")
    render(parser.parse_args(args).folder)


if __name__ == "__main__":
    main()
