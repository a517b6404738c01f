"""The components of a scene frame: object and sign sprites, and background and foreground layers.

A layer consists of 1/f noise and dead leaves, which are discs and polygons with power-law sizes. The leaves come from a bank that
is drawn once per process.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from experiments.demo.painting import blend, glyph_mask, outline_mask
from experiments.demo.scenes.clip import COLOURS, SIGN, Clip, Thing

FAR, GROUND, NEAR = 0.5, 1.0, 1.6  # each layer's speed, relative to the camera
BANK = 384
SMALLEST = 4
LARGEST = 60
PERIOD = 512  # period of the noise bank, in pixels
Sprite = tuple[np.ndarray, np.ndarray]  # colors float32 [h, w, 3] and coverage float32 [h, w] in [0, 1]


@lru_cache(maxsize=1024)
def texture_field(texture: str, size: int, period: int, turn: int = 0) -> np.ndarray:
    """Return the proportion of the second color at each pixel of a `size` x `size` square, float32 in [0, 1].

    Args:
        period: The number of pixels after which the texture repeats.
        turn: The rotation, in eighths of a half circle.
    """
    axis = np.arange(size) - (size - 1) / 2
    cos = np.cos(turn * np.pi / 8)
    sin = np.sin(turn * np.pi / 8)
    u = axis[None, :] * cos + axis[:, None] * sin
    v = axis[:, None] * cos - axis[None, :] * sin
    if texture == "plain":
        return np.zeros((size, size), np.float32)
    wave = 2 * np.pi / period
    field = {
        "striped": lambda: np.sin(v * wave),
        "dotted": lambda: np.cos(u * wave) + np.cos(v * wave) - 0.7,
        "checked": lambda: 2 * np.sin(u * wave) * np.sin(v * wave),
    }[texture]()
    return np.clip(0.5 + 2.0 * field, 0, 1).astype(np.float32)


def thing_sprite(thing: Thing, changed: bool) -> Sprite:
    """Return the sprite of an object or a sign, either before or after its change."""
    if thing.is_sign:
        return _board(thing.after if changed else thing.text, thing)
    first = np.array(COLOURS[thing.after] if changed else thing.rgb, np.float32)
    # A texture's second color is darker than a light first color, and lighter than a dark one.
    light = first.mean() > 95
    second = first * np.float32(0.3) if light else first * np.float32(0.35) + np.float32(165)
    r = thing.radius
    turn = 2 if thing.texture == "striped" else 0
    field = texture_field(thing.texture, 2 * r, max(5, round(r / 2.2)), turn)[..., None]
    return first + field * (second - first), outline_mask(thing.outline, r)


def _board(text: str, sign: Thing) -> Sprite:
    glyph = sign.glyph
    pitch = sign.pitch
    height, width = glyph + 6, len(text) * pitch + 6
    back = np.array(sign.rgb, np.float32)
    ink = np.float32(20) if back.mean() > 95 else np.float32(240)
    colours = np.broadcast_to(back, (height, width, 3)).copy()
    colours[[0, -1]] = colours[:, [0, -1]] = back * np.float32(0.5)
    for number, character in enumerate(text):
        mask = glyph_mask(character, glyph)
        left = 3 + number * pitch + (pitch - mask.shape[1]) // 2
        area = colours[3 : 3 + glyph, left : left + mask.shape[1]]
        area += mask[..., None] * (ink - area)
    return colours, np.ones((height, width), np.float32)


@lru_cache(maxsize=2048)
def thing_shadow(outline: str, height: int, width: int) -> np.ndarray:
    """Return the shadow of an object or a sign board as float32, two pixels larger on each side. Sizes are in pixels."""
    cover = np.ones((height, width), np.float32) if outline == SIGN else outline_mask(outline, height // 2)
    return soft_shadow(cover, 2) * np.float32(0.4)


def soft_shadow(cover: np.ndarray, reach: int) -> np.ndarray:
    """Return the soft shadow of a coverage mask as float32, `reach` pixels larger on each side."""
    shadow = np.pad(cover, reach)
    for axis in (0, 1):
        total = np.cumsum(np.pad(shadow, [(reach + 1, reach) if a == axis else (0, 0) for a in (0, 1)]), axis=axis)
        n = shadow.shape[axis]
        window = 2 * reach + 1
        shadow = (np.take(total, range(window, window + n), axis) - np.take(total, range(n), axis)) / np.float32(window)
    return shadow.astype(np.float32)


@lru_cache(maxsize=1)
def pink_noise() -> np.ndarray:
    """Return seamless 1/f noise: float32 `[PERIOD, PERIOD, 3]`, with mean 0 and standard deviation 1."""
    rng = np.random.default_rng(11)
    f = np.hypot(np.fft.fftfreq(PERIOD)[:, None], np.fft.fftfreq(PERIOD)[None, :])
    f[0, 0] = np.inf
    made = []
    for _ in range(4):
        plane = np.fft.ifft2(np.fft.fft2(rng.standard_normal((PERIOD, PERIOD))) / f).real
        made.append(plane / plane.std())
    return np.stack([0.85 * made[0] + 0.5 * made[i] for i in (1, 2, 3)], -1).astype(np.float32)


@lru_cache(maxsize=1)
def leaves() -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Return the bank of leaves, smallest first. Each leaf has a coverage mask, a mix of two colors, and a shadow."""
    rng = np.random.default_rng(12)
    # Radii with density r^-3, which makes dead leaves scale-invariant.
    u = (np.arange(BANK) + 0.5) / BANK
    radii = (SMALLEST**-2.0 * (1 - u) + LARGEST**-2.0 * u) ** -0.5
    made = []
    for radius in radii.round().astype(int):
        field = np.zeros((2 * radius, 2 * radius), np.float32)
        if rng.random() < 0.6:
            texture = ("striped", "dotted", "checked")[int(rng.integers(3))]
            field = texture_field(texture, 2 * radius, int(rng.integers(4, 14)), int(rng.integers(8))) * np.float32(0.5)
        dy, dx = int(rng.integers(PERIOD - 128)), int(rng.integers(PERIOD - 128))
        grain = pink_noise()[dy : dy + 2 * radius, dx : dx + 2 * radius, 0]
        field = np.clip(field + 0.25 * grain, 0, 1).astype(np.float32)
        cover = _leaf_cover(rng, int(radius))
        made.append((cover, field, soft_shadow(cover, 2 + int(radius) // 12)))
    return made


def _leaf_cover(rng: np.random.Generator, radius: int) -> np.ndarray:
    """Return a disc or a convex polygon with 3 to 7 corners, squeezed and rotated: float32 `[2 * radius, 2 * radius]`."""
    axis = (np.arange(2 * radius) + 0.5) - radius
    angle = rng.uniform(0, np.pi)
    squeeze = rng.uniform(0.5, 1)
    u = axis[None, :] * np.cos(angle) + axis[:, None] * np.sin(angle)
    v = (axis[:, None] * np.cos(angle) - axis[None, :] * np.sin(angle)) / squeeze
    if rng.random() < 0.4:
        edge = radius - np.hypot(u, v)
    else:
        corners = int(rng.integers(3, 8))
        normals = (np.arange(corners) + rng.uniform(-0.3, 0.3, corners)) * 2 * np.pi / corners
        edge = np.min([0.8 * radius - u * np.cos(a) - v * np.sin(a) for a in normals], axis=0)
    return np.clip(edge + 0.5, 0, 1).astype(np.float32)


@dataclass
class Scenery:
    """A scene's layers, each larger than the frame by `margin` pixels on every side."""

    margin: int
    far: np.ndarray  # colours float32 `[h, w, 3]`, opaque
    ground: tuple[np.ndarray, np.ndarray] | None  # colours times coverage, and coverage `[h, w, 1]`
    near: tuple[np.ndarray, np.ndarray] | None


def make_scenery(clip: Clip, scene: int) -> Scenery:
    rng = np.random.default_rng((13, *clip.seed, scene))
    camera = clip.camera
    travel = max(abs(camera.dx), abs(camera.dy)) * clip.seconds + 2 * camera.shake
    margin = int(np.ceil(travel * NEAR)) + 2 if travel else 0
    height, width = clip.height + 2 * margin, clip.width + 2 * margin
    hue = rng.uniform(0.65, 1.0, 3)
    light = rng.uniform(60, 150)
    top, left = rng.integers(PERIOD, size=2)
    noise = pink_noise()[(np.arange(height) + top) % PERIOD][:, (np.arange(width) + left) % PERIOD]
    far = noise * np.float32(rng.uniform(8, 24)) + (hue * light).astype(np.float32)
    _strew(far, None, rng, clip.clutter, hue * light)
    ground = near = None
    if margin and camera.motion == "pan":  # otherwise, one layer is enough, because there is no parallax
        ground = _layer(height, width)
        _strew(*ground, rng, 0.3 * clip.clutter, hue * light)
    if clip.poles:
        near = colours, cover = _layer(height, width)
        for _ in range(clip.poles):
            # A dark post in the foreground, from top to bottom.
            thick = int(rng.integers(3, 8))
            left = int(rng.integers(0, width))
            grey = rng.uniform(15, 70)
            colours[:, left : left + thick] = np.float32(grey)
            cover[:, left : left + thick] = 1
    return Scenery(margin, far, ground, near)


def _layer(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    return np.zeros((height, width, 3), np.float32), np.zeros((height, width, 1), np.float32)


def _strew(
    canvas: np.ndarray, cover: np.ndarray | None, rng: np.random.Generator, density: float, tint: np.ndarray
) -> None:
    """Scatter leaves on the canvas, each on top of the previous ones, so that they cover about a `density` fraction of it."""
    bank, (height, width, _) = leaves(), canvas.shape
    # Approximate mean area of a leaf, given the squeezed and clipped shapes.
    count = int(density * height * width / 190)
    which = rng.integers(BANK, size=count)
    xs = rng.integers(-20, width + 20, count)
    ys = rng.integers(-20, height + 20, count)
    first = np.clip(tint + rng.normal(0, 34, (count, 1)) + rng.normal(0, 20, (count, 3)), 5, 250).astype(np.float32)
    second = np.clip(first + rng.normal(0, 40, (count, 1)) + rng.normal(0, 15, (count, 3)), 5, 250).astype(np.float32)
    for i in range(count):
        mask, field, shadow = bank[which[i]]
        left, top = int(xs[i]) - mask.shape[1] // 2, int(ys[i]) - mask.shape[0] // 2
        colours = first[i] + field[..., None] * (second[i] - first[i])
        if cover is None and len(mask) > 16:
            reach = (len(shadow) - len(mask)) // 2
            blend(canvas, np.float32(0), shadow * np.float32(0.35), left - reach + 2, top - reach + 3)
        blend(canvas, colours, mask, left, top)
        if cover is not None:
            blend(cover, np.float32(1), mask, left, top)
