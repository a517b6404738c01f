"""Common interface of the worlds: make a clip from a split and a seed, ask questions about it, and write it to a file."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.demo import clips, drawing, questions
from experiments.demo.painting import LOSSLESS
from experiments.demo.questions import Question
from experiments.demo.scenes import asking, compose
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.scenes.happening import types_for

QUESTIONS = 6  # number of questions per clip
# In scenes, the groups that occur in only one family of clips. All other groups occur in both families.
FAMILIES = {
    "picture": ("picture", "text", "look", "place", "count"),
    "video": ("video", "gist", "events", "motion", "moment"),
}


@dataclass(frozen=True)
class World:
    """A generator of synthetic clips and of questions about them."""

    name: str
    splits: tuple[str, ...]  # a split to report on, a split to tune on, and possibly a family that is never tuned on
    crf: tuple[int, int]  # lowest and highest x264 rate factor; the seed determines which one is used
    make: Callable[[str, int], Any]  # makes a clip from a split and a seed
    ask: Callable[[Any, int], list[Question]]  # returns the questions about a clip, given its seed
    suffix: Callable[[Any, int], str]  # returns the suffix of a clip's file at a rate factor
    write: Callable[[Any, Path, int], None]  # writes a clip's file at a rate factor, where 0 is lossless
    may_hold: Callable[[int, Collection[str]], bool]  # returns whether a seed's clip can have questions in these groups


SHAPES = World(
    "shapes",
    ("heldout", "validation", "portrait"),
    (18, 28),
    clips.make_clip,
    lambda clip, seed: questions.ask(clip, np.random.default_rng(seed), QUESTIONS),
    lambda clip, crf: ".mp4",
    lambda clip, path, crf: drawing.write_video(clip, path, crf=crf, preset="veryfast"),
    lambda seed, wanted: True,
)
SCENES = World(
    "scenes",
    ("heldout", "validation"),
    (scenes_drawing.FINEST, 33),
    compose.make_clip,
    lambda clip, seed: asking.ask(clip, np.random.default_rng((17, seed)), QUESTIONS, types_for(clip)),
    lambda clip, crf: (".png" if crf == LOSSLESS else ".jpg") if clip.is_still else ".mp4",
    scenes_drawing.write_file,
    lambda seed, wanted: not set(wanted) <= set(FAMILIES["video" if compose.family(seed) == "picture" else "picture"]),
)
WORLDS = {world.name: world for world in (SHAPES, SCENES)}
