"""Deterministic drawing tools for both worlds: outlines, characters, sprites, noise, and video files."""

from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np

from evoprune.bundled import DEMOS

# Each character consists of seven rows of five dots, encoded as a hexadecimal number.
_DOTS = {
    "0": "0E 11 13 15 19 11 0E", "1": "04 0C 04 04 04 04 0E", "2": "0E 11 01 06 08 10 1F", "3": "1F 02 04 02 01 11 0E",
    "4": "02 06 0A 12 1F 02 02", "5": "1F 10 1E 01 01 11 0E", "6": "06 08 10 1E 11 11 0E", "7": "1F 01 02 04 08 08 08",
    "8": "0E 11 11 0E 11 11 0E", "9": "0E 11 11 0F 01 02 0C", "A": "0E 11 11 1F 11 11 11", "B": "1E 11 11 1E 11 11 1E",
    "C": "0E 11 10 10 10 11 0E", "D": "1C 12 11 11 11 12 1C", "E": "1F 10 10 1E 10 10 1F", "F": "1F 10 10 1E 10 10 10",
    "G": "0E 11 10 17 11 11 0F", "H": "11 11 11 1F 11 11 11", "I": "0E 04 04 04 04 04 0E", "J": "07 02 02 02 02 12 0C",
    "K": "11 12 14 18 14 12 11", "L": "10 10 10 10 10 10 1F", "M": "11 1B 15 15 11 11 11", "N": "11 11 19 15 13 11 11",
    "O": "0E 11 11 11 11 11 0E", "P": "1E 11 11 1E 10 10 10", "Q": "0E 11 11 11 15 12 0D", "R": "1E 11 11 1E 14 12 11",
    "S": "0F 10 10 0E 01 01 1E", "T": "1F 04 04 04 04 04 04", "U": "11 11 11 11 11 11 0E", "V": "11 11 11 11 11 0A 04",
    "W": "11 11 11 15 15 15 0A", "X": "11 11 0A 04 0A 11 11", "Y": "11 11 11 0A 04 04 04", "Z": "1F 01 02 04 08 10 1F",
}  # fmt: skip
CHARACTERS = "".join(_DOTS)


@lru_cache(maxsize=1024)
def glyph_mask(character: str, height: int) -> np.ndarray:
    """Return the fraction of each pixel covered by a character, float32 `[height, round(height * 5 / 7)]` in [0, 1]."""
    rows = [int(row, 16) for row in _DOTS[character].split()]
    dots = np.array([[row >> (4 - i) & 1 for i in range(5)] for row in rows], np.float32)
    width = round(height * 5 / 7)
    r, c = (np.arange(n * 8) * dots.shape[axis] // (n * 8) for axis, n in ((0, height), (1, width)))
    return dots[r][:, c].reshape(height, 8, width, 8).mean((1, 3))


@lru_cache(maxsize=1024)
def outline_mask(outline: str, radius: int, bar: float = 0.34, hole: float = 0.5) -> np.ndarray:
    """Return the fraction of each pixel covered by an outline, float32 `[2 * radius, 2 * radius]` in [0, 1].

    Each pixel is sampled at 4x4 points. `bar` (half the thickness of a cross) and `hole` (the inner radius of a ring) are relative
    to `radius`.
    """
    n = 8 * radius
    axis = (np.arange(n) + 0.5) / (n / 2) - 1
    x, y = axis[None, :], axis[:, None]
    far = np.hypot(x, y)
    angle = np.arctan2(x, -y)
    inside = {
        "circle": lambda: far <= 1,
        "square": lambda: (np.abs(x) <= 0.88) & (np.abs(y) <= 0.88),
        "triangle": lambda: (y <= 0.9) & (np.abs(x) <= (y + 1) / 1.9),
        "diamond": lambda: np.abs(x) + np.abs(y) <= 1,
        "star": lambda: far <= 0.42 + 0.58 * np.abs(1 - np.mod(angle * 5 / (2 * np.pi), 1) * 2) ** 1.6,
        "ring": lambda: (far <= 1) & (far >= hole),
        "cross": lambda: np.minimum(np.abs(x), np.abs(y)) <= bar,
        "heart": lambda: (np.hypot(np.abs(x) - 0.48, y + 0.4) <= 0.52) | ((y >= -0.3) & (np.abs(x) + 0.78 * y <= 0.74)),
        "moon": lambda: (far <= 1) & (np.hypot(x - 0.55, y) >= 0.8),
    }[outline]()
    return np.broadcast_to(inside, (n, n)).reshape(2 * radius, 4, 2 * radius, 4).mean((1, 3)).astype(np.float32)


def blend(canvas: np.ndarray, colours, cover: np.ndarray, left: int, top: int) -> tuple[tuple, tuple]:
    """Draw a sprite with its top left corner at (left, top), cropped to the canvas.

    Returns:
        The drawn area, as slices of the canvas and of the sprite.
    """
    x0, y0 = max(left, 0), max(top, 0)
    x1 = max(x0, min(left + cover.shape[1], canvas.shape[1]))
    y1 = max(y0, min(top + cover.shape[0], canvas.shape[0]))
    outer = slice(y0, y1), slice(x0, x1)
    inner = slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)
    area = canvas[outer]
    if colours.ndim == 3:
        colours = colours[inner]
    area += cover[inner][..., None] * (colours - area)
    return outer, inner


@lru_cache(maxsize=1)
def _white_noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(1 << 21).astype(np.float32)


def add_noise(rng: np.random.Generator, canvas: np.ndarray, deviation: float, out: np.ndarray) -> None:
    """Add sensor noise to the canvas, and write the result to `out` as uint8. The noise is a random slice of a precomputed bank."""
    bank = _white_noise()
    pixels = canvas.size
    start = 0
    if pixels < len(bank):
        start = int(rng.integers(len(bank) - pixels))
    grain = np.resize(bank[start : start + pixels], pixels).reshape(canvas.shape)
    out[:] = np.clip(canvas + np.float32(deviation) * grain, 0, 255)


LOSSLESS = 0  # x264 rate factor for lossless encoding


def write_frames(
    frames: Iterable[np.ndarray],
    path: str | Path,
    size: tuple[int, int],
    fps: int,
    codec: str = "libx264",
    crf: int = 18,
    preset: str = "medium",
    tag: str = DEMOS["demo"].tag,
) -> None:
    """Encode frames, uint8 `[height, width, 3]`, as a video file.

    Args:
        size: The height and width, which must both be even.
        crf: x264's constant rate factor. `LOSSLESS` preserves red, green, and blue exactly.
        tag: A comment to store in the file metadata.

    Raises:
        OSError: If the file cannot be written.
    """
    import av

    # On some processors, macroblock trees differ between runs. Without them, the same clip always produces the same file.
    of_codec = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}
    of_file = {}
    pix_fmt = "yuv420p"
    if "vp9" in codec:
        of_codec = {"crf": str(crf), "b": "0"}
        of_file = {"fflags": "+bitexact"}  # prevents a random ID in WebM files
    if crf == LOSSLESS:
        codec = "libx264rgb"
        pix_fmt = "rgb24"
    with av.open(str(path), "w", options=of_file) as container:
        container.metadata["comment"] = tag
        stream = container.add_stream(codec, rate=fps, options=of_codec)
        stream.height, stream.width = size
        stream.pix_fmt = pix_fmt
        stream.codec_context.thread_count = 1  # the output depends on the thread count
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
