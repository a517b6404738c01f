"""Synthetic clips: the same bytes for ever, and what each kind promises of its units."""

import hashlib

import numpy as np
import pytest

from evoprune.bench.clips import synthetic_clip

SIZES = [(8, 224, 336), (32, 224, 336), (16, 336, 224), (8, 448, 672)]


def changes(clip):
    """float `[F/2 - 1, H/28, W/28]`: how far units differ from the grid before, as the largest difference of 7x7 means."""
    f, h, w, _ = clip.shape
    means = clip.reshape(f, h // 7, 7, w // 7, 7, 3).mean((2, 4))
    apart = np.abs(means[2:] - means[:-2]).max(-1)
    return apart.reshape(f // 2 - 1, 2, h // 28, 4, w // 28, 4).max((1, 3, 5))


@pytest.mark.parametrize(
    ("kind", "digest"),
    [
        ("motion", "aab44def4a7d48ab6017b698b2f66d4654ca8979d7eb05c7726fa03f34be1909"),
        ("static90", "7e0f4cafe3924cfcaf99e5cc82432e3bc0dda107c60d01ca365355e8f0bc6db4"),
        ("noise", "a51d0a84455ad9f13f521fafcd7449ea3b5e7e21494587281ed9b0f23bd3fdef"),
    ],
)
def test_the_bytes_never_change(kind, digest):
    assert hashlib.sha256(synthetic_clip(kind, 8, 224, 336).tobytes()).hexdigest() == digest


@pytest.mark.few(1)
@pytest.mark.parametrize(("frames", "height", "width"), SIZES)
def test_about_a_third_of_the_units_move(frames, height, width):
    apart = changes(synthetic_clip("motion", frames, height, width))
    assert 0.3 < (apart > 8).mean() < 0.4
    assert ((apart > 8).mean((1, 2)) > 0.2).all()
    still = np.sort(apart.flatten())[: apart.size * 55 // 100]
    assert still.min() > 0 and still.max() < 2  # nothing but the sensor's noise


@pytest.mark.few(2)
@pytest.mark.parametrize(("frames", "height", "width"), [*SIZES, (4, 28, 140), (4, 28, 112)])
def test_nine_tenths_of_the_units_stay_as_they_are(frames, height, width):
    clip = synthetic_clip("static90", frames, height, width)
    grids = clip.reshape(frames // 2, 2, height // 28, 28, width // 28, 28, 3).swapaxes(3, 4)
    same = (grids == grids[0]).all((1, 4, 5, 6)).reshape(frames // 2, -1)
    units = same.shape[1]
    assert same[0].all() and (same[1:].sum(1) == units - (units + 5) // 10).all()
    if frames > 4:
        assert len({tuple(row) for row in same[1:]}) == frames // 2 - 1


def test_pixels_are_what_the_formula_says():
    """The formulas once more, a pixel at a time, in Python's own whole numbers."""

    def hash_(n):
        n = (n ^ n >> 16) * 0x7FEB352D % 2**32
        n = (n ^ n >> 15) * 0x846CA68B % 2**32
        return n ^ n >> 16

    def mix(*numbers):
        h = 0
        for number in numbers:
            h = hash_((h + number) % 2**32)
        return h

    def byte(*numbers):
        return mix(*numbers) >> 24

    def texture(seed, y, x, c):
        total = 0
        for s, w in ((64, 3), (32, 2), (16, 1), (8, 1), (4, 1)):
            (i, p), (j, q) = divmod(y, s), divmod(x, s)
            b = [[byte(seed, s, i + di, j + dj, c) for dj in (0, 1)] for di in (0, 1)]
            t = (s - p) * ((s - q) * b[0][0] + q * b[0][1]) + p * ((s - q) * b[1][0] + q * b[1][1])
            total += w * (t // (s * s))
        return total // 8

    frames, height, width, m = 6, 112, 140, 112

    def static(f, y, x, c):
        units = [(mix(3, f // 2, u), u) for u in range(20)]
        chosen = {u for _, u in sorted(units)[:2]}
        return byte(4, f, y, x, c) if f >= 2 and y // 28 * 5 + x // 28 in chosen else texture(2, y, x, c)

    def motion(f, y, x, c):
        value = texture(5, y, x, c)
        for k, (dy, dx) in enumerate(((0, width // 24), (m // 40, -(width // 28)), (-(m // 30), width // 32))):
            r = m * (6 + k) // 48
            v, u = y - (m * (4 + 5 * k) // 16 + f * dy), x - (width * (3 + 5 * k) // 16 + f * dx)
            v = min((v + n * height for n in (-2, -1, 0, 1, 2)), key=abs)
            u = min((u + n * width for n in (-2, -1, 0, 1, 2)), key=abs)
            if v * v + u * u <= r * r:
                value = (2 * texture(6 + k, v + r, u + r, c) + byte(9, k, c)) // 3
        n = byte(10, f, y, x, c)
        return min(255, max(0, value + n % 4 + n // 4 % 4 - 3))

    random = np.random.default_rng(0)
    for kind, pixel in (
        ("motion", motion),
        ("static90", static),
        ("noise", lambda f, y, x, c: byte(1, f, y, x, c)),
    ):
        clip = synthetic_clip(kind, frames, height, width)
        for f, y, x, c in random.integers(0, clip.shape, (400, 4)).tolist():
            assert clip[f, y, x, c] == pixel(f, y, x, c), (kind, f, y, x, c)


@pytest.mark.parametrize(
    "wrong", [("film", 2, 28, 28), ("noise", 3, 28, 28), ("noise", 2, 30, 28), ("noise", 0, 28, 28)]
)
def test_only_whole_grids_of_whole_units(wrong):
    with pytest.raises(ValueError, match=r"synthetic|whole"):
        synthetic_clip(*wrong)
