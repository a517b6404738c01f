"""Renders the clips in `samples/` and their questions: `python -m experiments.demo.samples samples`.

They come from seeds of their own (split "samples"), and were chosen for their variety before any model had seen them. The clip of
the second world, in `samples/scenes/`, has no questions. It was chosen by its frames and its overlay, for things that move at
different times before a camera that stands still.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from evoprune.demo.clips import make_clip
from evoprune.demo.drawing import write_video
from evoprune.demo.questions import ask
from evoprune.demo.scenes.clip import Clip
from evoprune.demo.scenes.compose import SPLITS, compose
from evoprune.demo.worlds import SCENES

# name: seed, height, width, seconds, codec, types of the questions and a word each must hold
CLIPS = {
    "square.mp4": (
        198,
        112,
        168,
        6,
        "libx264",
        [("colour", "What colour is the square?"), ("digit", "What digit is it?")],
    ),
    "three.mp4": (89, 112, 168, 6, "libx264", [("count", "How many shapes are there?"), ("shape", "yellow")]),
    "vanish.webm": (27, 112, 168, 6, "libvpx-vp9", [("event", "triangle"), ("motion", "red square")]),
    "flash.mp4": (172, 168, 224, 6, "libx264", [("which", "flashes"), ("exists", "red triangle")]),
    "arrivals.webm": (7, 112, 168, 8, "libvpx-vp9", [("order", "cross"), ("relation", "ring")]),
    "pan.mp4": (98, 224, 336, 6, "libx264", [("digit", "Which digit is shown?"), ("which", "What vanishes?")]),
}
SCENE_CLIPS = {"crossing.mp4": (2719, 8, 12, 6)}  # name: seed, height and width in units, seconds


def render(folder: Path) -> None:
    """Writes the clips and `questions.jsonl` into `folder`."""
    (folder / "scenes").mkdir(parents=True, exist_ok=True)
    rows = []
    for name, (seed, height, width, seconds, codec, wanted) in CLIPS.items():
        clip = make_clip("samples", seed, height, width, float(seconds), seconds)
        write_video(clip, folder / name, codec=codec, crf=23)
        for kind, word in wanted:
            draws = (q for draw in range(100) for q in ask(clip, np.random.default_rng((seed, draw)), 100))
            found = next(q for q in draws if q.type == kind and word in q.question)
            rows.append({"video": name, "question": found.question, "answer": found.answer})
    for name in SCENE_CLIPS:
        SCENES.write(scene(name), folder / "scenes" / name, 23)
    lines = [json.dumps({"id": f"{i + 1:02d}", **row}) + "\n" for i, row in enumerate(rows)]
    (folder / "questions.jsonl").write_text("".join(lines))


def scene(name: str) -> Clip:
    """The clip of a file in `samples/scenes/`, a frame pair a second."""
    seed, height, width, seconds = SCENE_CLIPS[name]
    return compose((SPLITS["samples"], seed), height, width, seconds, float(seconds))


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m experiments.demo.samples", description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("samples"), help="default: %(default)s")
    render(parser.parse_args(args).folder)


if __name__ == "__main__":
    main()
