"""Draw procedural clips, either as frames at given times or as video files."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from experiments.demo.clips import Clip
from experiments.demo.painting import add_noise, blend, glyph_mask, outline_mask, write_frames


def render(clip: Clip, times: Sequence[float]) -> np.ndarray:
    """Draw a clip at the given times, in seconds. Returns uint8 `[len(times), height, width, 3]`."""
    rng = np.random.default_rng((9, *clip.seed))
    # The scenery covers everything the camera will see. The camera starts in the corner opposite to its motion.
    reach = [abs(v) * clip.seconds for v in clip.pan]
    scenery = _background(rng, clip.height + int(reach[1]) + 1, clip.width + int(reach[0]) + 1)
    _litter(scenery, clip.clutter, rng)
    out = np.empty((len(times), clip.height, clip.width, 3), np.uint8)
    for frame, t in zip(out, times, strict=True):
        left, top = (
            int(min(max(v * t + (0 if v > 0 else far), 0), far)) for v, far in zip(clip.pan, reach, strict=True)
        )
        canvas = scenery[top : top + clip.height, left : left + clip.width].copy()
        for thing in clip.things:
            if thing.visible(t):
                mask, (x, y) = thing_mask(thing.kind, thing.radius), thing.centre(t)
                corner = round(x - mask.shape[1] / 2), round(y - mask.shape[0] / 2)
                blend(canvas, np.array(thing.rgb, np.float32), mask, *corner)
        add_noise(rng, canvas, clip.noise, out=frame)
    return out


def _background(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    tint = rng.uniform(0.6, 1.0, 3)
    canvas = np.full((height, width, 3), 1.0, np.float32) * (tint * rng.uniform(25, 110)).astype(np.float32)
    for cell, strength in ((56, 14), (21, 9), (7, 6)):
        rows = _stretch(height, cell)
        cols = _stretch(width, cell)
        grid = rng.standard_normal((3, rows.shape[1], cols.shape[1])).astype(np.float32)
        canvas += float(rng.uniform(0.2, 1.0)) * strength * (rows @ grid @ cols.T).transpose(1, 2, 0)
    return canvas


def _litter(scenery: np.ndarray, density: float, rng: np.random.Generator) -> None:
    """Draw gray blots and strokes with as much contrast as the objects, but without their colors and sharp edges."""
    height, width, _ = scenery.shape
    for _ in range(int(rng.poisson(density * height * width / 1e6))):
        long, thin = (rng.uniform(6, 16), rng.uniform(1.0, 2.5)) if rng.random() < 0.5 else rng.uniform(4, 12, 2)
        angle = rng.uniform(0, np.pi)
        grey = rng.uniform(20, 150)
        x = rng.uniform(0, width)
        y = rng.uniform(0, height)
        reach = int(max(long, thin)) + 2
        left, top = max(int(x) - reach, 0), max(int(y) - reach, 0)
        area = scenery[top : int(y) + reach, left : int(x) + reach]
        dy, dx = np.ogrid[top : top + area.shape[0], left : left + area.shape[1]]
        u = ((dx - x) * np.cos(angle) + (dy - y) * np.sin(angle)) / long
        v = ((dy - y) * np.cos(angle) - (dx - x) * np.sin(angle)) / thin
        cover = np.clip(1.5 * (1 - np.hypot(u, v)), 0, rng.uniform(0.4, 0.9)).astype(np.float32)[..., None]
        area += cover * (np.float32(grey) + rng.uniform(-12, 12, 3).astype(np.float32) - area)


@lru_cache(maxsize=64)
def _stretch(length: int, cell: int) -> np.ndarray:
    """Return linear interpolation weights with a knot every `cell` pixels, `[length, knots]`."""
    at = np.arange(length) / cell
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(int(at[-1]) + 2))).astype(np.float32)


def thing_mask(kind: str, radius: int) -> np.ndarray:
    """Return the fraction of each pixel covered by a shape or digit. A digit's width is five sevenths of its height."""
    return glyph_mask(kind, 2 * radius) if kind.isdigit() else outline_mask(kind, radius, bar=0.33, hole=0.55)


def write_video(clip: Clip, path: str | Path, fps: int = 12, **encoding) -> None:
    """Encode a clip as a video file. See `painting.write_frames` for the arguments in `encoding`."""
    frames = render(clip, [i / fps for i in range(round(clip.seconds * fps))])
    write_frames(frames, path, (clip.height, clip.width), fps, **encoding)
