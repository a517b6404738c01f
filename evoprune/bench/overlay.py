"""Overlays, which show a video's frames and mark each unit as read, reused, merged, or dropped.

`TracedVideo.trace` encodes a video and keeps its frames, and `TracedVideo.draw` creates an image or video file from them. `Overlay`
draws the frame pairs side by side, or the frames in sequence, with a title and a legend.

Units that are read keep their colors but are slightly brighter. All other units are darker, with a blue tint for reused units and
an orange tint for merged units. If a unit was merged into another unit in the same frame pair, a line leads to a dot on the other
unit. If it was merged into a unit in a different frame pair, an arrow points toward that pair.
"""

import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from importlib.resources import files
from typing import Any, ClassVar, Self

import av
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo

from evoprune.errors import UsageError
from evoprune.methods import PruneConfig, arange_on
from evoprune.session import Session, open_inputs
from evoprune.util import counted
from evoprune.video import FrameChunk, Plan, SamplingOptions
from evoprune.vision import TowerOutput, encode_rows, resize

BACKGROUND = (18, 18, 22)
INK = (235, 235, 240)
FAINT = (160, 160, 170)
MAX_PANELS = 12
MIN_WIDTH = 480  # minimum width in pixels, to leave room for text
GAP = 12


@dataclass(frozen=True)
class Fates:
    """The fate of each of a video's N units, which describes what pruning did to the unit.

    Units are numbered by frame pair, in raster order within each pair. A unit's fate is the first of these that applies:

    - *read*: the language model reads a token at the unit's position. - *reused*: the unit was not encoded, because it has not
      changed since an earlier frame pair.
    - *merged*: the unit's row was merged into the row of another unit.
    - *dropped*: none of the above.

    Attributes:
        chosen: bool `[N]`, True if the language model reads a token at the unit's place.
        source: int64 `[N]`, the unit whose pixels represent this unit: the unit itself, or a unit at the same position in an
            earlier frame pair.
        owner: int64 `[N]`, the unit whose row or token represents this unit after pruning, or -1 if there isn't one.
        rows: The number of rows returned by the encoder.
    """

    # The fates in order of precedence.
    NAMES: ClassVar[tuple[str, ...]] = (
        "read",
        "reused",
        "merged",
        "dropped",
    )

    grid: tuple[int, int, int]
    chosen: torch.Tensor
    source: torch.Tensor
    owner: torch.Tensor
    rows: int

    @staticmethod
    def check(pruning: PruneConfig, why: str = "an overlay has no question") -> None:
        """Check that the units' fates don't depend on the question.

        Args:
            why: The reason why they must not, for the error message.

        Raises:
            UsageError: If the method reads the question or acts only inside the language model.
        """
        if pruning.method.reads_question:
            what, instead = pruning.method.refusals
            raise UsageError(f"{what}, and {why}", f"use {instead}")
        if pruning.method.acts == "language":
            hint = "use a method that acts before the language model; in a combination, only its effect is drawn"
            raise UsageError(f"method {pruning.name} drops tokens based on the question, and {why}", hint)

    @classmethod
    @torch.inference_mode()
    def of(cls, video: TowerOutput) -> Self:
        """Determine the fates of an encoded video's units. The pruning method must not depend on the question."""
        row = video.selector_input.unit_to_row.cpu()
        selection = video.token_selection()
        owner = torch.where(row >= 0, video.rows.unit.cpu()[row.clamp(min=0)], -1)
        kept = selection.kept.cpu()
        if selection.unit_to_token is not None:  # otherwise, show how units were merged inside the encoder
            into = selection.unit_to_token.cpu()
            owner = torch.where(into >= 0, kept[into.clamp(min=0)], -1)
        chosen = torch.zeros(len(row), dtype=torch.bool, device=row.device)
        chosen[kept] = True
        _, height, width = video.plan.grid
        source = (video.source.cpu() * height * width + arange_on(height * width, "cpu")).flatten()
        return cls(video.plan.grid, chosen, source, owner, len(video.rows.unit))

    @property
    def encoded(self) -> torch.Tensor:
        """Whether each unit was encoded, bool `[N]`. Unencoded units are represented by an earlier frame pair.

        The language model may still read such a unit.
        """
        return self.source == arange_on(len(self.source), self.source.device)

    @property
    def fate(self) -> torch.Tensor:
        """Each unit's fate as an index into `NAMES`, int64 `[N]`."""
        moved = (self.owner >= 0) & (self.owner != arange_on(len(self.owner), self.owner.device))
        applies = torch.stack([self.chosen, ~self.encoded, moved, torch.ones_like(moved)])
        return applies.int().argmax(0)

    def all_of(self, name: str) -> torch.Tensor:
        return self.fate == self.NAMES.index(name)

    def counts(self) -> dict[str, int]:
        sums = {name: int(self.all_of(name).sum()) for name in self.NAMES}
        return {"units": len(self.owner), **sums, "encoded": int(self.encoded.sum()), "rows": self.rows}

    def record(self, pairs: Sequence[int] | None = None, lines: bool = True) -> dict[str, Any]:
        """Return the fates as JSON data for `drawing.js`, for all frame pairs or only those in `pairs`.

        In the result, `units` contains a string for each of these pairs, with one digit per unit in raster order. Each digit is an
        index into `fates`. `merged` contains a list of merges for each pair, in which each merged unit is followed by the unit it
        was merged into, if that is in the same pair. The lists are empty if `lines` is False. `counts` covers all pairs.
        """
        count, height, width = self.grid
        fate = self.fate.view(count, -1)
        units, merged = [], []
        for pair in range(count) if pairs is None else pairs:
            first = pair * height * width
            owner = self.owner[first : first + height * width] - first
            moved = (fate[pair] == self.NAMES.index("merged")) & (owner >= 0) & (owner < height * width) & lines
            ends = torch.stack([arange_on(height * width, "cpu"), owner], dim=1)
            units.append("".join(map(str, fate[pair].tolist())))
            merged.append(ends[moved].flatten().tolist())
        facts = {"grid": list(self.grid), "fates": self.NAMES, "units": units, "merged": merged}
        return facts | {"counts": self.counts()}

    def counts_per_pair(self) -> list[list[int]]:
        """Return the number of units with each fate in each frame pair, in the order of `NAMES`."""
        by_pair = self.fate.view(self.grid[0], -1)
        return torch.stack([(by_pair == fate).sum(1) for fate in range(len(self.NAMES))], dim=1).tolist()

    @staticmethod
    def with_drawing(page: str) -> str:
        """Insert the style and the script that draw units into an HTML page, in the places marked by their file names."""
        folder = files("evoprune.bench")
        for name in ("drawing.css", "drawing.js"):
            page = page.replace(f"/* {name} */\n", folder.joinpath(name).read_text(encoding="utf-8"), 1)
        return page


