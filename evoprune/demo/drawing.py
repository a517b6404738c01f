"""Pictures of procedural clips: frames at any times, and video files."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from evoprune.demo.clips import Clip, Thing
from evoprune.demo.files import write_frames

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


def write_video(
    clip: Clip, path: str | Path, fps: int = 12, codec: str = "libx264", crf: int = 18, preset: str = "medium"
) -> None:
    """Encodes the clip as a video file: see `files.write_frames`."""
    frames = round(clip.seconds * fps)
    write_frames(
        render(clip, [i / fps for i in range(frames)]), path, (clip.height, clip.width), fps, codec, crf, preset
    )
