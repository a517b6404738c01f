"""Long videos with known moments: clips of a demo world, concatenated in one file."""

import math
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from evoprune.bundled import DEMOS
from experiments.demo import clips, drawing
from experiments.demo.painting import write_frames
from experiments.demo.scenes import clip as scenes_clip
from experiments.demo.scenes import compose
from experiments.demo.scenes import drawing as scenes_drawing

HEIGHT, WIDTH = 8, 12  # frame size in units of 28 pixels
FPS = 8
FIRST_SEED = 3_550_000
JOINED_S = 8.0  # absences shorter than this do not split a moment
Span = tuple[float, float]  # start and end in seconds


def shapes_clip(seed: int) -> clips.Clip:
    return clips.make_clip("validation", seed, HEIGHT * 28, WIDTH * 28)


def shapes_shown(clip: clips.Clip) -> Iterator[tuple[str, float, float]]:
    for thing in clip.shapes:
        yield thing.name, thing.start, thing.end


def scene(seed: int) -> scenes_clip.Clip:
    key = (compose.SPLITS["validation"], seed)
    pairs = compose.draw(np.random.default_rng((7, *key)), compose.LENGTHS)
    return compose.compose(key, HEIGHT, WIDTH, pairs, float(pairs))


def scene_shown(clip: scenes_clip.Clip) -> Iterator[tuple[str, float, float]]:
    """Yield (name, start, end) for each object. An object that changes has one name before and one after. Signs are left out."""
    for thing in clip.things:
        looks = [(thing.colour, 0.0, thing.turn)]
        if thing.after:
            looks.append((thing.after, thing.turn, math.inf))
        if not thing.is_sign:
            for colour, first, last in looks:
                yield from ((f"{colour} {thing.outline}", max(a, first), min(b, last)) for a, b in thing.spans)


WORLDS = {
    "shapes": (DEMOS["demo"].tag, shapes_clip, drawing.render, shapes_shown, clips.COLOURS, clips.SHAPES),
    "scenes": (
        DEMOS["demo-scenes"].tag,
        scene,
        scenes_drawing.render,
        scene_shown,
        scenes_clip.COLOURS,
        scenes_clip.OUTLINES,
    ),
}


def write_long_video(path: Path, world: str, minutes: float) -> dict[str, list[Span]]:
    """Write a video of at least `minutes` minutes. Returns the moments at which each of the world's objects is visible."""
    tag, make, render, shown, colours, outlines = WORLDS[world]
    made = []
    spans: dict[str, list[Span]] = {f"{colour} {outline}": [] for colour in colours for outline in outlines}
    begin = 0.0
    for seed in count(FIRST_SEED):
        if begin >= 60 * minutes:
            break
        clip = make(seed)
        made.append(clip)
        for name, start, end in shown(clip):
            if max(start, 0.0) < min(end, clip.seconds):
                spans[name].append((begin + max(start, 0.0), begin + min(end, clip.seconds)))
        begin += clip.seconds
    frames = (frame for clip in made for frame in render(clip, [n / FPS for n in range(round(clip.seconds * FPS))]))
    write_frames(frames, path, (HEIGHT * 28, WIDTH * 28), FPS, crf=23, preset="veryfast", tag=tag)
    return {name: joined(found) for name, found in spans.items()}


def joined(spans: list[Span]) -> list[Span]:
    """Join moments that are less than `JOINED_S` apart."""
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start - made[-1][1] < JOINED_S:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return made
