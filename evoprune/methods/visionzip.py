"""VisionZip (arXiv 2412.04467): the most attended tokens as they are, and means of the others around evenly spaced ones.

Faithful: dominant tokens are those that receive most attention; of the rest, taken in order, evenly spaced ones are targets, and
each other token goes to the target with the most similar key and is averaged into it. 85% of the tokens kept are dominant (the
paper's 54 of 64 and 162 of 192). Adapted: Qwen's tower has no class token, so attention is the mean over all queries, at the
last layer that sees whole grids, where the keys are taken too; a target counts in its mean as much as what goes into it, and
stays at its own place; an image of the paper is a grid here, and grids have equal shares. Attention and cosines are rounded so
that equals are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.ranking import gathered, highest, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisionZip(Selector):
    """O(N K d / T) for T grids and keys of d numbers. Fields:

    dominant: share of the tokens kept that are chosen by attention.
    """

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "keys"})

    dominant: float = 0.85

    def __post_init__(self):
        if not 0 <= self.dominant <= 1:
            raise ValueError("dominant is a share from 0 to 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        attention = snap(tokens.attention).view(grids, per_pair)
        keys = F.normalize(tokens.keys, dim=1).view(grids, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(grids, per_pair)
        for grid, share in enumerate(spread(keep, grids)):
            local = zipped(attention[grid], keys[grid], share, round(self.dominant * share))
            into[grid] = torch.where(local < 0, -1, local + grid * per_pair)
        return gathered(into.flatten())


def zipped(attention: torch.Tensor, keys: torch.Tensor, keep: int, dominant: int) -> torch.Tensor:
    """int64 `[n]`: the token of a grid that each goes into, itself if it stays, -1 for none.

    Args:
        attention: `[n]`, keys: `[n, d]` of length one.
        keep: how many stay. dominant: how many of them as they are; without others, what does not stay is dropped.
    """
    index = torch.arange(len(attention), device=attention.device)
    into = torch.full_like(index, -1)
    best = highest(attention, dominant)
    into[best] = best
    rest = index[into < 0]
    targets = rest[index[: keep - dominant] * len(rest) // max(1, keep - dominant)]
    if len(targets):
        into[rest] = targets[nearest(keys[rest], keys[targets])]
        into[targets] = targets
    return into
