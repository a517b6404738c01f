"""Baselines that every method must beat: no pruning, random selection, fewer or smaller frames, average pooling, and DivPrune."""

from dataclasses import dataclass

import torch

from evoprune.backend import greedy_cosine
from evoprune.methods.base import InputMethod, Method, Selector
from evoprune.methods.plans import Grid, spread
from evoprune.methods.types import Selection, Tokens, arange_on


@dataclass(frozen=True)
class Nothing(Method):
    """Keeps every token, regardless of the budget."""

    source = "this project; the unpruned model"


@dataclass(frozen=True)
class Random(Selector):
    """Draws random tokens from each frame pair without replacement, using `tokens.seed` as the seed."""

    name = "random"
    source = "this project; a common baseline"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs = tokens.grid[0]
        per_pair = tokens.grid[1] * tokens.grid[2]
        generator = torch.Generator("cpu").manual_seed(tokens.seed)  # the same draw on all devices
        drawn = (
            torch.randperm(per_pair, generator=generator, dtype=torch.int64, device="cpu")[:share].sort().values
            for share in spread(keep, pairs)
        )
        return Selection.of_pairs(drawn, per_pair)


@dataclass(frozen=True)
class Subsample(InputMethod):
    """Encodes only as many frame pairs as the budget allows, but at least one."""

    name = "subsample"
    source = "arXiv 2605.30010, as a baseline"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width


@dataclass(frozen=True)
class Downscale(InputMethod):
    """Scales frames down to a lower resolution and keeps all frame pairs.

    The new height and width are whole numbers of units (at least one), and the aspect ratio stays nearly the same.
    """

    name = "downscale"
    source = "VTC-Bench, as a baseline"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return count, *smaller_frame(height, width, keep // count)


@dataclass(frozen=True)
class Pool(Selector):
    """Averages blocks of neighboring tokens.

    Each block lies within a single frame pair, unless there are fewer tokens to keep than frame pairs. In that case, each block
    consists of one or more entire frame pairs.
    """

    name = "pool"
    source = "arXiv 2605.30010, as a baseline"
    exact = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        count, height, width = tokens.grid
        pairs = min(count, keep)
        shape = (pairs, *smaller_frame(height, width, keep // pairs))
        sizes = zip(tokens.grid, shape, strict=True)
        device = tokens.unit_to_row.device
        block, middle = zip(*(_blocks(n, blocks, device) for n, blocks in sizes), strict=True)
        places = torch.meshgrid(*middle, indexing="ij")
        kept = (places[0] * height + places[1]) * width + places[2]
        blocks = torch.meshgrid(*block, indexing="ij")
        unit_to_token = (blocks[0] * shape[1] + blocks[1]) * shape[2] + blocks[2]
        return Selection(kept.flatten(), unit_to_token.flatten())


def _blocks(length: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Split `length` positions into `count` blocks of nearly equal length.

    Returns:
        int64 `[length]`, each position's block index, and int64 `[count]`, each block's middle position.
    """
    edges = arange_on(count + 1, device) * length // count
    return arange_on(count, device).repeat_interleave(edges.diff()), (edges[:-1] + edges[1:] - 1) // 2


@dataclass(frozen=True)
class DivPrune(Selector):
    """Keeps diverse tokens, greedily maximizing the smallest cosine distance between any two of them."""

    name = "divprune"
    source = "arXiv 2503.02175"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(greedy_cosine(tokens.normalised, None, None, 1.0, keep, True))


def smaller_frame(height: int, width: int, most: int) -> tuple[int, int]:
    """Return the (height, width) of the largest frame with at most `most` units and approximately the same aspect ratio.

    The frame has at least 1 x 1 units. The function tries every whole number of units for one dimension, derives the other
    dimension from the aspect ratio, and rounds it both up and down. Among frames with the same number of units, it prefers the one
    closest to the original aspect ratio.
    """
    sizes = {(1, 1)}
    for rows in range(1, height + 1):
        sizes |= {(rows, max(1, rows * width // height)), (rows, -(-rows * width // height))}
    for columns in range(1, width + 1):
        sizes |= {(max(1, columns * height // width), columns), (-(-columns * height // width), columns)}
    fitting = [(h, w) for h, w in sizes if h * w <= most or (h, w) == (1, 1)]

    def rank(size: tuple[int, int]) -> tuple[float, ...]:
        h, w = size
        stretch = max(h * width, w * height) / min(h * width, w * height)
        return -h * w, stretch, h

    return min(fitting, key=rank)
