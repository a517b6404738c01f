"""Procedural clips: coloured shapes and digits that move, appear, vanish and flash before a cluttered, perhaps moving background.

A clip is a function of (split, seed, frame size, length) alone. It is described in continuous time, so it can be drawn
at the two frames a second that a model samples or at the twelve of a video file.

What each part is there to punish: things of one or two merge units on a large frame, digits of ten pixels and colours close to
each other (detail), flashes of two or three sampled frames and arrivals (time), counts and places (space), clutter (choosing what
stands out), a panning background (trusting that what changes matters), sensor and codec noise (trusting that what stays is the
same to the bit).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import numpy as np

from evoprune.video.info import DEMO_TAG

SHAPES = ("circle", "square", "triangle", "cross", "ring", "diamond")
COLOURS = {
    "red": (225, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 235),
    "yellow": (240, 225, 50),
    "purple": (155, 50, 200),
    "orange": (245, 140, 25),
    "cyan": (50, 215, 225),
    "white": (245, 245, 245),
}
SIZES = {"small": (6, 8), "large": (10, 13)}
DIGITS = {"small": 5, "large": 7}  # half their height
MOTIONS = {"still": (0, 0), "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Where the seeds of each purpose live: the split is part of the seed, so they cannot meet.
# Portrait is a family of its own, upright frames whose camera always pans, and is never tuned on.
SPLITS = {"train": 0, "validation": 1, "heldout": 2, "samples": 3, "portrait": 4}
# What is asked about, with odds: frames of height x width merge units (28 pixels) and lengths in grids of a second. The last
# two of each were never trained on.
FRAMES = (((8, 12), 0.55), ((6, 8), 0.25), ((8, 10), 0.1), ((10, 14), 0.1))
LENGTHS = ((4, 0.3), (6, 0.4), (8, 0.15), (7, 0.075), (10, 0.075))
DIGIT_FONT = (
    "01110 10001 10011 10101 11001 10001 01110",
    "00100 01100 00100 00100 00100 00100 01110",
    "01110 10001 00001 00110 01000 10000 11111",
    "11111 00010 00100 00010 00001 10001 01110",
    "00010 00110 01010 10010 11111 00010 00010",
    "11111 10000 11110 00001 00001 10001 01110",
    "00110 01000 10000 11110 10001 10001 01110",
    "11111 00001 00010 00100 01000 01000 01000",
    "01110 10001 10001 01110 10001 10001 01110",
    "01110 10001 10001 01111 00001 00010 01100",
)


@dataclass(frozen=True)
class Thing:
    """A shape or a digit: centre (x, y) in pixels at time 0, velocity in pixels a second, on screen in [start, end)."""

    kind: str  # a name of SHAPES, or the digit itself
    colour: str
    rgb: tuple[int, int, int]
    size: str  # small or large
    radius: int  # of a digit: half its height
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

    def centre(self, t: float) -> tuple[float, float]:
        dx, dy = MOTIONS[self.motion]
        return self.x + dx * self.speed * t, self.y + dy * self.speed * t

    def visible(self, t: float) -> bool:
        return self.start <= t < self.end

    def box(self, seconds: float) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 of all that it ever covers."""
        (xa, ya), (xb, yb) = self.centre(0), self.centre(seconds)
        r = self.radius
        return min(xa, xb) - r, min(ya, yb) - r, max(xa, xb) + r, max(ya, yb) + r

    def event(self, seconds: float) -> str:
        """What happens to it: stays, appears, vanishes or flashes."""
        comes, goes = self.start > 0, self.end < seconds
        return ("flashes" if goes else "appears") if comes else ("vanishes" if goes else "stays")


@dataclass(frozen=True)
class Clip:
    """A scene of `seconds` on a frame of height x width pixels; `seed` also makes its background and its noise.

    `pan`: how many pixels a second the camera moves along x and y over the background; things are followed, their motion is on
    the frame. `clutter`: grey blots and strokes on each million pixels of background.
    """

    seed: tuple[int, ...]
    height: int
    width: int
    seconds: float
    things: tuple[Thing, ...]
    noise: float
    pan: tuple[float, float] = (0.0, 0.0)
    clutter: float = 0.0

    @property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if not t.is_digit)