@dataclass(frozen=True)
class TracedVideo:
    """The frames of a video and the fates of its units. Create it with `trace`.

    Attributes:
        frames: uint8 `[F, H, W, 3]`, the frames at the size used by the encoder. Two frames form a frame pair.
        warnings: The warnings from the report, plus `demo_overlay` if a demo model read a type of video that it was not trained on.
        damaged: The number of packets that could not be decoded.
    """

    plan: Plan
    frames: torch.Tensor
    fates: Fates
    warnings: list[str]
    damaged: int

    @classmethod
    def trace(
        cls,
        session: Session,
        path: str,
        sampling: SamplingOptions | None = None,
        name: str | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Self:
        """Encode a video, keeping its frames and unit fates. See `session.encoding.open_inputs` for the arguments.

        Raises:
            UsageError: If no overlay can be drawn for the pruning method. See `Fates.check`.
            VideoError: If the video cannot be read.
            OutOfMemory: If there is not enough memory.
        """
        Fates.check(session.pruning)
        shown: list[torch.Tensor] = []
        made: list[TowerOutput] = []

        def frames(plan: Plan, chunks: Iterator[FrameChunk]) -> Iterator[FrameChunk]:
            shown.clear()  # the encoder restarts if it runs out of memory
            with closing(chunks):
                for chunk in chunks:
                    shown.append(resize(torch.from_numpy(chunk.pixels), plan.height, plan.width))
                    yield chunk

        def tower(*given: Any, **options: Any) -> TowerOutput:
            made[:] = [encode_rows(*given, **options)]
            return made[0]

        with closing(open_inputs(session, [path], sampling, names=[name], frames=frames, tower=tower)) as opened:
            (plan,) = opened.plans
            report = opened.encode(progress).report
        warnings = list(plan.info.warnings)
        codes = ("cut_short", "damaged_video", "equal_scores")
        warnings += [code for code in codes if code in report.inputs[0].warnings]
        if not session.loaded.knows(plan.info):
            warnings.append("demo_overlay")
        return cls(plan, torch.cat(shown), Fates.of(made[0]), warnings, report.video.damaged or 0)

    @property
    def summary(self) -> str:
        n = self.fates.counts()
        count, height, width = self.plan.grid
        pairs = f"{counted(count, 'frame pair')} of {height}x{width} units"
        return f"{pairs}: {n['units']:,} units, {n['encoded']:,} encoded, {n['read']:,} tokens read"

    def draw(self, title: str, ending: str) -> bytes:
        """Draw the overlay, and return it as the bytes of an image or video file.

        Args:
            title: The title to show above the frames.
            ending: The format. ".png" shows the frame pairs side by side; ".gif" and ".mp4" play at two to ten frames per second.
        """
        overlay = Overlay(self, title)
        if ending == ".png":
            return png(overlay.sheet(), MADE_BY)
        seconds = min(0.5, max(0.1, self.plan.sampling.seconds_per_frame))
        if ending == ".mp4":
            return mp4(overlay.frames(), seconds)
        every = math.ceil(len(self.frames) / 4)  # the palette is computed from four frames
        return gif(overlay.frames(), seconds, shared_palette(overlay.frames(every)))


MADE_BY = "evoprune overlay"  # stored in each file's metadata


def png(picture: Image.Image, made_by: str = MADE_BY) -> bytes:
    """Encode an RGB image as PNG with a 256-color palette, which makes grainy frames a third as large as in full color."""
    file = io.BytesIO()
    facts = PngInfo()
    facts.add_text("Software", made_by)
    reduced = picture.quantize(palette=shared_palette([picture]), dither=Image.Dither.NONE)
    reduced.save(file, "PNG", optimize=True, pnginfo=facts)
    return file.getvalue()


def gif(pictures: Iterable[Image.Image], seconds: float, palette: Image.Image) -> bytes:
    """Encode one or more RGB images of the same size as an infinitely looping GIF.

    Each image is shown for `seconds`, rounded to hundredths and at least 0.02, because players slow down faster GIFs.
    """
    first, *others = (picture.quantize(palette=palette, dither=Image.Dither.NONE) for picture in pictures)
    file = io.BytesIO()
    milliseconds = 10 * max(2, round(seconds * 100))
    first.save(file, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0, comment=MADE_BY)
    return file.getvalue()


def shared_palette(pictures: Iterable[Image.Image]) -> Image.Image:
    """Return an image with a 256-color palette suitable for all RGB images in `pictures`, which must have the same width.

    All images in an animation need the same palette to avoid flickering.
    """
    column = Image.fromarray(np.concatenate([np.asarray(picture) for picture in pictures]))
    return column.quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)


