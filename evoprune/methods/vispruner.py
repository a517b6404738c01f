"""VisPruner (arXiv 2412.01818): half of the tokens by attention, the other half because they differ from each other.

As in the paper: important tokens receive most attention. The rest is sorted by attention and divided into every second
token and those between. Each round compares the two halves and removes the tokens of the first half that are most
similar to one of the second, until the wanted number of diverse tokens is left. As in the authors' code
(Theia-4869/VisPruner), a round orders the tokens anew: what is left of the first half, the most similar first, and then
the second half. The important tokens are rounded down.
Adapted: Qwen's tower has no class token, so attention is the mean over all queries of the last full-attention layer.
Similarity is the cosine of the features that the language model would read; theirs compares the tower's. An image of
the paper is a frame pair here, and all frame pairs have equal shares. Odd numbers of tokens are possible: the first
half then has one more. Attention and cosines are rounded, so equal tokens are ties: of equally similar tokens the later
one in the order goes.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
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
        check_ranges(self, important="[0, 1]", step="[1, inf)")

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        order = snap(tokens.attention).view(pairs, per_pair).argsort(dim=1, descending=True, stable=True)
        unit = F.normalize(tokens.features.float(), dim=1).view(pairs, per_pair, -1)
        selected = []
        for pair, share in enumerate(spread(keep, pairs)):
            first = int(self.important * share)
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
        int64 `[keep]`, the rows that are left, in the order of the last round.
    """
    left = ascending(len(unit) if keep else 0, unit.device)
    while len(left) > keep:
        one, other = left[::2], left[1::2]
        like = torch.cat([snap(unit[some] @ unit[other].T).amax(1) for some in one.split(BLOCK)])
        # Of equals the last goes: a stable sort of the reversed rows puts it first.
        order = len(one) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([one[order[min(step, len(left) - keep) :]], other])
    return left
