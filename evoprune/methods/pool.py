"""Average pooling of neighbouring tokens after the encoder: a baseline in EarlyTom (arXiv 2605.30010) and many other papers."""

from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.indices import ascending
from evoprune.pruning.shapes import smaller_frame
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Pool(Selector):
    """A block lies inside one frame pair, unless there are fewer tokens than frame pairs: then it spans whole ones."""

    name = "pool"
    source = "arXiv 2605.30010, a baseline there"
    exact = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        count, height, width = tokens.grid
        pairs = min(count, keep)
        shape = (pairs, *smaller_frame(height, width, keep // pairs))
        sizes, device = zip(tokens.grid, shape, strict=True), tokens.owner.device
        block, middle = zip(*(_blocks(n, blocks, device) for n, blocks in sizes), strict=True)
        places = torch.meshgrid(*middle, indexing="ij")
        kept = (places[0] * height + places[1]) * width + places[2]
        blocks = torch.meshgrid(*block, indexing="ij")
        owner = (blocks[0] * shape[1] + blocks[1]) * shape[2] + blocks[2]
        return Selection(kept.flatten(), owner.flatten())


def _blocks(length: int, count: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[length]`, which of `count` blocks of nearly equal length each place is in; int64 `[count]`, their middle places."""
    edges = ascending(count + 1, device) * length // count
    return ascending(count, device).repeat_interleave(edges.diff()), (edges[:-1] + edges[1:] - 1) // 2