def mp4(pictures: Iterable[Image.Image], seconds: float) -> bytes:
    """Encode RGB images of the same, even width and height as an H.264 MP4 file. Each image is shown for `seconds`."""
    file = io.BytesIO()
    stream = None
    step = Fraction(seconds).limit_denominator(1000)
    with av.open(file, "w", format="mp4") as out:
        out.metadata["comment"] = MADE_BY
        for number, picture in enumerate(pictures):
            if stream is None:
                stream = out.add_stream("libx264", rate=1 / step, options={"crf": "18", "preset": "veryfast"})
                stream.width, stream.height = picture.size
                stream.pix_fmt = "yuv420p"
                stream.codec_context.time_base = step
            frame = av.VideoFrame.from_image(picture).reformat(format="yuv420p")
            frame.pts = number
            frame.time_base = step
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return file.getvalue()


# The brightness factor and added color for each fate. Color-blind readers can distinguish the fates in any video.
TINTS = {
    "read": (0.72, (70, 70, 70)),
    "reused": (0.4, (0, 24, 84)),
    "merged": (0.5, (84, 40, 0)),
    "dropped": (0.25, (0, 0, 0)),
}
MARK = (255, 214, 102)  # color of lines, dots, and arrows; their outline is dark


def light(picture: np.ndarray, fate: np.ndarray) -> np.ndarray:
    """Change the brightness and tint of each pixel according to its fate.

    Args:
        image: uint8 `[H, W, 3]`, the pixels.
        fate: int `[H, W]`, the fate of each pixel's unit, as an index into `Fates.NAMES`.
    """
    share = np.array([TINTS[name][0] for name in Fates.NAMES], np.float32)[fate]
    tint = np.array([TINTS[name][1] for name in Fates.NAMES], np.float32)[fate]
    return (picture.astype(np.float32) * share[..., None] + tint).clip(0, 255).astype(np.uint8)


