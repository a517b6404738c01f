"""Long videos whose moments are known: clips of a demo model's world, one after the other in one file."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from evoprune.bundled import DEMO_TAG, SCENES_TAG
from experiments.demo import clips, drawing
from experiments.demo.painting import write_frames
from experiments.demo.scenes import compose
from experiments.demo.scenes import drawing as scenes_drawing

SIZE = (8, 12)  # of a frame, in units of 28 pixels
FIRST = 710_000  # number of the first clip in its split
FPS = 8


@dataclass(frozen=True)
class World:
    """How clips of a demo model's world are made and drawn, and when a thing is there."""

    tag: str
    seconds: float
    make: Callable[[int], Any]
    render: Callable[[Any, list[float]], np.ndarray]
    shown: Callable[[Any, str], list[tuple[float, float]]]


def _shape_shown(clip: clips.Clip, name: str) -> list[tuple[float, float]]:
    there = [thing for thing in clip.shapes if thing.name == name]
    return [(max(thing.start, 0.0), min(thing.end, clip.seconds)) for thing in there]


def _thing_shown(clip: Any, name: str) -> list[tuple[float, float]]:
    there = [thing for thing in clip.shapes if name in [f"{colour} {thing.outline}" for colour in thing.colours]]
    return [(max(start, 0.0), min(end, clip.seconds)) for thing in there for start, end in thing.spans]


def _make_shapes(number: int) -> clips.Clip:
    height, width = SIZE
    return clips.make_clip("validation", FIRST + number, height * 28, width * 28, 6.0, 6)


def _make_scene(number: int) -> Any:
    return compose.compose((clips.SPLITS["validation"], FIRST + number), *SIZE, pairs=8, seconds=8.0)


SHAPES = World(DEMO_TAG, 6.0, _make_shapes, drawing.render, _shape_shown)
SCENES = World(SCENES_TAG, 8.0, _make_scene, scenes_drawing.render, _thing_shown)


def write_long(path: Path, world: World, count: int) -> list[Any]:
    """Writes a video of `count` clips, with a keyframe every two seconds; returns the clips."""
    made = [world.make(number) for number in range(count)]

    def frames() -> Iterator[np.ndarray]:
        for clip in made:
            yield from world.render(clip, [n / FPS for n in range(round(world.seconds * FPS))])

    height, width = SIZE
    size = height * 28, width * 28
    write_frames(frames(), path, size, FPS, crf=20, preset="veryfast", tag=world.tag, keyframe_s=2)
    return made


def times_of(world: World, made: list[Any], name: str) -> list[tuple[float, float]]:
    """Return when a thing is there, in seconds from the beginning of the video."""
    starts = [number * world.seconds for number in range(len(made))]
    return [(at + a, at + b) for at, clip in zip(starts, made, strict=True) for a, b in world.shown(clip, name)]
