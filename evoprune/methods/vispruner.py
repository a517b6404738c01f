"""VisPruner (arXiv 2412.01818): half of the tokens because they are attended to, the others because they are unlike each other.

Faithful: important tokens are those that receive most attention; of the rest, in the order of attention, every second one is
compared with those between, and those most similar to one of them are removed, round after round, until as many diverse tokens
are left as are wanted. Adapted: Qwen's tower has no class token, so attention is the mean over all queries, at the last layer
that sees whole grids; similarity is that of the tokens that the language model would read; an image of the paper is a grid
here, and grids have equal shares. Attention and cosines are rounded so that equals are ties: of equally similar tokens the one
later in the order of attention goes, and that order goes by index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.ranking import BLOCK
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisPruner(Selector):
    """O(n^3 D / step) a grid of n tokens, memory O(N D). Fields:

    important: share of the tokens kept that are chosen by attention.
    step: how many are removed in a round, at most.
    """

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    important: float = 0.5
    step: int = 8

    def __post_init__(self):
        if not 0 <= self.important <= 1 or self.step < 1:
            raise ValueError("important is a share from 0 to 1, step at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        order = snap(tokens.attention).view(grids, per_pair).argsort(dim=1, descending=True, stable=True)
        unit = F.normalize(tokens.features.float(), dim=1).view(grids, per_pair, -1)
        chosen = []
        for grid, share in enumerate(spread(keep, grids)):
            first = math.floor(self.important * share + 0.5)
            important, rest = order[grid, :first], order[grid, first:]
            kept = torch.cat([important, rest[most_distinct(unit[grid, rest], share - first, self.step)]])
            chosen.append(kept.sort().values + grid * per_pair)
        return Selection(torch.cat(chosen))


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: what is left of the rows of `unit` (`[n, D]`, of length one, best first) in rounds of `step`."""
    left = torch.arange(len(unit) if keep else 0, device=unit.device)
    while len(left) > keep:
        one, other = left[::2], unit[left[1::2]]
        like = torch.cat([snap(unit[some] @ other.T).amax(1) for some in one.split(BLOCK)])
        # Of equals the last goes: sorted from the back, so that the first of them is the last.
        going = len(one) - 1 - like.flip(0).argsort(descending=True, stable=True)[: min(step, len(left) - keep)]
        stays = torch.ones(len(left), dtype=torch.bool, device=unit.device)
        stays[2 * going] = False
        left = left[stays]
    return left