def setting(split: str, seed: int) -> tuple[int, int, int]:
    """(height, width, grids) of the clip number `seed` of a split: pixels, and seconds as well as grids."""
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
    """The clip number `seed` of a split.

    Args:
        split: a name of SPLITS; splits never share a clip.
        height, width: pixels; default: drawn from the seed, like the length.
        seconds: length; with `grids`, how long one grid (two sampled frames) lasts, which bounds how short a flash is.
    """
    drawn = setting(split, seed)
    height, width, grids = height or drawn[0], width or drawn[1], grids or drawn[2]
    seconds = float(grids) if seconds is None else seconds
    key = (SPLITS[split], seed)
    rng = np.random.default_rng(key)
    step = seconds / grids
    most = 4 if height * width < 30_000 else 6
    # Some clips are full of arrivals or of departures, so that "which comes first?" can be asked often enough.
    fates = [(0.35, 0.22, 0.22, 0.21), (0.1, 0.8, 0.05, 0.05), (0.1, 0.05, 0.8, 0.05)][
        int(rng.choice(3, p=[0.6, 0.2, 0.2]))
    ]
    names, things = set(), []
    for _ in range(int(rng.integers(1, most + 1))):
        while (pair := (str(rng.choice(SHAPES)), str(rng.choice(list(COLOURS))))) in names:
            pass
        names.add(pair)
        thing = _place(rng, pair[0], pair[1], height, width, seconds, step, fates, things)
        if thing:
            things.append(thing)
    if rng.random() < 0.6:
        kind, colour = str(rng.integers(10)), str(rng.choice(list(COLOURS)))
        thing = _place(rng, kind, colour, height, width, seconds, step, fates, things)
        if thing:
            things.append(thing)
    pan = (0.0, 0.0)
    if split == "portrait" or rng.random() < 0.35:  # three to twelve pixels between two grids
        angle, speed = rng.uniform(0, 2 * np.pi), rng.uniform(3, 12) / step
        pan = (float(speed * np.cos(angle)), float(speed * np.sin(angle)))
    clutter = float(rng.uniform(50, 300)) if rng.random() < 0.5 else 0.0
    return Clip(key, height, width, seconds, tuple(things), float(rng.uniform(1, 5)), pan, clutter)


def _place(rng, kind, colour, height, width, seconds, step, fates, others) -> Thing | None:
    """A thing whose whole path stays on the frame and clear of `others`, or None after 30 tries."""
    digit = kind.isdigit()
    size = "small" if rng.random() < 0.5 else "large"
    radius = DIGITS[size] if digit else int(rng.integers(SIZES[size][0], SIZES[size][1] + 1))
    rgb = tuple(int(v) for v in np.clip(np.array(COLOURS[colour]) + rng.integers(-12, 13, 3), 0, 255))
    start, end = 0.0, float("inf")
    event = rng.choice(["stays", "appears", "vanishes", "flashes"], p=fates)
    if seconds / step >= 3:
        if (
            event == "flashes"
        ):  # two or three of the sampled frames, which are half a grid apart; never the first or the last
            length = float(rng.uniform(1.05, 1.45)) * step
            start = float(rng.uniform(0.3 * step, seconds - 0.3 * step - length))
            end = start + length
        elif event == "appears":
            start = float(rng.uniform(0.25, 0.75) * seconds)
        elif event == "vanishes":
            end = float(rng.uniform(0.25, 0.75) * seconds)
    taken = [other.box(seconds) for other in others]
    for _ in range(30):
        motion = "still" if digit or rng.random() < 0.45 else str(rng.choice(["left", "right", "up", "down"]))
        room = (width if motion in ("left", "right") else height) - 2 * radius - 4
        speed = 0.0 if motion == "still" else min(float(rng.uniform(6, 12)) / step, 0.75 * room / seconds)
        dx, dy = MOTIONS[motion]
        lo_x, hi_x = radius + 2 + max(0, -dx * speed * seconds), width - radius - 2 - max(0, dx * speed * seconds)
        lo_y, hi_y = radius + 2 + max(0, -dy * speed * seconds), height - radius - 2 - max(0, dy * speed * seconds)
        x, y = float(rng.uniform(lo_x, hi_x)), float(rng.uniform(lo_y, hi_y))
        thing = Thing(kind, colour, rgb, size, radius, x, y, motion, speed, start, end)
        box = thing.box(seconds)
        if not any(_overlap(box, other) for other in taken):
            return thing
    return None


def _overlap(a, b, gap: float = 2.0) -> bool:
    return a[0] < b[2] + gap and b[0] < a[2] + gap and a[1] < b[3] + gap and b[1] < a[3] + gap


