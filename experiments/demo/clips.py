"""Procedural clips: shapes and digits that move, appear, vanish and flash on a cluttered background, which may also move.

A clip is determined by its split, seed, frame size, and length. It is defined in continuous time, so it can be drawn at any frame
rate.

Each feature exposes a potential weakness of pruning methods. Objects as small as one or two merge units, ten-pixel digits, and
similar colors require spatial detail. Flashes and arrivals require temporal detail. Questions about counts and locations require
tokens that cover the whole frame. Clutter misleads methods that keep anything that stands out, a panning background misleads
methods that keep anything that changes, and noise misleads methods that reuse only identical pixels.
"""

from dataclasses import dataclass

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (225, 40, 40), "green": (40, 190, 60), "blue": (50, 80, 235), "yellow": (240, 225, 50),
    "purple": (155, 50, 200), "orange": (245, 140, 25), "cyan": (50, 215, 225), "white": (245, 245, 245),
}  # fmt: skip
SIZES = {"small": (6, 8), "large": (10, 13)}
DIGITS = {"small": 5, "large": 7}  # half of the digit height, in pixels
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# First part of the seed, which is different for each split, so that no two splits share a clip. "portrait" is a separate family of
# clips with portrait frames and a panning camera. No settings are tuned on it.
SPLITS = {"train": 0, "validation": 1, "heldout": 2, "samples": 3, "portrait": 4}
# Frame sizes (height and width in merge units of 28 pixels) and lengths (in grids of one second) of evaluation clips, with their
# probabilities. The last two entries in both lists are never used in training.
FRAMES = (((8, 12), 0.55), ((6, 8), 0.25), ((8, 10), 0.1), ((10, 14), 0.1))
LENGTHS = ((4, 0.3), (6, 0.4), (8, 0.15), (7, 0.075), (10, 0.075))


class Moving:
    """Base class for objects in both worlds.

    An object starts at (x, y) and moves at `speed` pixels per second in the direction `motion`.
    """

    def centre(self, t: float) -> tuple[float, float]:
        dx, dy = MOTIONS[self.motion]
        return self.x + dx * self.speed * t, self.y + dy * self.speed * t


def event_of(start: float, end: float, seconds: float) -> str:
    """Classify an object that is visible during [start, end) by its behavior in the clip: stay, appear, vanish, or flash."""
    comes = start > 0
    goes = end < seconds
    if comes and goes:
        return "flashes"
    if comes:
        return "appears"
    return "vanishes" if goes else "stays"


@dataclass(frozen=True)
class Thing(Moving):
    """A shape or digit that is visible during [start, end). Its center at time 0 is (x, y), in pixels."""

    kind: str  # a name in SHAPES, or the digit
    colour: str
    rgb: tuple[int, int, int]
    size: str  # "small" or "large"
    radius: int  # for a digit, half of its height
    x: float
    y: float
    motion: str
    speed: float
    start: float = 0.0
    end: float = float("inf")

    @property
    def is_digit(self) -> bool:
        return self.kind.isdigit()

    @property
    def name(self) -> str:
        return f"{self.colour} {self.kind}"

    def visible(self, t: float) -> bool:
        return self.start <= t < self.end

    def box(self, seconds: float) -> tuple[float, float, float, float]:
        """Return the bounding box (x0, y0, x1, y1) of the object's entire path."""
        (xa, ya), (xb, yb) = self.centre(0), self.centre(seconds)
        r = self.radius
        return min(xa, xb) - r, min(ya, yb) - r, max(xa, xb) + r, max(ya, yb) + r

    def event(self, seconds: float) -> str:
        return event_of(self.start, self.end, seconds)


@dataclass(frozen=True)
class Clip:
    """A scene of `seconds` seconds on a frame of height x width pixels. `seed` also determines the background and the noise."""

    seed: tuple[int, ...]
    height: int
    width: int
    seconds: float
    things: tuple[Thing, ...]
    noise: float
    pan: tuple[float, float] = (0.0, 0.0)  # camera speed in pixels per second; it does not move the objects
    clutter: float = 0.0  # number of gray blots and strokes per million background pixels

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if not t.is_digit)