class Marks:
    """Draws marks for merged units on an image. Units are `side` pixels wide, and (y, x) is a unit's row and column."""

    def __init__(self, picture: Image.Image, side: int):
        self._draw = ImageDraw.Draw(picture)
        self._side = side
        self._thick = max(1, round(side / 28))

    def line(self, start: tuple[int, int], end: tuple[int, int]) -> None:
        """Draw a line from a merged unit to the unit that it was merged into."""
        ends = [self._middle(*start), self._middle(*end)]
        self._draw.line(ends, BACKGROUND, 3 * self._thick)
        self._draw.line(ends, MARK, self._thick)

    def dot(self, y: int, x: int) -> None:
        """Draw a dot on a unit into which other units were merged."""
        across, down = self._middle(y, x)
        radius = 5 * self._side // 32
        place = (across - radius, down - radius, across + radius, down + radius)
        self._draw.ellipse(place, MARK, BACKGROUND, self._thick)

    def arrow(self, y: int, x: int, later: bool) -> None:
        """Draw an arrow on a unit that was merged into a different frame pair, pointing right if that pair is later, else left."""
        across, down = self._middle(y, x)
        reach = self._side // 8 if later else -self._side // 8
        corners = [(across - reach, down - abs(reach)), (across + reach, down), (across - reach, down + abs(reach))]
        self._draw.polygon(corners, MARK, BACKGROUND, self._thick)

    def _middle(self, y: int, x: int) -> tuple[int, int]:
        return x * self._side + self._side // 2, y * self._side + self._side // 2


