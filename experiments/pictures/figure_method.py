"""Draw a figure of an actual `evoprune` run on one clip with at most eight frame pairs. Imported by
`experiments.pictures.examples`.

Three strips of frame pairs show the input units, the encoded units, and the selected units with their cluster sizes. Below these
strips, bars show how many rows each tower layer computes, compared with a method that prunes after the encoder.
"""

import base64
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from evoprune import VideoQA
from evoprune.bench import TracedVideo
from experiments.svg import COLOURS, EDGE, INK, SOFT, document, text

CLIP = "samples/flash.mp4"
BUDGET = 0.1
WIDTH = 830
HEIGHT = 690
OURS = COLOURS[0]
OTHERS = COLOURS[1]
REUSED = "#CFE3F1"
STRIPS, PITCH, GAP = 78, 138, 10  # in pixels: top of the first strip, distance between strips, gap between frames
# Baseline position of the layer bars, and height of a bar that represents all units.
BARS = 644
TALL = 84
GRID = "#E4E4E4"


@dataclass(frozen=True)
class Run:
    """A run to draw.

    Attributes:
        name: The clip name.
        budget: The fraction of units kept.
        video: The frames and the unit fates.
        layers: The number of rows computed by each tower layer, which is lower after the second selection.
        live_share: The mean of `layers`, as a fraction of the number of units.
    """

    name: str
    budget: float
    video: TracedVideo
    layers: tuple[int, ...]
    live_share: float

    @property
    def sizes(self) -> torch.Tensor:
        """Cluster sizes, int64 `[N]`: for a selected unit, the number of units that its row represents; for all other units, 0."""
        fates = self.video.fates
        return torch.bincount(fates.owner[fates.owner >= 0], minlength=len(fates.owner)) * fates.chosen

    @property
    def first_layers(self) -> int:
        """Number of layers before the second selection."""
        return next((n for n, rows in enumerate(self.layers) if rows < self.layers[0]), len(self.layers))


def measure(clip: str, budget: float) -> Run:
    """Encode a clip with the demo model.

    Raises:
        EvopruneError: From `VideoQA`.
    """
    qa = VideoQA.load("demo", budget=budget)
    report = qa.encode(clip).report.pruning
    video = TracedVideo.trace(qa.session, clip)
    layers = tuple(rows for _, rows in report.layers)
    return Run(os.path.basename(clip), budget, video, layers, report.encoder_live_share)


def figure(run: Run) -> str:
    """Return the figure as an SVG document."""
    n, (pairs, height, width) = run.video.fates.counts(), run.video.plan.grid
    changed = n["encoded"]
    before = run.first_layers
    total = len(run.layers)
    layer = "layer 1" if before == 1 else f"layer {before}"
    strips = (
        (
            "1  Frames, cut into units",
            f"{pairs} frame pairs of {height}x{width} units of 28x28 pixels: {n['units']} units. "
            "Without pruning each becomes a token.",
        ),
        (
            "2  Reuse in time",
            f"{n['units'] - changed} units (pale) look as when they were last encoded and are not encoded again. "
            f"{changed} have changed.",
        ),
        (
            f"3  Three selections: before the tower, after {layer} of {total}, and after the tower",
            f"{run.layers[0]} rows enter, {run.layers[-1]} go on and {n['read']} become tokens: the farthest in features and "
            "time, as means of clusters (number: units).",
        ),
    )
    elements = [
        text(EDGE, 34, "evoprune prunes while the vision encoder runs", size=18, weight=600),
        text(EDGE, 56, f"{run.name} at -b {run.budget:g} with the demo model: counts of a real run", fill=SOFT),
        *_definitions(run.video),
    ]
    for number, (heading, words) in enumerate(strips):
        top = STRIPS + PITCH * number
        elements += [text(EDGE, top + 10, heading, size=14, weight=600), text(EDGE, top + 28, words, size=11.5)]
    elements += [*_units(run, 0), *_units(run, 1), *_units(run, 2), *_towers(run)]
    return document("How evoprune prunes visual tokens inside the vision encoder", WIDTH, HEIGHT, elements)


