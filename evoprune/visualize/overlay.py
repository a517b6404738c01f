"""A video's frames with what became of each unit: frame pairs side by side, or frame after frame, with a title and a legend."""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from evoprune.visualize.fates import FATES, TracedVideo
from evoprune.visualize.image_files import gif, mp4, png, shared_palette
from evoprune.visualize.panel import Panels, cluster_colour, light, outline
from evoprune.visualize.text import BACKGROUND, FAINT, text_picture, wrap

MAX_PANELS = 12
MIN_WIDTH = 480  # pixels, so that text has room
GAP = 12
SHEET_RATIO = 1.6  # of width to height, about a screen's
HUES = 8  # that an eye distinguishes in outlines a few pixels wide
PALETTE_FRAMES = 4  # from which a GIF's colours are taken
MIN_SECONDS, MAX_SECONDS = 0.1, 0.5  # that a frame of a film is shown


def overlay_file(video: TracedVideo, title: str, ending: str) -> bytes:
    """The content of an overlay file.

    Args:
        video: from `fates.trace`.
        title: one or more lines at the top.
        ending: `.png` for `Overlay.sheet`, `.gif` or `.mp4` for `Overlay.frames`, at the video's own pace but between two and
            ten frames a second.
    """
    overlay = Overlay(video, title)
    if ending == ".png":
        return png(overlay.sheet())
    seconds = min(MAX_SECONDS, max(MIN_SECONDS, video.plan.sampling.seconds_per_frame))
    if ending == ".mp4":
        return mp4(overlay.frames(), seconds)
    every = math.ceil(len(video.frames) / PALETTE_FRAMES)
    return gif(overlay.frames(), seconds, shared_palette(overlay.frames(every)))


class Overlay:
    """Lays out the panels of one video under a title and above a legend."""

    def __init__(self, video: TracedVideo, title: str):
        self._video, self._title, self._panels = video, title, Panels(video)

    def sheet(self) -> Image.Image:
        """RGB picture of the first frame of each frame pair, or of twelve that are spread over the video."""
        count = self._video.plan.grid[0]
        shown = [i * count // min(count, MAX_PANELS) for i in range(min(count, MAX_PANELS))]
        frames = [pair * (len(self._video.frames) // count) for pair in shown]
        height = self._video.plan.height * self._panels.width / self._video.plan.width
        across = _columns(len(frames), self._panels.width / height)
        width = max(MIN_WIDTH, across * (self._panels.width + GAP) - GAP)
        size = _text_size(width)
        panels = self._captioned(frames, round(0.85 * size))
        rows = [_beside(panels[at : at + across]) for at in range(0, len(panels), across)]
        number = f"{len(shown)} of {count} frame pairs" if len(shown) < count else "Each frame pair"
        note = f"{number}, by its first frame. A square is a unit, which can become one token."
        above = text_picture(self._title, width, size)
        return _framed([above, *rows, text_picture(note, width, size, FAINT), *self._legend(width, size)])

    def frames(self, every: int = 1) -> Iterator[Image.Image]:
        """RGB pictures of the frames, or of every `every`-th one, all of one size."""
        width = max(MIN_WIDTH, self._panels.width)
        size = _text_size(width)
        above, legend = text_picture(self._title, width, size), self._legend(width, size)
        rows = self._caption_rows(range(len(self._video.frames)), size)
        for frame in range(0, len(self._video.frames), every):
            yield _framed([above, self._captioned_frame(frame, size, rows), *legend])

    def _captioned(self, frames: Sequence[int], size: int) -> list[Image.Image]:
        """Panels of one size."""
        rows = self._caption_rows(frames, size)
        return [self._captioned_frame(frame, size, rows) for frame in frames]

    def _captioned_frame(self, frame: int, size: int, rows: int) -> Image.Image:
        caption = text_picture(self._panels.caption(frame), self._panels.width, size, FAINT, rows)
        return _below([self._panels.draw(frame), caption], GAP // 4)

    def _caption_rows(self, frames: Sequence[int], size: int) -> int:
        return max(len(wrap(self._panels.caption(frame), self._panels.width, size)) for frame in frames)

    def _legend(self, width: int, size: int) -> list[Image.Image]:
        fates, counts = self._video.fates, self._video.fates.counts()
        again = int((fates.chosen & ~fates.encoded).sum())
        clusters = len(fates.owner[fates.all_of("merged")].unique())
        alike = f" The {clusters:,} clusters share few hues, so colours of different clusters can look alike." * (
            clusters > HUES
        )
        of_earlier = f", {again:,} of them with the row of an earlier frame pair" if again else ""
        meanings = {
            "read": f"one token of the language model each. {counts['read']:,} of {counts['units']:,} units{of_earlier}.",
            "reused": f"unchanged since an earlier frame pair, so not encoded again. {counts['reused']:,} units.",
            "merged": "averaged into the unit with a dot of the same colour, here or in another frame pair. "
            f"{counts['merged']:,} units.{alike}",
            "dropped": f"encoded, and then left out. {counts['dropped']:,} units.",
        }
        return [
            _legend_entry(name, f"{name.capitalize()}: {meaning}", width, size)
            for name, meaning in meanings.items()
            if counts[name]
        ]


def _text_size(width: int) -> int:
    """Letters that are legible where a picture of so many pixels is shown about 900 wide."""
    return max(16, round(width / 62))


def _columns(panels: int, ratio: float) -> int:
    """How many panels of that ratio of width to height go into a row: the sheet is like a screen and leaves few places empty."""

    def cost(columns: int) -> float:
        rows = -(-panels // columns)
        return abs(math.log(columns * ratio / rows / SHEET_RATIO)) + (rows * columns - panels) / panels

    return min(range(1, panels + 1), key=cost)


def _legend_entry(name: str, text: str, width: int, size: int) -> Image.Image:
    """A row of the legend: two small units, drawn as in a panel, and what they mean."""
    side = round(1.4 * size)
    fate = np.full((side, 2 * side), FATES.index(name))
    if name == "merged":
        fate[:, side:] = FATES.index("read")
    swatch = Image.fromarray(light(np.full((*fate.shape, 3), 120, np.uint8), fate))
    if name == "merged":
        for x in (0, 1):
            outline(swatch, np.zeros((1, 2), int), 0, x, side, cluster_colour(0), dot=x == 1)
    return _beside([swatch, text_picture(text, width - 2 * side - GAP, size)])


def _beside(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a row, centred vertically."""
    width, height = sum(p.width + GAP for p in pictures) - GAP, max(p.height for p in pictures)
    made, left = Image.new("RGB", (width, height), BACKGROUND), 0
    for picture in pictures:
        made.paste(picture, (left, (height - picture.height) // 2))
        left += picture.width + GAP
    return made


def _below(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a column, aligned to the left."""
    width, height = max(p.width for p in pictures), sum(p.height + gap for p in pictures) - gap
    made, top = Image.new("RGB", (width, height), BACKGROUND), 0
    for picture in pictures:
        made.paste(picture, (0, top))
        top += picture.height + gap
    return made


def _framed(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a column with a margin around it; width and height are even, as H.264 needs."""
    column = _below(pictures, GAP // 2)
    size = (column.width + 2 * GAP + column.width % 2, column.height + 2 * GAP + column.height % 2)
    made = Image.new("RGB", size, BACKGROUND)
    made.paste(column, (GAP, GAP))
    return made
