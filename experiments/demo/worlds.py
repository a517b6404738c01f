"""The worlds' common interface: create a clip from a split and a seed, ask questions about it, and write it to a file."""

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
# For scenes, the groups that occur in only one family of clips. All other groups occur in both families.
FAMILIES = {
    "picture": ("picture", "text", "look", "place", "count"),
    "video": ("video", "gist", "events", "motion", "moment"),
}


@dataclass(frozen=True)
class World:
    """A generator of synthetic clips and of questions about them."""

    name: str
    # A split for reporting, a split for tuning, and possibly a family that is never used for tuning.
    splits: tuple[str, ...]
    crf: tuple[int, int]  # lowest and highest x264 rate factor; the seed determines the factor for a clip
    make: Callable[[str, int], Any]  # makes a clip from a split and a seed
    ask: Callable[[Any, int], list[Question]]  # returns the questions about a clip, given its seed
    suffix: Callable[[Any, int], str]  # returns the file suffix of a clip at a rate factor
    write: Callable[[Any, Path, int], None]  # writes a clip to a file at a rate factor, where 0 is lossless
    # Returns whether the clip for a seed can have questions in these groups.
    may_hold: Callable[[int, Collection[str]], bool]


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
