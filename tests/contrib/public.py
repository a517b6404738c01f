"""Reproducible tokens and layers of a language model: float32 from the integers of a seeded generator."""

from math import prod

import numpy as np
import torch

from evoprune.methods import LayerTokens, Tokens

WIDTH = 32


def nearly_normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    """Return float32 sums of four uniform numbers between -1 and 1, multiples of 1/512, identical on every machine."""
    return (random.integers(-512, 512, (4, *shape)).sum(0) / 512).astype(np.float32)


def _random(random: np.random.Generator, pairs: int, places: int) -> np.ndarray:
    """Return features without structure."""
    return nearly_normal(random, pairs, places, WIDTH)


def _clustered(random: np.random.Generator, pairs: int, places: int) -> np.ndarray:
    """Return features of twelve objects at random places."""
    things, which = nearly_normal(random, 12, WIDTH), random.integers(0, 12, (pairs, places))
    return things[which] + np.float32(0.5) * nearly_normal(random, pairs, places, WIDTH)


def _video(random: np.random.Generator, pairs: int, places: int) -> np.ndarray:
    """Return features of three related scenes. Half of a scene's places barely change; the others change fast or slowly."""
    common, made = nearly_normal(random, places, WIDTH), []
    for length in (pairs // 2, pairs // 4, pairs - pairs // 2 - pairs // 4):
        scene = np.float32(0.5) * common + nearly_normal(random, places, WIDTH)
        moving = np.ones((places, 1), np.float32) / 16
        moving[random.permutation(places)[: places // 2]] = 1
        for _ in range(length):
            pace = np.float32(random.choice([0.125, 0.5, 1.0]))
            scene = scene + pace * moving * (nearly_normal(random, places, WIDTH) - scene / 4)
            made.append(scene)
    return np.stack(made)


KINDS = {"random": _random, "clustered": _clustered, "video": _video}


def public_tokens(kind: str, seed: int, grid: tuple[int, int, int]) -> Tokens:
    """Return tokens with everything that a method may need. No two units receive equal attention."""
    random, n = np.random.Generator(np.random.PCG64(seed)), prod(grid)
    features = KINDS[kind](random, grid[0], grid[1] * grid[2]).reshape(n, WIDTH)
    given = {
        "attention": (random.permutation(n) + 1).astype(np.float32) / np.float32(n),
        "keys": nearly_normal(random, n, 24),
        "question": nearly_normal(random, 12, WIDTH),
        "middle": nearly_normal(random, n, 24),
    }
    tensors = {name: torch.from_numpy(each) for name, each in given.items()}
    return Tokens(torch.from_numpy(features), torch.arange(n), grid, given=tensors)


# Numbers of columns before the video (VisiPruner's code assumes 35) and after it.
BEFORE, TEXT, HEADS, KV_HEADS, DIM = 35, 12, 4, 2, 8


def public_layer(kind: str, seed: int, grid: tuple[int, int, int], left: int, due: bool = True) -> LayerTokens:
    """Return visual tokens after a layer. `following`, `unrotated` and `evened` have their own queries and keys."""
    random, n = np.random.Generator(np.random.PCG64(seed + 1000)), prod(grid)
    columns = BEFORE + n + TEXT
    inside = torch.cartesian_prod(torch.arange(grid[1]) / grid[1], torch.arange(grid[2]) / grid[2])

    def layer(**more) -> LayerTokens:
        tensors = [
            torch.from_numpy(nearly_normal(random, *shape))
            for shape in ((TEXT, HEADS, DIM), (columns, KV_HEADS, DIM), (columns, KV_HEADS, DIM))
        ]
        return LayerTokens(
            1, left, due, public_tokens(kind, seed, grid).features, torch.arange(BEFORE, BEFORE + n),
            torch.arange(grid[0]).repeat_interleave(grid[1] * grid[2]), inside.repeat(grid[0], 1), *tensors, None,
            torch.from_numpy(nearly_normal(np.random.Generator(np.random.PCG64(seed + 2000)), n, 16)),
            torch.from_numpy(nearly_normal(np.random.Generator(np.random.PCG64(seed + 3000)), TEXT, 16)), {}, **more,
        )  # fmt: skip

    others = [layer() for _ in range(3)]
    following, unrotated, evened = ((lambda other=other: other) for other in others)
    return layer(following=following, unrotated=unrotated, evened=evened)
