"""Write long videos whose moments are known: clips of a world, one after the other in one file.

A file is a function of its world, split, block and number. A few names are drawn for it, each with the share of clips that show it;
the others come as they come. Clips are taken in the order of their seeds, but for those that show a name too often, and shuffled.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from evoprune.bundled import DEMO_TAG, SCENES_TAG
from experiments.demo import clips, drawing
from experiments.demo.painting import write_frames
from experiments.demo.scenes import clip as scenes_clip
from experiments.demo.scenes import compose
from experiments.demo.scenes import drawing as scenes_drawing
from experiments.demo.write import BLOCK

SIZE = (8, 12)  # of a frame, in units of 28 pixels
FPS = 8
KEYFRAME_S = 2
RATES = (0.0, 0.0, 0.025, 0.05, 0.1)  # shares of the clips of a file that show a name
JOINED_S = 8.0  # a thing that is gone for less than this is there in one moment
EVENT_S = 1.0  # the moment of an event reaches so far from its time, both ways
Span = tuple[float, float]  # start and end in seconds


@dataclass(frozen=True)
class World:
    """How clips of a world are made for long videos, and what they show.

    `make`: the clip of a split and a seed. `render`: its frames at some times. `shown`: the spans in which each name is there.
    """

    tag: str
    names: tuple[str, ...]
    make: Callable[[str, int], Any]
    render: Callable[[Any, Sequence[float]], np.ndarray]
    shown: Callable[[Any], dict[str, list[Span]]]


@dataclass(frozen=True)
class Long:
    """Hold a long video: its clips, when each begins, and its names with their shares of clips."""

    clips: tuple[Any, ...]
    starts_s: tuple[float, ...]
    rates: dict[str, float]
    seconds: float


@dataclass(frozen=True)
class Query:
    """A query and the moments that show it, in seconds; `kind` is thing, event or sign."""

    kind: str
    text: str
    moments: tuple[Span, ...]


def _within(spans: Sequence[Span], seconds: float) -> list[Span]:
    return [(max(start, 0.0), min(end, seconds)) for start, end in spans]


def _shapes_shown(clip: clips.Clip) -> dict[str, list[Span]]:
    return {thing.name: _within([(thing.start, thing.end)], clip.seconds) for thing in clip.shapes}


def _scenes_shown(clip: scenes_clip.Clip) -> dict[str, list[Span]]:
    """Return when things and signs are there; one that changes has two names, each for its part of the time."""
    found: dict[str, list[Span]] = {}
    for thing in clip.things:
        looks = [(thing.text or thing.colour, 0.0, thing.turn)]
        if thing.after:
            looks.append((thing.after, thing.turn, math.inf))
        for look, first, last in looks:
            name = f"sign {look}" if thing.is_sign else f"{look} {thing.outline}"
            spans = [(max(start, first), min(end, last)) for start, end in thing.spans]
            found.setdefault(name, []).extend(each for each in _within(spans, clip.seconds) if each[0] < each[1])
    return found


def _make_shapes(split: str, seed: int) -> clips.Clip:
    height, width = SIZE
    return clips.make_clip(split, seed, height * 28, width * 28)


def _make_scenes(split: str, seed: int) -> scenes_clip.Clip:
    key = (compose.SPLITS[split], seed)
    pairs = compose.draw(np.random.default_rng((7, *key)), compose.LENGTHS)
    return compose.compose(key, *SIZE, pairs, float(pairs))


WORLDS = {
    "shapes": World(
        DEMO_TAG,
        tuple(f"{colour} {shape}" for colour in clips.COLOURS for shape in clips.SHAPES),
        _make_shapes,
        drawing.render,
        _shapes_shown,
    ),
    "scenes": World(
        SCENES_TAG,
        tuple(f"{colour} {outline}" for colour in scenes_clip.COLOURS for outline in scenes_clip.OUTLINES),
        _make_scenes,
        scenes_drawing.render,
        _scenes_shown,
    ),
}


def make_long(world: str, split: str, block: int, number: int, minutes: float) -> Long:
    """Make the long video of a number, of at least that many minutes."""
    of = WORLDS[world]
    rng = np.random.default_rng((31, block, number))
    names = rng.choice(of.names, len(RATES), replace=False)
    rates = {str(name): rate for name, rate in zip(names, RATES, strict=True)}
    most = {name: round(rate * minutes * 60 / 7) for name, rate in rates.items()}  # of clips of about 7 s
    most = {name: max(most[name], int(rate > 0)) for name, rate in rates.items()}
    found: list[Any] = []
    seconds = 0.0
    per_name: Counter[str] = Counter()
    first = block * BLOCK + number * BLOCK // 20  # of at most 20 files of a block
    for seed in count(first):
        if seconds >= 60 * minutes:
            break
        clip = of.make(split, seed)
        shown = set(of.shown(clip)) & set(rates)
        if any(per_name[name] >= most[name] for name in shown):
            continue
        per_name.update(shown)
        found.append(clip)
        seconds += clip.seconds
    rng.shuffle(found)
    starts = np.cumsum([0.0, *(clip.seconds for clip in found)]).tolist()
    return Long(tuple(found), tuple(starts[:-1]), rates, starts[-1])


def write_long(world: str, video: Long, path: Path) -> None:
    """Writes the video, with a keyframe every `KEYFRAME_S`. Raises OSError: it cannot be written."""
    of = WORLDS[world]

    def frames() -> Iterator[np.ndarray]:
        for clip in video.clips:
            yield from of.render(clip, [n / FPS for n in range(round(clip.seconds * FPS))])

    height, width = SIZE
    settings = {"crf": 23, "preset": "veryfast", "tag": of.tag, "keyframe_s": KEYFRAME_S}
    write_frames(frames(), path, (height * 28, width * 28), FPS, **settings)


def moments_of(world: str, video: Long, name: str, gap_s: float = JOINED_S) -> tuple[Span, ...]:
    """Return the moments in which a thing, or a sign as `sign TEXT`, is there; those less than `gap_s` apart are one."""
    spans = [
        (at + start, at + end)
        for at, clip in zip(video.starts_s, video.clips, strict=True)
        for start, end in WORLDS[world].shown(clip).get(name, ())
    ]
    made: list[Span] = []
    for start, end in sorted(spans):
        if made and start - made[-1][1] < gap_s:
            made[-1] = (made[-1][0], max(end, made[-1][1]))
        else:
            made.append((start, end))
    return tuple(made)


def events_of(world: str, video: Long, name: str, event: str) -> tuple[Span, ...]:
    """Return the moments around the times at which a thing `appears` or `vanishes`, by itself or where a clip begins or ends."""
    times = [span[event == "vanishes"] for span in moments_of(world, video, name, gap_s=EVENT_S)]
    return tuple((time_s - EVENT_S, time_s + EVENT_S) for time_s in times if EVENT_S < time_s < video.seconds - EVENT_S)


def queries_of(world: str, video: Long, number: int) -> list[Query]:
    """Return what is asked of a video: its names, whether two of them appear or vanish, and of scenes two signs."""
    rng = np.random.default_rng((37, number))
    asked = [Query("thing", name, moments_of(world, video, name)) for name in video.rates]
    there = [name for name, rate in video.rates.items() if rate]
    for event in ("appears", "vanishes"):
        name = str(rng.choice(there))
        asked.append(Query("event", f"{name} {event}", events_of(world, video, name, event)))
    if world == "scenes":
        signs = sorted({f"sign {thing.text}" for clip in video.clips for thing in clip.signs})
        for name in rng.choice(signs, 2, replace=False):
            asked.append(Query("sign", str(name), moments_of(world, video, str(name))))
    return asked