def dense_grid(rng: np.random.Generator, height: int, width: int, count: int) -> Clip:
    """A one-second scene crowded with up to `count` things, to teach the eyes before the words."""
    things: list[Thing] = []
    for _ in range(count):
        kind = str(rng.integers(10)) if rng.random() < 0.4 else str(rng.choice(SHAPES))
        thing = _place(rng, kind, str(rng.choice(list(COLOURS))), height, width, 1.0, 1.0, (1, 0, 0, 0), things)
        if thing:
            things.append(thing)
    seed = tuple(int(v) for v in rng.integers(2**31, size=2))
    clutter = float(rng.uniform(50, 300)) if rng.random() < 0.5 else 0.0
    return Clip(seed, height, width, 1.0, tuple(things), float(rng.uniform(1, 5)), clutter=clutter)


def frame_times(seconds: float, frames: int) -> list[float]:
    """The sampler's rule: the middles of `frames` equal spans."""
    return [(i + 0.5) * seconds / frames for i in range(frames)]


def render(clip: Clip, times: Sequence[float]) -> np.ndarray:
    """Draws the clip at `times` (seconds): uint8 `[len(times), height, width, 3]`."""
    rng = np.random.default_rng((9, *clip.seed))
    # All that the camera will ever see; it starts in the corner from which it pans away.
    reach = [abs(v) * clip.seconds for v in clip.pan]
    scenery = _background(rng, clip.height + int(reach[1]) + 1, clip.width + int(reach[0]) + 1)
    _litter(scenery, clip.clutter, rng)
    out = np.empty((len(times), clip.height, clip.width, 3), np.uint8)
    bank = _noise_bank()
    pixels = out[0].size
    for frame, t in zip(out, times, strict=True):
        left, top = (
            int(min(max(v * t + (0 if v > 0 else far), 0), far)) for v, far in zip(clip.pan, reach, strict=True)
        )
        canvas = scenery[top : top + clip.height, left : left + clip.width].copy()
        for thing in clip.things:
            if thing.visible(t):
                _draw(canvas, thing, t)
        offset = int(rng.integers(len(bank) - pixels)) if pixels < len(bank) else 0
        grain = np.resize(bank[offset : offset + pixels], pixels).reshape(canvas.shape)
        np.clip(canvas + clip.noise * grain, 0, 255, out=canvas)
        frame[:] = canvas
    return out


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tint = rng.uniform(0.6, 1.0, 3)
    canvas = np.full((height, width, 3), 1.0, np.float32) * (tint * rng.uniform(25, 110)).astype(np.float32)
    for cell, strength in ((56, 14), (21, 9), (7, 6)):
        rows, cols = _stretch(height, cell), _stretch(width, cell)
        grid = rng.standard_normal((3, rows.shape[1], cols.shape[1])).astype(np.float32)
        canvas += float(rng.uniform(0.2, 1.0)) * strength * (rows @ grid @ cols.T).transpose(1, 2, 0)
    return canvas


def _litter(scenery: np.ndarray, density: float, rng: np.random.Generator) -> None:
    """Draws grey blots and strokes: as strong as things are, but without their colours and sharp rims."""
    height, width, _ = scenery.shape
    for _ in range(int(rng.poisson(density * height * width / 1e6))):
        long, thin = (rng.uniform(6, 16), rng.uniform(1.0, 2.5)) if rng.random() < 0.5 else rng.uniform(4, 12, 2)
        angle, grey = rng.uniform(0, np.pi), rng.uniform(20, 150)
        x, y, reach = rng.uniform(0, width), rng.uniform(0, height), int(max(long, thin)) + 2
        left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
        area = scenery[top : int(y) + reach, left : int(x) + reach]
        dy, dx = np.ogrid[top : top + area.shape[0], left : left + area.shape[1]]
        u = ((dx - x) * np.cos(angle) + (dy - y) * np.sin(angle)) / long
        v = ((dy - y) * np.cos(angle) - (dx - x) * np.sin(angle)) / thin
        cover = np.clip(1.5 * (1 - np.hypot(u, v)), 0, rng.uniform(0.4, 0.9)).astype(np.float32)[..., None]
        area += cover * (np.float32(grey) + rng.uniform(-12, 12, 3).astype(np.float32) - area)


@lru_cache(maxsize=64)
def _stretch(length: int, cell: int) -> np.ndarray:
    """`[length, knots]`: linear interpolation from a knot every `cell` pixels."""
    at = np.arange(length) / cell
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(int(at[-1]) + 2))).astype(np.float32)