class Overlay:
    """Draws a video's frames as panels, each `width` pixels wide, between a title and a legend."""

    def __init__(self, video: TracedVideo, title: str):
        self._video = video
        self._title = title
        self._fate = video.fates.fate.numpy()
        self._owners = video.fates.owner[video.fates.all_of("merged")].unique().tolist()
        self._zoom = max(1, min(4, round(560 / video.plan.width)))  # makes panels about 560 pixels wide
        self._pixels = video.plan.width // video.plan.grid[2]  # side length of a unit in the original frame
        self.width = video.plan.width * self._zoom

    def sheet(self) -> Image.Image:
        """Draw the first frame of each frame pair, or of 12 evenly spaced pairs if there are more, on a single RGB image."""
        count = self._video.plan.grid[0]
        shown = [i * count // min(count, MAX_PANELS) for i in range(min(count, MAX_PANELS))]
        height = self._video.plan.height * self.width / self._video.plan.width
        across = columns(len(shown), self.width / height)
        width = max(MIN_WIDTH, across * (self.width + GAP) - GAP)
        size = text_size(width)
        drawn = list(self._captioned([pair * (len(self._video.frames) // count) for pair in shown], round(0.85 * size)))
        rows = [joined(drawn[at : at + across], GAP, across=True) for at in range(0, len(drawn), across)]
        number = "All frame pairs"
        if len(shown) < count:
            number = f"{len(shown)} of {count} frame pairs"
        note = f"{number}; each is shown by its first frame. A square is a unit, which can become one token."
        above = text_picture(self._title, width, size)
        return framed([above, *rows, text_picture(note, width, size, FAINT), *self._legend(width, size)])

    def frames(self, every: int = 1) -> Iterator[Image.Image]:
        """Yield an RGB image for every n-th frame, where n is `every`. All images have the same size."""
        width = max(MIN_WIDTH, self.width)
        size = text_size(width)
        above = text_picture(self._title, width, size)
        legend = self._legend(width, size)
        for drawn in self._captioned(range(len(self._video.frames)), size, every):
            yield framed([above, drawn, *legend])

    def panel(self, frame: int) -> Image.Image:
        """Draw a frame with its marks as an RGB image, upscaled by an integer factor."""
        fate = self._of_frame(self._fate, frame)
        lit = light(self._video.frames[frame].numpy(), fate.repeat(self._pixels, 0).repeat(self._pixels, 1))
        picture = Image.fromarray(lit).resize((self.width, lit.shape[0] * self._zoom), Image.Resampling.NEAREST)
        self._mark(Marks(picture, self._pixels * self._zoom), fate, frame)
        return picture

    def _mark(self, marks: Marks, fate: np.ndarray, frame: int) -> None:
        """Draw lines and arrows from a frame's merged units, and dots on the units that others were merged into."""
        units = self._of_frame(np.arange(len(self._fate)), frame)
        owner = self._of_frame(self._video.fates.owner.numpy(), frame)
        inside = np.isin(owner, units)
        merged = fate == Fates.NAMES.index("merged")
        for y, x in np.argwhere(merged & inside).tolist():
            (end,) = np.argwhere(units == owner[y, x]).tolist()
            marks.line((y, x), tuple(end))
        for y, x in np.argwhere(merged & ~inside).tolist():
            marks.arrow(y, x, later=bool(owner[y, x] > units[y, x]))
        for y, x in np.argwhere(np.isin(units, self._owners)).tolist():
            marks.dot(y, x)

    def caption(self, frame: int) -> str:
        """Return a caption with a frame's timestamp and the number of units with each fate in its frame pair.

        Fates that don't occur anywhere in the video are omitted.
        """
        here = self._of_frame(self._fate, frame)
        anywhere = set(self._fate.tolist())
        counts = (f"{(here == n).sum()} {name}" for n, name in enumerate(Fates.NAMES) if n in anywhere)
        minutes, seconds = divmod(round(self._video.plan.sampling.times_s[frame], 2), 60)
        return f"{minutes:.0f}:{seconds:05.2f}: {', '.join(counts)}"

    def _of_frame(self, units: np.ndarray, frame: int) -> np.ndarray:
        """Extract the values for a frame's pair from an array with one value per unit, `[N]`. Returns an `[h, w]` array."""
        grid = self._video.plan.grid
        return units.reshape(grid)[frame // (len(self._video.frames) // grid[0])]

    def _captioned(self, frames: Sequence[int], size: int, every: int = 1) -> Iterator[Image.Image]:
        """Yield the captioned panels of every n-th frame, where n is `every`. All captions have the same number of lines."""
        width = self.width
        captions = {frame: self.caption(frame) for frame in frames}
        rows = max(len(wrap(caption, width, size)) for caption in captions.values())
        for frame in frames[::every]:
            caption = text_picture(captions[frame], width, size, FAINT, rows)
            yield joined([self.panel(frame), caption], GAP // 4)

    def _legend(self, width: int, size: int) -> list[Image.Image]:
        fates = self._video.fates
        counts = fates.counts()
        units = f"{counts['read']:,} of {counts['units']:,} units"
        if again := int((fates.chosen & ~fates.encoded).sum()):
            units += f", {again:,} of them represented by a row of an earlier frame pair"
        meanings = {
            "read": f"each is one token of the language model. {units}.",
            "reused": f"unchanged since an earlier frame pair, so not encoded again. {counted(counts['reused'], 'unit')}.",
            "merged": "averaged into the unit with the dot at the end of the line; an arrow points to an earlier or a later frame "
            f"pair. {counted(counts['merged'], 'unit')}.",
            "dropped": f"encoded and then dropped. {counted(counts['dropped'], 'unit')}.",
        }
        return [
            _legend_entry(name, f"{name.capitalize()}: {meaning}", width, size)
            for name, meaning in meanings.items()
            if counts[name]
        ]


def text_size(width: int) -> int:
    """Return a legible font size for an image of this width displayed about 900 pixels wide."""
    return max(16, round(width / 62))


def columns(panels: int, ratio: float) -> int:
    """Return the number of panels per sheet row, given a panel's width-to-height ratio.

    The number is chosen so that the sheet is about 1.6 times as wide as it is high, like a screen, with few empty positions.
    """

    def cost(columns: int) -> float:
        rows = -(-panels // columns)
        return abs(math.log(columns * ratio / rows / 1.6)) + (rows * columns - panels) / panels

    return min(range(1, panels + 1), key=cost)


def _legend_entry(name: str, text: str, width: int, size: int) -> Image.Image:
    """Draw a legend entry, which shows two small units, drawn as in a panel, next to an explanation of their fate."""
    side = round(1.4 * size)
    fate = np.full((side, 2 * side), Fates.NAMES.index(name))
    if name == "merged":
        fate[:, side:] = Fates.NAMES.index("read")
    swatch = Image.fromarray(light(np.full((*fate.shape, 3), 120, np.uint8), fate))
    if name == "merged":
        marks = Marks(swatch, side)
        marks.line((0, 0), (0, 1))
        marks.dot(0, 1)
    return joined([swatch, text_picture(text, width - 2 * side - GAP, size)], GAP, across=True)


def joined(pictures: Sequence[Image.Image], gap: int, across: bool = False) -> Image.Image:
    """Join images into a left-aligned column or, if `across` is True, into a vertically centered row."""
    widths = [picture.width for picture in pictures]
    heights = [picture.height for picture in pictures]
    gaps = gap * (len(pictures) - 1)
    at = 0
    if across:
        canvas = Image.new("RGB", (sum(widths) + gaps, max(heights)), BACKGROUND)
        for picture in pictures:
            canvas.paste(picture, (at, (canvas.height - picture.height) // 2))
            at += picture.width + gap
    else:
        canvas = Image.new("RGB", (max(widths), sum(heights) + gaps), BACKGROUND)
        for picture in pictures:
            canvas.paste(picture, (0, at))
            at += picture.height + gap
    return canvas


def framed(pictures: Sequence[Image.Image]) -> Image.Image:
    """Join images into a column with a surrounding margin. The resulting width and height are even, as required by H.264."""
    column = joined(pictures, GAP // 2)
    return ImageOps.expand(column, (GAP, GAP, GAP + column.width % 2, GAP + column.height % 2), BACKGROUND)


def text_picture(text: str, width: int, size: int, colour: tuple[int, int, int] = INK, rows: int = 1) -> Image.Image:
    """Draw text as an RGB image, wrapped to `width` pixels. The image has room for at least `rows` lines.

    The text is drawn in Pillow's default font, which contains only ASCII characters and shows a box for any other character.
    """
    lines = wrap(text, width, size)
    height = round(1.3 * size)
    picture = Image.new("RGB", (width, height * max(rows, len(lines))), BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for row, line in enumerate(lines):
        draw.text((0, row * height), line, colour, _font(size))
    return picture


def wrap(text: str, width: int, size: int) -> list[str]:
    """Split text into lines of at most `width` pixels. Words wider than a line are split."""
    rows = [""]
    long = _font(size).getlength
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
