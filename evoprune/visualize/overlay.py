"""Pictures of what became of each part of a video: grids side by side, or frame after frame, with a legend.

What the language model reads is bright, the rest dark. Blue is what was not encoded again. Units that were merged have an outline
in the colour of the row that they went into, whose own place has a dot. Only numbers in, pixels out.
"""

import colorsys
import math
import textwrap
from collections.abc import Iterator, Sequence
from functools import cached_property

import numpy as np

from evoprune.visualize import film
from evoprune.visualize.fates import Look
from evoprune.visualize.lettering import HEIGHT, WIDTH, text_mask

MOST_PANELS = 12
NARROWEST, FRAME = 480, 700  # pixels: so that words have room; about as wide as a frame is drawn
PAPER, INK, FAINT = (18, 18, 22), (235, 235, 240), (160, 160, 170)
BLUE, TINT = np.array((40, 110, 255), np.float32), 0.4  # of what was reused, and how much of it
READ, UNREAD = (0.8, 50.0), (0.45, 0.0)  # light: a factor, and levels more, so that a dark video has bright parts too
GAP = 12


def as_file(look: Look, title: str, ending: str) -> bytes:
    """What a file of that ending (one of `choices.OVERLAYS`) holds: `Drawing.sheet` for `.png`, `Drawing.film` for the others.

    A film goes at the video's own pace where that is between two and ten frames a second, otherwise at the nearer of the two.
    """
    drawing = Drawing(look, title)
    if ending == ".png":
        return film.png(drawing.sheet())
    pace = min(0.5, max(0.1, look.plan.sampling.seconds_per_frame))
    return {".gif": film.gif, ".mp4": film.mp4}[ending](drawing.film(), pace)