@lru_cache(maxsize=1)
def _noise_bank() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32)


def _draw(canvas: np.ndarray, thing: Thing, t: float) -> None:
    mask = digit_mask(int(thing.kind), thing.radius) if thing.is_digit else shape_mask(thing.kind, thing.radius)
    h, w = mask.shape
    x, y = thing.centre(t)
    left, top = round(x - w / 2), round(y - h / 2)
    area = canvas[max(top, 0) : top + h, max(left, 0) : left + w]
    cut = mask[max(-top, 0) :, max(-left, 0) :][: area.shape[0], : area.shape[1], None]
    area += cut * (np.array(thing.rgb, np.float32) - area)


@lru_cache(maxsize=256)
def shape_mask(kind: str, radius: int) -> np.ndarray:
    """Coverage in [0, 1] of each pixel of a `2 * radius` square, from 4x4 points a pixel."""
    n = 2 * radius * 4
    axis = (np.arange(n) + 0.5) / (n / 2) - 1
    x, y = axis[None, :], axis[:, None]
    far = np.hypot(x, y)
    inside = {
        "circle": far <= 1,
        "square": (np.abs(x) <= 0.88) & (np.abs(y) <= 0.88),
        "triangle": (y <= 0.9) & (np.abs(x) <= (y + 1) / 1.9),
        "cross": ((np.abs(x) <= 0.33) & (np.abs(y) <= 1)) | ((np.abs(y) <= 0.33) & (np.abs(x) <= 1)),
        "ring": (far <= 1) & (far >= 0.55),
        "diamond": np.abs(x) + np.abs(y) <= 1,
    }[kind]
    cells = np.broadcast_to(inside, (n, n)).reshape(2 * radius, 4, 2 * radius, 4)
    return cells.mean((1, 3)).astype(np.float32)


@lru_cache(maxsize=64)
def digit_mask(digit: int, radius: int = 7) -> np.ndarray:
    """Coverage in [0, 1] of each pixel of the digit, `2 * radius` pixels high and five sevenths as wide."""
    dots = np.array([[int(c) for c in row] for row in DIGIT_FONT[digit].split()], np.float32)
    height, width = 2 * radius, round(10 * radius / 7)
    rows, cols = (np.arange(n * 8) * dots.shape[axis] // (n * 8) for axis, n in ((0, height), (1, width)))
    return dots[rows][:, cols].reshape(height, 8, width, 8).mean((1, 3))


def through_codec(frames: np.ndarray, quality: int, gop: int = 12) -> np.ndarray:
    """The frames as MPEG-4 leaves them: uint8 `[T, H, W, 3]`, sides even.

    Args:
        quality: 2 (fine) to 31 (coarse).
        gop: frames from one key frame to the next.
    """
    import av

    encoder = av.CodecContext.create("mpeg4", "w")
    encoder.width, encoder.height, encoder.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
    encoder.time_base, encoder.gop_size = Fraction(1, 12), gop
    encoder.options, encoder.thread_count = {"qmin": str(quality), "qmax": str(quality)}, 1
    decoder = av.CodecContext.create("mpeg4", "r")
    packets = [p for f in frames for p in encoder.encode(av.VideoFrame.from_ndarray(f, format="rgb24"))]
    packets += encoder.encode()
    decoder.extradata = encoder.extradata
    decoded = [f for p in packets for f in decoder.decode(p)] + decoder.decode(None)
    return np.stack([f.to_ndarray(format="rgb24") for f in decoded])


def write_video(
    clip: Clip, path: str | Path, fps: int = 12, codec: str = "libx264", crf: int = 18, preset: str = "medium"
) -> None:
    """Encodes the clip as a video file, marked as the generator's own in the container's `comment` tag."""
    import av

    def pictures() -> Iterator[np.ndarray]:
        frames = round(clip.seconds * fps)
        yield from render(clip, [i / fps for i in range(frames)])

    # Macroblock trees differ from run to run on some processors; without them a clip is always the same file.
    x264 = {"preset": preset, "x264-params": "mbtree=0"}
    with av.open(str(path), "w") as container:
        container.metadata["comment"] = DEMO_TAG
        stream = container.add_stream(
            codec, rate=fps, options={"crf": str(crf)} | ({"b": "0"} if "vp9" in codec else x264)
        )
        stream.width, stream.height, stream.pix_fmt = clip.width, clip.height, "yuv420p"
        stream.codec_context.thread_count = 1  # what comes out depends on their number
        for picture in pictures():
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
