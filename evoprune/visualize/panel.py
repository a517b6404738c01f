"""One frame of a video, drawn so that it shows what became of each unit.

A unit that the language model reads is bright, any other dark. A reused unit is tinted blue. Units that merged are outlined in the
colour of their owner, and the owner has a dot of that colour.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from evoprune.visualize.fates import Fates, TracedVideo

FRAME_WIDTH, MAX_ZOOM = 560, 4  # about as wide as a frame is drawn, in pixels, and how much it is enlarged at most
BLUE, TINT = np.array((40, 110, 255), np.float32), 0.4  # of reused units, and how strong
READ, UNREAD = (0.8, 50.0), (0.42, 10.0)  # a factor and an offset of levels: both are told apart in a dark video too
RIM = (18, 18, 22)  # around an owner's dot, which may lie on its own colour

Colour = tuple[int, int, int]


class Panels:
    """Draws the frames of one video.

    Attributes:
        width: of a panel in pixels.
    """

    def __init__(self, video: TracedVideo):
        self._video, self._colours = video, _owner_colours(video.fates)
        count, self._rows, self._columns = video.plan.grid
        self._zoom = max(1, min(MAX_ZOOM, round(FRAME_WIDTH / video.plan.width)))
        self._pixels = video.plan.width // self._columns  # of a unit's side in the frame
        self._frames_per_pair = len(video.frames) // count
        self.width = video.plan.width * self._zoom

    def draw(self, frame: int) -> Image.Image:
        """RGB picture of a frame, enlarged by a whole number."""
        fates = self._video.fates
        reused = self._of_frame(fates.reused, frame)
        masks = (mask.repeat(self._pixels, 0).repeat(self._pixels, 1) for mask in (self._chosen(frame), reused))
        lit = light(self._video.frames[frame].numpy(), *masks)
        picture = Image.fromarray(lit).resize((self.width, lit.shape[0] * self._zoom), Image.Resampling.NEAREST)
        owner = self._of_frame(fates.owner, frame)
        cluster = np.where(~reused & np.isin(owner, list(self._colours)), owner, -1)
        unit = self._first_unit(frame) + np.arange(cluster.size).reshape(cluster.shape)
        for y, x in np.argwhere(cluster >= 0).tolist():
            colour = self._colours[int(cluster[y, x])]
            outline(picture, cluster, y, x, self._pixels * self._zoom, colour, dot=cluster[y, x] == unit[y, x])
        return picture

    def caption(self, frame: int) -> str:
        """The frame's time, and how many units of its frame pair are read, reused and merged."""
        fates = self._video.fates
        reused, merged = (int(self._of_frame(units, frame).sum()) for units in (fates.reused, fates.merged))
        time = clock(self._video.plan.sampling.times_s[frame])
        return f"{time}: {self._chosen(frame).sum()} read, {reused} reused, {merged} merged"

    def _chosen(self, frame: int) -> np.ndarray:
        return self._of_frame(self._video.fates.chosen, frame)

    def _of_frame(self, units, frame: int) -> np.ndarray:
        """`[h, w]` in units: the values of a tensor `[N]` for the frame's pair."""
        first = self._first_unit(frame)
        return units[first : first + self._rows * self._columns].view(self._rows, self._columns).numpy()

    def _first_unit(self, frame: int) -> int:
        return frame // self._frames_per_pair * self._rows * self._columns


def light(picture: np.ndarray, read: np.ndarray, reused: np.ndarray) -> np.ndarray:
    """Brightens the pixels that are read, darkens the others, and tints the reused ones.

    Args:
        picture: uint8 `[H, W, 3]`.
        read: bool `[H, W]`.
        reused: bool `[H, W]`.

    Returns:
        uint8 `[H, W, 3]`.
    """
    read, reused, levels = read[..., None], reused[..., None], picture.astype(np.float32)
    levels = np.where(reused, levels * (1 - TINT) + BLUE * TINT, levels)
    levels = np.where(read, levels * READ[0] + READ[1], levels * UNREAD[0] + UNREAD[1])
    return levels.clip(0, 255).astype(np.uint8)


def outline(picture: Image.Image, cluster: np.ndarray, y: int, x: int, side: int, colour: Colour, *, dot: bool) -> None:
    """Draws those edges of unit (y, x) at which its cluster ends, and a dot where it is the owner.

    Args:
        picture: RGB, drawn on.
        cluster: `[h, w]`, the owner of each unit, -1 for none.
        side: of a unit in pixels.
    """
    draw, around = ImageDraw.Draw(picture), np.pad(cluster, 1, constant_values=-1)
    left, top, right, bottom = x * side, y * side, (x + 1) * side - 1, (y + 1) * side - 1
    thick = max(1, round(side / 20)) - 1  # rectangles include their last row and column
    edges = {
        (-1, 0): (left, top, right, top + thick),
        (1, 0): (left, bottom - thick, right, bottom),
        (0, -1): (left, top, left + thick, bottom),
        (0, 1): (right - thick, top, right, bottom),
    }
    for (dy, dx), edge in edges.items():
        if around[y + 1 + dy, x + 1 + dx] != cluster[y, x]:
            draw.rectangle(edge, colour)
    if dot:
        place = (left + side * 11 // 32, top + side * 11 // 32, left + side * 21 // 32, top + side * 21 // 32)
        draw.ellipse(place, colour, RIM, thick + 1)


def cluster_colour(number: int) -> Colour:
    """The colour of cluster `number`: bright, not blue, and far from the colour of the cluster before."""
    hue = 0.75 + 0.8 * (number * 0.618034 % 1.0)
    red, green, blue = colorsys.hsv_to_rgb(hue % 1.0, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _owner_colours(fates: Fates) -> dict[int, Colour]:
    """The colour of every unit that others merged into."""
    return {owner: cluster_colour(n) for n, owner in enumerate(fates.owner[fates.merged].unique().tolist())}


def clock(seconds: float) -> str:
    """1:02.35"""
    minutes, rest = divmod(round(seconds * 100), 6000)
    return f"{minutes}:{rest // 100:02d}.{rest % 100:02d}"
