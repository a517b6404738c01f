"""One frame of a video, drawn so that it shows what became of each unit.

A unit that the language model reads keeps its colours, brightened. Any other becomes grey in a colour of its fate: blue where it
was reused, orange where it merged, and dark where it was dropped. Merged units are outlined in the colour of their owner, and the
owner has a dot of that colour.
"""

import colorsys

import numpy as np
from PIL import Image, ImageDraw

from evoprune.overlay.fates import FATES, TracedVideo

FRAME_WIDTH, MAX_ZOOM = 560, 4  # about as wide as a frame is drawn, in pixels, and how much it is enlarged at most
READ = (0.66, 86.0)  # a factor and an offset of levels
# The others: a colour that is added to a share of their grey. Colour-blind readers distinguish them, in dark and light videos.
UNREAD = {"reused": (0, 50, 115), "merged": (120, 66, 0), "dropped": (0, 0, 0)}
GREY, LUMA = 0.3, np.array((0.299, 0.587, 0.114), np.float32)
RIM = (18, 18, 22)  # around an owner's dot, which may lie on its own colour

Colour = tuple[int, int, int]


class Panels:
    """Draws the frames of one video, each `width` pixels wide."""

    def __init__(self, video: TracedVideo):
        self._video, self._fate = video, video.fates.fate.numpy()
        owners = video.fates.owner[video.fates.all_of("merged")].unique().tolist()
        self._colours = {owner: cluster_colour(number) for number, owner in enumerate(owners)}
        self._zoom = max(1, min(MAX_ZOOM, round(FRAME_WIDTH / video.plan.width)))
        self._pixels = video.plan.width // video.plan.grid[2]  # of a unit's side in the frame
        self.width = video.plan.width * self._zoom

    def draw(self, frame: int) -> Image.Image:
        """RGB picture of a frame, enlarged by a whole number."""
        fate = self._of_frame(self._fate, frame)
        lit = light(self._video.frames[frame].numpy(), fate.repeat(self._pixels, 0).repeat(self._pixels, 1))
        picture = Image.fromarray(lit).resize((self.width, lit.shape[0] * self._zoom), Image.Resampling.NEAREST)
        unit = self._of_frame(np.arange(len(self._fate)), frame)
        cluster = np.where(fate == FATES.index("merged"), self._of_frame(self._video.fates.owner.numpy(), frame), unit)
        cluster = np.where(np.isin(cluster, list(self._colours)), cluster, -1)
        for y, x in np.argwhere(cluster >= 0).tolist():
            colour = self._colours[int(cluster[y, x])]
            outline(picture, cluster, y, x, self._pixels * self._zoom, colour, dot=cluster[y, x] == unit[y, x])
        return picture

    def caption(self, frame: int) -> str:
        """The frame's time, and how many units of its frame pair have each fate, apart from those that no unit of the video has."""
        here, anywhere = self._of_frame(self._fate, frame), set(self._fate.tolist())
        counts = (f"{(here == n).sum()} {name}" for n, name in enumerate(FATES) if n in anywhere)
        minutes, seconds = divmod(round(self._video.plan.sampling.times_s[frame], 2), 60)
        return f"{minutes:.0f}:{seconds:05.2f}: {', '.join(counts)}"

    def _of_frame(self, units: np.ndarray, frame: int) -> np.ndarray:
        """`[h, w]` in units: the values of an array `[N]` for the frame's pair."""
        grid = self._video.plan.grid
        return units.reshape(grid)[frame // (len(self._video.frames) // grid[0])]


def light(picture: np.ndarray, fate: np.ndarray) -> np.ndarray:
    """A picture, uint8 `[H, W, 3]`: pixels that are read are brightened, others take the colour of their fate, int `[H, W]`."""
    levels = picture.astype(np.float32)
    tint = np.array([UNREAD.get(name, (0, 0, 0)) for name in FATES], np.float32)[fate]
    unread = (levels @ LUMA)[..., None] * GREY + tint
    read = (fate == FATES.index("read"))[..., None]
    return np.where(read, levels * READ[0] + READ[1], unread).clip(0, 255).astype(np.uint8)


def outline(picture: Image.Image, cluster: np.ndarray, y: int, x: int, side: int, colour: Colour, *, dot: bool) -> None:
    """Draws those edges of unit (y, x), `side` pixels wide, at which its cluster ends, and a dot where it is the owner.

    `cluster`: `[h, w]`, the owner of each unit, -1 for none.
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