def setting(split: str, seed: int) -> tuple[int, int, int]:
    """Choose a clip's height and width in pixels, and its number of grids, which last one second each."""
    rng = np.random.default_rng((7, SPLITS[split], seed))
    height, width = FRAMES[rng.choice(len(FRAMES), p=[odds for _, odds in FRAMES])][0]
    grids = LENGTHS[rng.choice(len(LENGTHS), p=[odds for _, odds in LENGTHS])][0]
    if split == "portrait":
        height, width = 12, 8
    return height * 28, width * 28, grids


def make_clip(
    split: str,
    seed: int,
    height: int | None = None,
    width: int | None = None,
    seconds: float | None = None,
    grids: int | None = None,
) -> Clip:
    """Make clip number `seed` of a split. No two splits share a clip.

    The seed determines the size and the length, unless specified. A grid consists of two sampled frames and lasts `seconds` /
    `grids`. No flash is shorter than one grid.
    """
    drawn = setting(split, seed)
    height = height or drawn[0]
    width = width or drawn[1]
    grids = grids or drawn[2]
    if seconds is None:
        seconds = float(grids)
    step = seconds / grids
    key = (SPLITS[split], seed)
    rng = np.random.default_rng(key)
    most = 6
    if height * width < 30_000:
        most = 4
    # In some clips, many objects appear or many objects vanish, so that "which comes first?" can be asked often enough.
    plots = (0.35, 0.22, 0.22, 0.21), (0.1, 0.8, 0.05, 0.05), (0.1, 0.05, 0.8, 0.05)
    fates = plots[rng.choice(3, p=[0.6, 0.2, 0.2])]
    names = set()
    things = []
    for _ in range(int(rng.integers(1, most + 1))):
        while (pair := (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))) in names:
            pass
        names.add(pair)
        place(things, rng, *pair, height, width, seconds, step, fates)
    if rng.random() < 0.6:
        kind = str(rng.integers(10))
        colour = str(rng.choice(list(COLOURS)))
        place(things, rng, kind, colour, height, width, seconds, step, fates)
    pan = (0.0, 0.0)
    if split == "portrait" or rng.random() < 0.35:  # three to twelve pixels between two grids
        angle = rng.uniform(0, 2 * np.pi)
        speed = rng.uniform(3, 12) / step
        pan = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    clutter = 0.0
    if rng.random() < 0.5:
        clutter = float(rng.uniform(50, 300))
    return Clip(key, height, width, seconds, tuple(things), float(rng.uniform(1, 5)), pan, clutter)


def place(things: list[Thing], rng, kind, colour, height, width, seconds, step, fates) -> None:
    """Add an object whose path stays within the frame and clear of other objects. Gives up after 30 attempts."""
    digit = kind.isdigit()
    size = "small" if rng.random() < 0.5 else "large"
    radius = DIGITS[size]
    if not digit:
        radius = int(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
    rgb = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255))
    start, end = 0.0, float("inf")
    event = rng.choice(["stays", "appears", "vanishes", "flashes"], p=fates)
    if seconds / step >= 3:
        # A flash covers two or three of the sampled frames, which are half a grid apart, and never the first or the last one.
        if event == "flashes":
            length = float(rng.uniform(1.05, 1.45)) * step
            start = float(rng.uniform(0.3 * step, seconds - 0.3 * step - length))
            end = start + length
        elif event == "appears":
            start = float(rng.uniform(0.25, 0.75) * seconds)
        elif event == "vanishes":
            end = float(rng.uniform(0.25, 0.75) * seconds)
    taken = [other.box(seconds) for other in things]
    for _ in range(30):
        motion = "still"
        speed = 0.0
        if not digit and rng.random() >= 0.45:
            motion = str(rng.choice(["left", "right", "up", "down"]))
            side = width if motion in ("left", "right") else height
            speed = min(float(rng.uniform(6, 12)) / step, 0.75 * (side - 2 * radius - 4) / seconds)
        dx, dy = MOTIONS[motion]
        far_x = dx * speed * seconds
        far_y = dy * speed * seconds
        x = float(rng.uniform(radius + 2 + max(0, -far_x), width - radius - 2 - max(0, far_x)))
        y = float(rng.uniform(radius + 2 + max(0, -far_y), height - radius - 2 - max(0, far_y)))
        thing = Thing(kind, colour, rgb, size, radius, x, y, motion, speed, start, end)
        x0, y0, x1, y1 = thing.box(seconds)
        if not any(x0 < c + 2 and a < x1 + 2 and y0 < d + 2 and b < y1 + 2 for a, b, c, d in taken):
            things.append(thing)
            return
