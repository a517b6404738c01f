"""VisPruner (arXiv 2412.01818): half of the tokens by attention, the other half because they differ from each other."""

from dataclasses import dataclass

import torch

from evoprune.methods.base import Selector
from evoprune.methods.settings import Count, Share
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import BLOCK, of_pairs, ranked, snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisPruner(Selector):
    name = "vispruner"
    source = "arXiv 2412.01818"
    needs = frozenset({"attention"})

    important: Share = 0.5  # share of the kept tokens that attention selects
    step: Count = 8  # the most tokens that one round removes

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention, unit = tokens.by_pair(snap(tokens.attention)), tokens.by_pair(tokens.normalised)
        return of_pairs(map(self.kept, attention, unit, spread(keep, len(unit))), unit.shape[1])

    def kept(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """int64 `[keep]`, ascending: what a frame pair keeps, by `attention` (`[n]`) and `unit` (`[n, D]`)."""
        order, first = ranked(attention), int(self.important * keep)
        rest = order[first:]
        distinct = rest[most_distinct(unit[rest], keep - first, self.step)]
        return torch.cat([order[:first], distinct]).sort().values


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """int64 `[keep]`: the rows of `unit` (`[n, D]`, the most attended first) left when rounds remove up to `step` similar ones."""
    left = ascending(len(unit) if keep else 0, unit.device)
    while len(left) > keep:
        one, other = left[::2], left[1::2]
        like = torch.cat([snap(unit[some] @ unit[other].T).amax(1) for some in one.split(BLOCK)])
        # Of equals the last goes: a stable sort of the reversed rows puts it first.
        order = len(one) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([one[order[min(step, len(left) - keep) :]], other])
    return left