class Drawing:
    """Draws one look at a video.

    Args:
        look: what there is to show.
        title: what is to be said above.
    """

    def __init__(self, look: Look, title: str):
        self._look, self._title = look, title
        count, height, width = look.plan.grid
        self._shape = (height, width)
        self._zoom = max(1, min(4, round(FRAME / look.plan.width)))
        self._side = look.plan.width // width * self._zoom  # of a unit, in pixels
        self._per_grid = len(look.frames) // count

    def sheet(self) -> np.ndarray:
        """At most twelve grids, spread over the video, of each the first frame: uint8 `[H, W, 3]`."""
        count = self._look.plan.grid[0]
        shown = [i * count // min(count, MOST_PANELS) for i in range(min(count, MOST_PANELS))]
        panels = [self._panel(grid * self._per_grid) for grid in shown]
        height, width, _ = panels[0].shape
        across = _across(len(panels), width / height)
        rows = [_beside(panels[at : at + across]) for at in range(0, len(panels), across)]
        wide = max(NARROWEST, rows[0].shape[1])
        some = f"{len(shown)} of {count} grids" if len(shown) < count else "Each grid"
        note = f"{some}, by the first of {self._per_grid} frames. A square is a unit: what can become one token."
        dot = max(2, round(wide / 700))
        above, below = _lines(self._title, wide, dot), [*_lines(note, wide, dot, FAINT), *self._legend(wide, dot)]
        parts = [*above, *rows, *below]
        return _framed(_stacked(parts, wide))

    def film(self) -> Iterator[np.ndarray]:
        """Every frame, one after another: uint8 `[H, W, 3]` each, all of one size with even sides."""
        wide = max(NARROWEST, self._look.plan.width * self._zoom)
        above, below = _lines(self._title, wide, 2), self._legend(wide, 2)
        for frame in range(len(self._look.frames)):
            yield _framed(_stacked([*above, self._panel(frame), *below], wide))

    @cached_property
    def _colours(self) -> dict[int, tuple[int, int, int]]:
        """Of every group that was merged, by the unit at which its row sits; groups that follow each other differ."""
        fates = self._look.fates
        return {owner: _colour(n) for n, owner in enumerate(fates.owner[fates.merged].unique().tolist())}

    def _panel(self, frame: int) -> np.ndarray:
        """A frame with what became of its units, and below it its time and counts."""
        fates, grid, units = self._look.fates, frame // self._per_grid, self._shape[0] * self._shape[1]
        first = grid * units

        def here(of_units) -> np.ndarray:
            return of_units[first : first + units].view(self._shape).numpy()

        chosen, reused, merged, owner = (here(x) for x in (fates.chosen, fates.reused, fates.merged, fates.owner))
        picture = _larger(self._look.frames[frame].numpy().astype(np.float32), self._zoom)
        picture = _lit(picture, _larger(chosen[..., None], self._side), _larger(reused[..., None], self._side))
        group = np.where(~reused & np.isin(owner, list(self._colours)), owner, -1)
        for y, x in np.argwhere(group >= 0).tolist():
            home = group[y, x] == first + y * self._shape[1] + x
            _outline(picture, group, y, x, self._colours[int(group[y, x])], self._side, dot=home)
        counts = f"read {chosen.sum()}  reused {reused.sum()}  merged {merged.sum()}"
        said = f"{clock(self._look.plan.sampling.times_s[frame])}  {counts}"
        wide = picture.shape[1]
        return _stacked([picture.clip(0, 255).astype(np.uint8), *_lines(said, wide, 2, FAINT)], wide)

    def _legend(self, wide: int, dot: int) -> list[np.ndarray]:
        counts = self._look.fates.counts()
        said = {
            "read": f"Bright: read by the language model, {counts['chosen']} of {counts['units']} units.",
            "unread": "Dark: not read.",
            "reused": f"Blue: as it was in an earlier grid, so not encoded again, {counts['reused']}.",
            "merged": f"Outlined: {counts['merged']} merged into the unit with the dot and outline of the same colour, "
            "perhaps in another grid.",
        }
        return [_entry(kind, text, wide, dot) for kind, text in said.items() if counts.get(kind, 1)]


def _across(panels: int, ratio: float) -> int:
    """How many panels, so much wider than high, to put in a row: the sheet should be like a screen, and have few places empty."""

    def cost(across: int) -> float:
        rows = -(-panels // across)
        return abs(math.log(across * ratio / rows / 1.6)) + (rows * across - panels) / panels

    return min(range(1, panels + 1), key=cost)


def _larger(values: np.ndarray, times: int) -> np.ndarray:
    return values.repeat(times, 0).repeat(times, 1)


def _lit(picture: np.ndarray, read: np.ndarray, reused: np.ndarray) -> np.ndarray:
    """Brighter where it is read, bluer where it is reused; float32 levels of 255."""
    picture = np.where(reused, picture * (1 - TINT) + BLUE * TINT, picture)
    return np.where(read, picture * READ[0] + READ[1], picture * UNREAD[0] + UNREAD[1])


def _outline(
    picture: np.ndarray, group: np.ndarray, y: int, x: int, colour: Sequence[int], side: int, *, dot: bool
) -> None:
    """Draws the sides of unit (y, x) that are borders of its group, and a dot where the group's row sits."""
    area = picture[y * side : (y + 1) * side, x * side : (x + 1) * side]
    thick = max(1, round(side / 28))
    strips = {(-1, 0): np.s_[:thick], (1, 0): np.s_[-thick:], (0, -1): np.s_[:, :thick], (0, 1): np.s_[:, -thick:]}
    around = np.pad(group, 1, constant_values=-1)
    for (dy, dx), strip in strips.items():
        if around[y + 1 + dy, x + 1 + dx] != group[y, x]:
            area[strip] = 0.3 * area[strip] + 0.7 * np.float32(colour)
    if dot:
        area[side * 3 // 8 : side * 5 // 8, side * 3 // 8 : side * 5 // 8] = colour


def _colour(number: int) -> tuple[int, ...]:
    """Bright colours, far from the one before, and none of them blue."""
    hue = 0.75 + 0.8 * (number * 0.618034 % 1.0)
    return tuple(round(255 * level) for level in colorsys.hsv_to_rgb(hue % 1.0, 0.8, 1.0))


def clock(seconds: float) -> str:
    """1:02.35"""
    minutes, rest = divmod(round(seconds * 100), 6000)
    return f"{minutes}:{rest // 100:02d}.{rest % 100:02d}"


def _entry(kind: str, text: str, wide: int, dot: int) -> np.ndarray:
    """A line of the legend: two small units as they are drawn above, and what that means."""
    side = 14 * dot
    read, reused = np.array([[kind in ("read", "reused"), kind == "read"]])[..., None], np.array(kind == "reused")
    swatch = _lit(np.full((side, 2 * side, 3), 120, np.float32), _larger(read, side), reused)
    if kind == "merged":
        for x in (0, 1):
            _outline(swatch, np.array([[0, 0]]), 0, x, _colour(0), side, dot=x == 1)
    room = wide - 2 * side - GAP
    words = _stacked(_lines(text, room, dot), room)
    made = _padded(swatch.astype(np.uint8), max(side, len(words)), wide)
    top = max(0, (side - len(words)) // 2)
    made[top : top + len(words), 2 * side + GAP :] = words
    return made


def _lines(text: str, wide: int, dot: int, colour: Sequence[int] = INK) -> list[np.ndarray]:
    """Words folded to a width, a picture a line, in letters whose dots are so many pixels wide."""
    made = []
    for line in textwrap.wrap(text, max(8, wide // (WIDTH * dot))):
        mask = text_mask(line, dot)[:, :wide]
        picture = np.full((HEIGHT * dot, wide, 3), PAPER, np.uint8)
        picture[:, : mask.shape[1]][mask] = colour
        made.append(picture)
    return made


def _beside(pictures: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height in a row."""
    return np.concatenate([_padded(p, len(p), p.shape[1] + (GAP if p is not pictures[-1] else 0)) for p in pictures], 1)


def _stacked(pictures: Sequence[np.ndarray], wide: int) -> np.ndarray:
    """Pictures below each other."""
    return np.concatenate([_padded(p, len(p) + (GAP // 2 if p is not pictures[-1] else 0), wide) for p in pictures])


def _padded(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """With room at the bottom and on the right."""
    made = np.full((height, width, 3), PAPER, np.uint8)
    made[: picture.shape[0], : picture.shape[1]] = picture
    return made


def _framed(picture: np.ndarray) -> np.ndarray:
    """With a margin, and even sides, which video wants."""
    height, width, _ = picture.shape
    made = np.full((height + 2 * GAP + height % 2, width + 2 * GAP + width % 2, 3), PAPER, np.uint8)
    made[GAP : GAP + height, GAP : GAP + width] = picture
    return made