def _panel(video: TracedVideo) -> tuple[float, float]:
    """Return a frame's width and height in the figure, in pixels."""
    pairs = video.plan.grid[0]
    width = (WIDTH - 2 * EDGE - GAP * (pairs - 1)) / pairs
    return width, width * video.plan.height / video.plan.width


def _definitions(video: TracedVideo) -> Iterator[str]:
    """Yield SVG definitions of each frame pair's first frame, so that it is stored only once for all three strips."""
    (width, height), step = _panel(video), len(video.frames) // video.plan.grid[0]
    yield "<defs>"
    for pair in range(video.plan.grid[0]):
        file = io.BytesIO()
        Image.fromarray(video.frames[pair * step].numpy()).save(file, "JPEG", quality=85)
        data = base64.b64encode(file.getvalue()).decode()
        size = f'width="{width:.2f}" height="{height:.2f}"'
        yield f'<image id="pair{pair}" {size} preserveAspectRatio="none" href="data:image/jpeg;base64,{data}"/>'
    yield "</defs>"


def _units(run: Run, strip: int) -> Iterator[str]:
    """Yield a strip of frame pairs. Strip 0 shows all units, strip 1 the encoded units, and strip 2 the selected units."""
    (width, height), fates = _panel(run.video), run.video.fates
    pairs, rows, columns = run.video.plan.grid
    side = width / columns
    top = STRIPS + PITCH * strip + 38
    shown = (torch.ones_like(fates.chosen), fates.encoded, fates.chosen)[strip].view(pairs, rows, columns)
    sizes = run.sizes.view(pairs, rows, columns)
    for pair in range(pairs):
        left = EDGE + pair * (width + GAP)
        yield f'<use href="#pair{pair}" x="{left:.2f}" y="{top}"/>'
        for y, x in np.ndindex(rows, columns):
            place = f'x="{left + x * side:.2f}" y="{top + y * side:.2f}" width="{side:.2f}" height="{side:.2f}"'
            if not shown[pair, y, x]:
                yield f'<rect {place} fill="{REUSED if strip == 1 else "#F4F4F4"}" fill-opacity="0.86"/>'
        grid = "".join(f"M{left + x * side:.2f} {top}v{height:.2f}" for x in range(columns + 1))
        grid += "".join(f"M{left:.2f} {top + y * side:.2f}h{width:.2f}" for y in range(rows + 1))
        yield f'<path d="{grid}" stroke="#FFFFFF" stroke-opacity="0.55" stroke-width="0.8" fill="none"/>'
        for y, x in np.ndindex(rows, columns) if strip else ():
            if shown[pair, y, x]:
                yield from _marked(left + x * side, top + y * side, side, int(sizes[pair, y, x]) if strip == 2 else 0)


def _marked(x: float, y: float, side: float, size: int) -> Iterator[str]:
    """Yield a unit's outline and, if greater than 1, its cluster size."""
    place = f'x="{x + 0.75:.2f}" y="{y + 0.75:.2f}" width="{side - 1.5:.2f}" height="{side - 1.5:.2f}"'
    yield f'<rect {place} fill="none" stroke="{OURS}" stroke-width="1.5"/>'
    if size > 1:
        middle = x + side / 2, y + side / 2
        wide = 10 + 6.5 * (size > 9) + 6.5 * (size > 99)
        yield (
            f'<rect x="{middle[0] - wide / 2:.2f}" y="{middle[1] - 6.5:.2f}" width="{wide:g}" height="13" rx="3"'
            ' fill="#FFFFFF" fill-opacity="0.88"/>'
        )
        yield text(middle[0], middle[1] + 4, str(size), "middle", size=11, weight=600)


