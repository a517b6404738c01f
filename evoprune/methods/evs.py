"""EVS, Efficient Video Sampling (arXiv 2510.14624; in vLLM `--video-pruning-rate`): what repeats the grid before it goes.

Faithful: dissimilarity 1 - cosine of each token to the one at the same place in the previous grid; the first grid is kept whole;
of all other tokens of the video the most dissimilar are kept, at their own positions. So at least one whole grid is left: the
nearest count, where the budget is smaller, is H * W. Adapted: cosines are rounded so that equals are ties, which go by index.
`evs-nofloor` is ours: the first grid has no privilege and is compared with the second, so that every budget can be reached.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import highest
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Evs(Selector):
    """O(N D)."""

    name: ClassVar[str] = "evs"
    exact: ClassVar[bool] = False

    def select(self, tokens: Tokens, keep: int) -> Selection:
        change = dissimilarity(tokens)
        change[0] = torch.inf
        return Selection(highest(change.flatten(), max(keep, change.shape[1])))


@dataclass(frozen=True)
class EvsNoFloor(Evs):
    """O(N D)."""

    name: ClassVar[str] = "evs-nofloor"
    exact: ClassVar[bool] = True

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(highest(dissimilarity(tokens).flatten(), keep))


def dissimilarity(tokens: Tokens) -> torch.Tensor:
    """float32 `[T, H * W]`: 1 - cosine to the same place one grid before, of the first grid to the second; 0 if it is alone."""
    grids = tokens.features.view(tokens.grid[0], -1, tokens.features.shape[1])
    later = 1 - snap(torch.cosine_similarity(grids[1:].float(), grids[:-1].float(), dim=-1))
    first = later[:1] if len(later) else torch.zeros(grids.shape[:2], device=grids.device)
    return torch.cat([first, later])
