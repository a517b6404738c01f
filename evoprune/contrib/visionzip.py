"""VisionZip (arXiv 2412.04467) and VisPruner (arXiv 2412.01818): the most attended tokens, and something of the others."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.plans import spread
from evoprune.methods.ranking import BLOCK, centre_weights, closest, gathered, highest, of_pairs, ranked, snap
from evoprune.methods.settings import Count, Share
from evoprune.methods.types import Selection, Tokens, ascending


@dataclass(frozen=True)
class VisionZip(Selector):
    """The most attended tokens as they are, and means of the other tokens."""

    name = "visionzip"
    source = "arXiv 2412.04467"
    needs = frozenset({"attention", "keys"})

    dominant: Share = 0.85  # share of the kept tokens that attention selects

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention, keys = snap(tokens.attention), F.normalize(tokens.keys, dim=1)
        into = torch.full_like(tokens.owner, -1)
        index = tokens.by_pair(ascending(len(into), into.device))
        for here, share in zip(index, spread(keep, len(index)), strict=True):
            best = here[highest(attention[here], round(self.dominant * share))]
            into[best] = best
            rest, count = here[into[here] < 0], share - len(best)
            if count:  # otherwise the other tokens are dropped
                targets = rest[:: len(rest) // count][:count]
                into[rest] = targets[closest(keys[rest], keys[targets])[1]]
                into[targets] = targets
        return gathered(into, centre_weights(into, 0.5))


@dataclass(frozen=True)
class VisPruner(Selector):
    """Half of the tokens by attention, the other half because they differ from each other."""

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
