"""VisPruner (arXiv 2412.01818): half of the tokens by attention, the other half because they differ from each other.

As in the paper: important tokens receive most attention. The rest is sorted by attention and divided into every second
token and those between. Each round compares the two halves and removes the tokens of the first half that are most
similar to one of the second, until the wanted number of diverse tokens is left.
Adapted: between rounds the order of attention stays; the public code sorts the survivors anew, which selects other
tokens. Qwen's tower has no class token, so attention is the mean over all queries of the last full-attention layer.
Similarity is the cosine of the features that the language model would read. An image of the paper is a frame pair here,
and all frame pairs have equal shares. Attention and cosines are rounded, so equal tokens are ties: of equally similar
tokens the one with less attention goes, and of equally attended ones the one with the higher index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import BLOCK
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisPruner(Selector):
    """O(n^3 D / step) for a frame pair of n tokens, memory O(N D). Fields:

    important: share of the kept tokens that attention selects.
    step: the most tokens that one round removes.
    """

    name: ClassVar[str] = "vispruner"
    source: ClassVar[str] = "arXiv 2412.01818"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    important: float = 0.5
    step: int = 8

    def __post_init__(self):
        if not 0 <= self.important <= 1 or self.step < 1:
            raise ValueError("important is a share from 0 to 1, step at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        order = snap(tokens.attention).view(pairs, per_pair).argsort(dim=1, descending=True, stable=True)
        unit = F.normalize(tokens.features.float(), dim=1).view(pairs, per_pair, -1)
        selected = []
        for pair, share in enumerate(spread(keep, pairs)):
            first = math.floor(self.important * share + 0.5)
            important, rest = order[pair, :first], order[pair, first:]
            kept = torch.cat([important, rest[most_distinct(unit[pair, rest], share - first, self.step)]])
            selected.append(kept.sort().values + pair * per_pair)
        return Selection(torch.cat(selected))


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """Removes similar rows in rounds until `keep` are left.

    Args:
        unit: `[n, D]`, of length one, the most attended first.
        step: the most rows that one round removes.

    Returns:
        int64 `[keep]`, the rows that are left, ascending.
    """
    left = ascending(len(unit) if keep else 0, unit.device)
    while len(left) > keep:
        one, other = left[::2], unit[left[1::2]]
        like = torch.cat([snap(unit[some] @ other.T).amax(1) for some in one.split(BLOCK)])
        # Of equals the last goes: a stable sort of the reversed rows puts it first.
        going = len(one) - 1 - like.flip(0).argsort(descending=True, stable=True)[: min(step, len(left) - keep)]
        stays = torch.ones(len(left), dtype=torch.bool, device=unit.device)
        stays[2 * going] = False
        left = left[stays]
    return left
