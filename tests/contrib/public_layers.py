"""A layer of a language model that anyone can make again, beside the tokens of `public_tokens.py`: queries, keys and values."""

from math import prod

import numpy as np
import torch

from evoprune.contrib.language import LayerTokens
from tests.contrib.public_tokens import nearly_normal, public_tokens

BEFORE, TEXT, HEADS, KV_HEADS, DIM = (
    35,
    12,
    4,
    2,
    8,
)  # columns before the video and after it; VisiPruner's code counts on 35


def public_layer(kind: str, seed: int, grid: tuple[int, int, int], left: int, due: bool = True) -> LayerTokens:
    """Visual tokens behind a layer. `following`, `unrotated` and `evened` have queries and keys of their own."""
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
