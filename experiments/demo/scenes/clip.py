"""Dataclasses that describe a clip of scenes: objects and signs on the ground, and the camera that films them."""

import math
from dataclasses import dataclass
from functools import cached_property

from experiments.demo import clips

OUTLINES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
TEXTURES = ("plain", "striped", "dotted", "checked")
COLOURS = {
    "red": (200, 50, 45), "green": (60, 165, 70), "blue": (60, 90, 210), "yellow": (225, 205, 70),
    "purple": (145, 65, 185), "orange": (230, 135, 45), "cyan": (70, 195, 205), "white": (235, 235, 230),
}  # fmt: skip
MOTIONS = {way: step for way, step in clips.MOTIONS.items() if any(step)}
SIGN = "sign"
Span = tuple[float, float]


@dataclass(frozen=True)
class Thing(clips.Moving):
    """An object or a sign. Its position is on the scene's ground, and later objects lie on top of earlier ones."""

    outline: str  # a name from OUTLINES, or `sign`
    texture: str
    colour: str
    rgb: tuple[int, int, int]  # RGB color, with jitter
    radius: int  # half the height and (except for signs) half the width, in pixels
    x: float
    y: float
    motion: str = "still"
    speed: float = 0.0
    # When the object is visible, as ascending intervals [start, end) in seconds.
    spans: tuple[Span, ...] = ((0.0, math.inf),)
    text: str = ""  # a sign's text
    turn: float = math.inf  # time in seconds at which its color or text changes to `after`
    after: str = ""
    under: int = -1  # index of the object underneath, in the clip's list

    @cached_property
    def is_sign(self) -> bool:
        return self.outline == SIGN

    @cached_property
    def colours(self) -> tuple[str, ...]:
        return (self.colour, self.after) if self.after and not self.is_sign else (self.colour,)

    @cached_property
    def glyph(self) -> int:
        return 2 * self.radius - 6

    @cached_property
    def pitch(self) -> int:
        return max(7, round(self.glyph * 6 / 7))

    @cached_property
    def half(self) -> float:
        return (len(self.text) * self.pitch + 6) / 2 if self.is_sign else float(self.radius)

    def looks(self, part: str) -> tuple[str, ...]:
        """Return all values that the outline, texture, or color takes over time. Only the color can change."""
        return self.colours if part == "colour" else (getattr(self, part),)

    def visible(self, t: float) -> bool:
        return any(start <= t < end for start, end in self.spans)

    def event(self, seconds: float) -> str:
        return "blinks" if len(self.spans) > 1 else clips.event_of(*self.spans[0], seconds)


@dataclass(frozen=True)
class Camera:
    """The camera, whose type is `still`, `shake`, `pan`, or `zoom`.

    A pan moves by (dx, dy) ground pixels per second, and closer layers move faster than distant ones. A zoom is centered and
    changes from one factor to another.
    """

    motion: str = "still"
    dx: float = 0.0
    dy: float = 0.0
    zoom: tuple[float, float] = (1.0, 1.0)
    shake: float = 0.0

    @property
    def travels(self) -> bool:
        """Whether the camera moves, so that static objects move within the frame. A shake is too small to matter."""
        return self.motion in ("pan", "zoom")

    def factor(self, t: float, seconds: float) -> float:
        a, b = self.zoom
        return a + (b - a) * min(max(t / seconds, 0.0), 1.0)


@dataclass(frozen=True)
class Clip:
    """A clip of `seconds` seconds with a frame size of height x width pixels, sampled as `pairs` frame pairs.

    `seed` also determines the scenery and the noise.
    """

    seed: tuple[int, ...]
    height: int
    width: int
    seconds: float
    pairs: int
    things: tuple[Thing, ...]
    camera: Camera = Camera()
    cut: float = math.inf  # time at which a second scene replaces the first one, in seconds
    clutter: float = 0.5  # fraction of the ground covered by leaves
    poles: int = 0  # posts in the foreground
    noise: float = 2.0  # standard deviation of the sensor noise
    blur: int = 0  # number of times that a small blur is applied

    @property
    def is_still(self) -> bool:
        return self.pairs == 1

    @property
    def is_uncut(self) -> bool:
        return self.cut >= self.seconds

    @cached_property
    def shapes(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if not t.is_sign)

    @cached_property
    def signs(self) -> tuple[Thing, ...]:
        return tuple(t for t in self.things if t.is_sign)

    def on_frame(self, x: float, y: float, t: float) -> tuple[float, float]:
        """Return the pixel that shows the ground point (x, y) at time t, ignoring camera shake."""
        x, y = x - self.camera.dx * t, y - self.camera.dy * t
        z = self.camera.factor(t, self.seconds)
        return self.width / 2 + z * (x - self.width / 2), self.height / 2 + z * (y - self.height / 2)
