"""A video's frames with what became of each unit: frame pairs side by side, or frame after frame, with a title and a legend."""

import math
from collections.abc import Iterator, Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from evoprune.overlay.fates import FATES, TracedVideo
from evoprune.overlay.image_files import gif, mp4, png, shared_palette
from evoprune.overlay.panel import Panels, cluster_colour, light, outline
from evoprune.text import counted

BACKGROUND, INK, FAINT = (18, 18, 22), (235, 235, 240), (160, 160, 170)
MAX_PANELS = 12
MIN_WIDTH = 480  # pixels, so that text has room
GAP = 12
SHEET_RATIO = 1.6  # of width to height, about a screen's
HUES = 8  # that an eye distinguishes in outlines a few pixels wide
PALETTE_FRAMES = 4  # from which a GIF's colours are taken
MIN_SECONDS, MAX_SECONDS = 0.1, 0.5  # that a frame of a film is shown


def overlay_file(video: TracedVideo, title: str, ending: str) -> bytes:
    """`.png` is `Overlay.sheet`; `.gif` and `.mp4` are `Overlay.frames`, at the video's pace but two to ten frames a second."""
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
        count, panels = self._video.plan.grid[0], self._panels
        shown = [i * count // min(count, MAX_PANELS) for i in range(min(count, MAX_PANELS))]
        height = self._video.plan.height * panels.width / self._video.plan.width
        across = _columns(len(shown), panels.width / height)
        width = max(MIN_WIDTH, across * (panels.width + GAP) - GAP)
        size = _text_size(width)
        drawn = list(self._captioned([pair * (len(self._video.frames) // count) for pair in shown], round(0.85 * size)))
        rows = [_joined(drawn[at : at + across], GAP, across=True) for at in range(0, len(drawn), across)]
        number = f"{len(shown)} of {count} frame pairs" if len(shown) < count else "Each frame pair"
        note = f"{number}, by its first frame. A square is a unit, which can become one token."
        above = text_picture(self._title, width, size)
        return _framed([above, *rows, text_picture(note, width, size, FAINT), *self._legend(width, size)])

    def frames(self, every: int = 1) -> Iterator[Image.Image]:
        """RGB pictures of the frames, or of every `every`-th one, all of one size."""
        width = max(MIN_WIDTH, self._panels.width)
        size = _text_size(width)
        above, legend = text_picture(self._title, width, size), self._legend(width, size)
        for drawn in self._captioned(range(len(self._video.frames)), size, every):
            yield _framed([above, drawn, *legend])

    def _captioned(self, frames: Sequence[int], size: int, every: int = 1) -> Iterator[Image.Image]:
        """Panels, or every `every`-th one, with as much room for their captions as the longest of all takes."""
        width = self._panels.width
        captions = {frame: self._panels.caption(frame) for frame in frames}
        rows = max(len(wrap(caption, width, size)) for caption in captions.values())
        for frame in frames[::every]:
            caption = text_picture(captions[frame], width, size, FAINT, rows)
            yield _joined([self._panels.draw(frame), caption], GAP // 4)

    def _legend(self, width: int, size: int) -> list[Image.Image]:
        fates, counts = self._video.fates, self._video.fates.counts()
        again = int((fates.chosen & ~fates.encoded).sum())
        clusters = len(fates.owner[fates.all_of("merged")].unique())
        alike = f" The {clusters:,} clusters share few hues, so colours of different clusters can look alike."
        alike = alike if clusters > HUES else ""
        of_earlier = f", {again:,} of them with the row of an earlier frame pair" if again else ""
        meanings = {
            "read": f"one token of the language model each. {counts['read']:,} of {counts['units']:,} units{of_earlier}.",
            "reused": f"unchanged since an earlier frame pair, so not encoded again. {counted(counts['reused'], 'unit')}.",
            "merged": "averaged into the unit with a dot of the same colour, here or in another frame pair. "
            f"{counted(counts['merged'], 'unit')}.{alike}",
            "dropped": f"encoded, and then left out. {counted(counts['dropped'], 'unit')}.",
        }
        return [
            _legend_entry(name, f"{name.capitalize()}: {meaning}", width, size)
            for name, meaning in meanings.items()
            if counts[name]
        ]


def _text_size(width: int) -> int:
    """Letters that are legible where a picture of so many pixels is displayed about 900 wide."""
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
    return _joined([swatch, text_picture(text, width - 2 * side - GAP, size)], GAP, across=True)


def _joined(pictures: Sequence[Image.Image], gap: int, across: bool = False) -> Image.Image:
    """Pictures in a column, aligned to the left; or in a row, centred vertically."""
    sizes = [picture.size[::-1] if across else picture.size for picture in pictures]
    wide, length = max(size[0] for size in sizes), sum(size[1] + gap for size in sizes) - gap
    made, at = Image.new("RGB", (length, wide) if across else (wide, length), BACKGROUND), 0
    for picture, size in zip(pictures, sizes, strict=True):
        made.paste(picture, (at, (wide - size[0]) // 2) if across else (0, at))
        at += size[1] + gap
    return made


def _framed(pictures: Sequence[Image.Image]) -> Image.Image:
    """Pictures in a column with a margin around it; width and height are even, as H.264 needs."""
    column = _joined(pictures, GAP // 2)
    return ImageOps.expand(column, (GAP, GAP, GAP + column.width % 2, GAP + column.height % 2), BACKGROUND)


def text_picture(text: str, width: int, size: int, colour: tuple[int, int, int] = INK, rows: int = 1) -> Image.Image:
    """RGB picture of a text that is wrapped to a width in pixels; it has room for at least so many rows.

    The font comes with Pillow: it has ASCII letters, and any other character is drawn as a box.
    """
    lines, height = wrap(text, width, size), round(1.3 * size)
    picture = Image.new("RGB", (width, height * max(rows, len(lines))), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((0, row * height), line, colour, _font(size))
    return picture


def wrap(text: str, width: int, size: int) -> list[str]:
    """The rows of a text, none wider than so many pixels. A word that is wider than a row is broken."""
    rows, long = [""], _font(size).getlength
    for word in text.split():
        while long(word) > width and len(word) > 1:
            fits = max(n for n in range(1, len(word)) if n == 1 or long(word[:n]) <= width)
            rows.append(word[:fits])
            word = word[fits:]
        if long(longer := f"{rows[-1]} {word}".lstrip()) <= width:
            rows[-1] = longer
        else:
            rows.append(word)
    return [row for row in rows if row]


@cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)
