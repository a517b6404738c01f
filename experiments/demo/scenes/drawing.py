"""Draw frames of a clip of scenes at given times, optionally with maps of the object shown at each pixel."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from evoprune.bundled import DEMOS
from experiments.demo.painting import LOSSLESS, add_noise, blend, write_frames
from experiments.demo.scenes.clip import Clip
from experiments.demo.scenes.scenery import FAR, GROUND, NEAR, Scenery, Sprite, make_scenery, thing_shadow, thing_sprite

NOTHING = -1
FINEST = 18  # lowest x264 rate factor (highest quality) of the world's clips


def render(clip: Clip, times: Sequence[float]) -> np.ndarray:
    """Draw the clip at `times` (in seconds). Returns uint8 `[len(times), height, width, 3]`."""
    return render_with_map(clip, times)[0]


def write_file(clip: Clip, path: str | Path, crf: int = 23, fps: int = 8) -> None:
    """Write a still clip as a JPEG file or any other clip as a video, and tag the file as a clip of scenes.

    Args:
        crf: x264's constant rate factor. For stills, the world's lowest factor maps to JPEG quality 95 and its highest to 65. With
            `LOSSLESS`, stills are written as PNG files.

    Raises:
        OSError: If the file cannot be written.
    """
    if clip.is_still:
        still = Image.fromarray(render(clip, [clip.seconds / 2])[0])
        if crf == LOSSLESS:
            tag = PngInfo()
            tag.add_text("comment", DEMOS["demo-scenes"].tag)
            still.save(path, "PNG", pnginfo=tag)
            return
        still.save(path, "JPEG", quality=95 - 2 * (crf - FINEST), comment=DEMOS["demo-scenes"].tag)
        return
    frames = render(clip, [i / fps for i in range(round(clip.seconds * fps))])
    size = clip.height, clip.width
    write_frames(frames, path, size, fps, crf=crf, preset="veryfast", tag=DEMOS["demo-scenes"].tag)


def render_with_map(clip: Clip, times: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Draw the clip as in `render`, and map each pixel to an object index: int8 `[len(times), height, width]`, or NOTHING."""
    rng = np.random.default_rng((9, *clip.seed))
    frames = np.empty((len(times), clip.height, clip.width, 3), np.uint8)
    maps = np.empty(frames.shape[:3], np.int8)
    scenery_of = cache(partial(make_scenery, clip))
    sprite_of = cache(thing_sprite)
    for number, t in enumerate(times):
        canvas, maps[number] = _sharp(clip, t, scenery_of(int(t >= clip.cut)), sprite_of)
        for _ in range(clip.blur):
            canvas = _blurred(canvas)
        add_noise(rng, canvas, clip.noise, out=frames[number])
    return frames, maps


def _sharp(clip: Clip, t: float, scenery: Scenery, sprite_of: Callable[..., Sprite]) -> tuple[np.ndarray, np.ndarray]:
    """Return the float32 frame at time t, before blur and noise, and its map of object indices."""
    camera = clip.camera
    shake = _shake(clip, t)
    margin = scenery.margin

    def seen_of(layer: np.ndarray, depth: float) -> np.ndarray:
        left, top = (
            min(max(margin + round(v * depth * t) + s, 0), 2 * margin)
            for v, s in zip((camera.dx, camera.dy), shake, strict=True)
        )
        return layer[top : top + clip.height, left : left + clip.width]

    def lay(layer: tuple[np.ndarray, np.ndarray], depth: float) -> np.ndarray:
        colours, cover = (seen_of(part, depth) for part in layer)
        canvas[:] = canvas * (1 - cover) + colours * cover
        return cover[..., 0]

    canvas = seen_of(scenery.far, FAR).copy()
    if scenery.ground:
        lay(scenery.ground, GROUND)
    seen = np.full(canvas.shape[:2], NOTHING, np.int8)
    for number, thing in enumerate(clip.things):
        if thing.visible(t):
            colours, cover = sprite_of(thing, t >= thing.turn)
            (h, w), (x, y) = cover.shape, thing.centre(t)
            left, top = round(x - camera.dx * t - shake[0] - w / 2), round(y - camera.dy * t - shake[1] - h / 2)
            blend(canvas, np.float32(0), thing_shadow(thing.outline, h, w), left - 1, top)
            outer, inner = blend(canvas, colours, cover, left, top)
            seen[outer][cover[inner] > 0.5] = number
    if scenery.near:
        seen[lay(scenery.near, NEAR) > 0.5] = NOTHING
    factor = camera.factor(t, clip.seconds)
    return (canvas, seen) if factor == 1 else _magnified(canvas, seen, factor)


def _shake(clip: Clip, t: float) -> tuple[int, int]:
    """Return a handheld camera's offset in whole pixels, computed as a sum of slow waves."""
    a = clip.camera.shake
    phase = clip.seed[-1] % 628 / 100
    if not a:
        return 0, 0
    return (
        round(a * (0.7 * np.sin(2.3 * t + phase) + 0.5 * np.sin(5.1 * t))),
        round(a * (0.7 * np.cos(1.9 * t + phase) + 0.5 * np.sin(4.3 * t))),
    )


def _magnified(canvas: np.ndarray, seen: np.ndarray, factor: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the middle of the frame and its map, magnified by `factor`. The frame is interpolated linearly."""
    nearest = []
    for axis in (0, 1):
        n = canvas.shape[axis]
        at = np.clip((np.arange(n) + 0.5 - n / 2) / factor + n / 2 - 0.5, 0, n - 1)
        low = np.minimum(at.astype(int), n - 2)
        share = (at - low).astype(np.float32).reshape((-1, 1, 1) if axis == 0 else (1, -1, 1))
        canvas = np.take(canvas, low, axis) * (1 - share) + np.take(canvas, low + 1, axis) * share
        nearest.append(np.round(at).astype(int))
    return canvas, seen[nearest[0]][:, nearest[1]]


def _blurred(canvas: np.ndarray) -> np.ndarray:
    """Return the canvas smoothed with a 1-2-1 filter along both axes."""
    padded = np.pad(canvas, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    return (rows[:, :-2] + 2 * rows[:, 1:-1] + rows[:, 2:]) * np.float32(1 / 16)
