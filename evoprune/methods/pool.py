"""Average pooling of neighbouring tokens after the encoder: a baseline in EarlyTom (arXiv 2605.30010) and many others.

Ours: blocks are those of a smaller picture in nearly the same ratio, so that a budget gives `pool` and `downscale` equally many
tokens; the sides of blocks differ by a unit where they do not divide. A block's token sits at its middle unit.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.shapes import smaller_frame
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Pool(Selector):
    """Blocks lie inside one grid as long as every grid can have a token, else a block is several whole grids."""

    name: ClassVar[str] = "pool"
    exact: ClassVar[bool] = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        count, height, width = tokens.grid
        grids = min(count, keep)
        shape = (grids, *smaller_frame(height, width, keep // grids))
        block, middle = zip(*(_blocks(n, parts) for n, parts in zip(tokens.grid, shape, strict=True)), strict=True)
        places = torch.meshgrid(*middle, indexing="ij")
        kept = (places[0] * height + places[1]) * width + places[2]
        blocks = torch.meshgrid(*block, indexing="ij")
        owner = (blocks[0] * shape[1] + blocks[1]) * shape[2] + blocks[2]
        return Selection(kept.flatten().to(tokens.owner.device), owner.flatten().to(tokens.owner.device))


def _blocks(length: int, parts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The number of the part that each of `length` places is in, and the middle place of each part; parts as even as can be."""
    edges = torch.tensor([i * length // parts for i in range(parts + 1)])
    return torch.arange(parts).repeat_interleave(edges.diff()), (edges[:-1] + edges[1:] - 1) // 2
