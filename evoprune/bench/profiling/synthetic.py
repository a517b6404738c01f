"""Clips made by formula, for benchmarks: the same bytes everywhere, for ever. Whole numbers only, and one hash as random generator.

A *grid* is two frames, a *unit* 28x28 pixels of both, or 32x32. f, y, x, c count frames, rows, columns and colour channels from 0.

`noise`     byte(1, f, y, x, c): no pixel has to do with another. The most there can be to encode.
`static90`  Both frames of the first grid are texture(2). Every later grid is equal to it but for one unit in ten (a half counts as
            one): those with the smallest mix(3, grid, unit), of equal ones the first; their pixels are byte(4, f, y, x, c). So
            other units change from grid to grid, and go back to what they were.
`motion`    Ordinary motion: texture(5), and before it three textured discs that go their way steadily, out at one side and in
            again at the other; all under sensor noise of -3 to 3. About a third of the units change visibly from grid to grid
            (of a picture that is only a few units wide, more).
"""

from collections.abc import Callable
from functools import partial

import numpy as np

from evoprune.bench.profiling.settings import SYNTHETIC

UNIT, PAIR = 28, 2  # side of a merge unit in pixels, if not given; frames in a grid
SCALES = ((64, 3), (32, 2), (16, 1), (8, 1), (4, 1))
Draw = Callable[[int], np.ndarray]  # f to integers [H, W, 3], 0 to 255


def clip(content: str, frames: int, height: int, width: int, unit: int = UNIT) -> np.ndarray:
    """uint8 `[frames, height, width, 3]`: one of `settings.SYNTHETIC`. Raises ValueError: another, or sizes of no whole grids."""
    if content not in SYNTHETIC:
        raise ValueError(f"no synthetic clip {content!r}: one of {', '.join(SYNTHETIC)}")
    if min(frames, height, width) < 1 or frames % PAIR or height % unit or width % unit:
        raise ValueError(f"{frames} frames of {height}x{width} are not whole grids of whole units")
    draw = {"motion": _motion, "static90": partial(_static, unit=unit), "noise": _noise}[content](height, width)
    made = np.empty((frames, height, width, 3), np.uint8)
    for f in range(frames):  # one at a time, for the sake of memory
        made[f] = draw(f)
    return made


def _hash(n: np.ndarray) -> np.ndarray:
    """lowbias32, https://nullprogram.com/blog/2018/07/31/; uint32 of one dimension or more, whose products wrap silently."""
    n = (n ^ (n >> np.uint32(16))) * np.uint32(0x7FEB352D)
    n = (n ^ (n >> np.uint32(15))) * np.uint32(0x846CA68B)
    return n ^ (n >> np.uint32(16))


def _mix(*numbers: int | np.ndarray) -> np.ndarray:
    """Of each number in turn the hash of it and what was made before: uint32, of the shape that the numbers broadcast to."""
    made = np.zeros(1, np.uint32)
    for number in numbers:
        made = _hash(made + np.atleast_1d(number).astype(np.uint32))
    return made


def _byte(*numbers: int | np.ndarray) -> np.ndarray:
    """int64, 0 to 255."""
    return (_mix(*numbers) >> np.uint32(24)).astype(np.int64)


def _axes(height: int, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """y, x and c, which broadcast."""
    return np.arange(height)[:, None, None], np.arange(width)[:, None], np.arange(3)


def _texture(seed: int, height: int, width: int) -> np.ndarray:
    """int64 `[height, width, 3]`, 0 to 255: smooth on each of `SCALES`, between bytes at every `s`-th pixel."""
    made = np.zeros((height, width, 3), np.int64)
    for s, weight in SCALES:
        b = _byte(seed, s, *_axes((height - 1) // s + 2, (width - 1) // s + 2))
        i, p = np.divmod(np.arange(height), s)
        j, q = np.divmod(np.arange(width)[:, None], s)
        above, below = ((s - q) * b[row][:, j[:, 0]] + q * b[row][:, j[:, 0] + 1] for row in (i, i + 1))
        p = p[:, None, None]
        made += weight * (((s - p) * above + p * below) // (s * s))
    return made // sum(weight for _, weight in SCALES)


def _noise(height: int, width: int) -> Draw:
    return lambda f: _byte(1, f, *_axes(height, width))


def _static(height: int, width: int, unit: int) -> Draw:
    still, columns = _texture(2, height, width), width // unit
    units = height // unit * columns

    def draw(f: int) -> np.ndarray:
        if f < PAIR:
            return still
        new = np.zeros(units, bool)
        new[_mix(3, f // PAIR, np.arange(units)).argsort(kind="stable")[: (units + 5) // 10]] = True
        new = new.reshape(-1, columns, 1).repeat(unit, 0).repeat(unit, 1)
        return np.where(new, _byte(4, f, *_axes(height, width)), still)

    return draw


def _motion(height: int, width: int) -> Draw:
    still, m = _texture(5, height, width), min(height, width)
    radii = [m * (6 + k) // 48 for k in range(3)]
    skins = [(2 * _texture(6 + k, 2 * r + 1, 2 * r + 1) + _byte(9, k, np.arange(3))) // 3 for k, r in enumerate(radii)]
    speeds = ((0, width // 24), (m // 40, -(width // 28)), (-(m // 30), width // 32))

    def draw(f: int) -> np.ndarray:
        picture = still.copy()
        for k, (r, skin, (dy, dx)) in enumerate(zip(radii, skins, speeds, strict=True)):
            v = _away(m * (4 + 5 * k) // 16 + f * dy, height)
            u = _away(width * (3 + 5 * k) // 16 + f * dx, width)
            rows, columns = np.nonzero(v[:, None] ** 2 + u**2 <= r * r)
            picture[rows, columns] = skin[v[rows] + r, u[columns] + r]
        n = _byte(10, f, *_axes(height, width))
        return (picture + n % 4 + n // 4 % 4 - 3).clip(0, 255)

    return draw


def _away(centre: int, size: int) -> np.ndarray:
    """int64 `[size]`: how far each row, or column, is from `centre`, the short way round the edges."""
    return (np.arange(size) - centre + size // 2) % size - size // 2