def _towers(run: Run) -> Iterator[str]:
    """Yield the layer bars and the language model box, for this run and for a method that prunes after the encoder."""
    n = run.video.fates.counts()
    total = len(run.layers)
    before = run.first_layers
    top = STRIPS + 3 * PITCH + 6
    yield f'<path d="M{EDGE} {top - 12}H{WIDTH - EDGE}" stroke="{GRID}"/>'
    yield text(EDGE, top + 12, "4  Few rows go on", size=14, weight=600)
    yield text(EDGE, top + 30, "rows in each layer of the tower; grey: no row", size=11.5, fill=SOFT)
    end = EDGE + total * 30
    yield from _bars(EDGE, 25, 30, run.layers, n["units"], OURS)
    first = f"layers 1 to {before}" if before > 1 else "layer 1"
    rest = f"layers {before + 1} to {total}"
    for x, words in ((EDGE, first), (EDGE + 30 * before + 36, rest)):
        yield text(x, BARS + 16, words, size=11)
    yield text(EDGE, BARS + 32, f"live share {run.live_share:.2f}", size=11, fill=OURS, weight=600)
    yield from _arrow(end + 2, end + 22)
    yield from _model(
        end + 28, 182, [f"{n['read']} tokens + question", "attention to a token:", "+ 0.5 log(cluster size)"]
    )

    left = 536
    yield f'<path d="M{left - 22} {top + 2}V{HEIGHT - 18}" stroke="{GRID}"/>'
    yield text(left, top + 12, "Usual: prune after the encoder", size=12.5, weight=600)
    yield text(left, top + 30, "every unit goes through every layer", size=11.5, fill=SOFT)
    yield from _bars(left, 9, 12, (n["units"],) * total, n["units"], OTHERS)
    end = left + 12 * total
    yield text(left, BARS + 16, f"layers 1 to {total}", size=11)
    yield text(left, BARS + 32, "live share 1.00", size=11, fill=OTHERS, weight=600)
    yield from _arrow(end + 2, end + 20)
    yield from _model(end + 25, WIDTH - EDGE - end - 25, [f"prune: {n['read']}", "tokens + question"])


def _bars(left: float, wide: float, step: float, rows: Sequence[int], units: int, colour: str) -> Iterator[str]:
    """Yield a bar for each layer, proportional to its row count, in front of a pale bar that represents all units.

    The row count is written next to the first layer and next to each layer where it changes.
    """
    for number, count in enumerate(rows):
        x = left + number * step
        tall = TALL * count / units
        yield f'<rect x="{x:.1f}" y="{BARS - TALL}" width="{wide}" height="{TALL}" fill="#EFEFEF"/>'
        yield f'<rect x="{x:.1f}" y="{BARS - tall:.1f}" width="{wide}" height="{tall:.1f}" fill="{colour}"/>'
        if number == 0 or count != rows[number - 1]:
            yield text(x, BARS - tall - 4, str(count), size=11.5, weight=600)


def _arrow(left: float, right: float) -> Iterator[str]:
    y = BARS - TALL / 2
    yield f'<path d="M{left:.1f} {y}H{right:.1f}m-5 -4l5 4l-5 4" stroke="{INK}" stroke-width="1.4" fill="none"/>'


def _model(left: float, width: float, lines: Sequence[str]) -> Iterator[str]:
    """Yield a box that represents the language model and contains lines of text."""
    tall = 26 + 17 * len(lines)
    top = BARS - TALL / 2 - tall / 2
    yield f'<rect x="{left:.1f}" y="{top:.1f}" width="{width:.1f}" height="{tall}" rx="6" fill="#F3F6F9" stroke="#B8C4CE"/>'
    yield text(left + width / 2, top + 17, "language model", "middle", size=12.5, weight=600)
    for number, line in enumerate(lines):
        yield text(left + width / 2, top + 35 + 17 * number, line, "middle", size=11.5)
