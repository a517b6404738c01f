"""VisPruner: attended tokens, then tokens that differ from each other."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import BLOCK, Count, Share, ranked
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap, spread


@dataclass(frozen=True)
class VisPruner(Selector):
    """VisPruner (arXiv 2412.01818): keep attended tokens, then tokens that differ from each other.

    A frame pair gets an equal share of the budget. `important` of it goes to the most attended tokens. The rest, most attended
    first, is thinned in rounds: every second token is compared with the tokens in between, and up to `step` of those with the
    greatest cosine to any of these are removed.

    What differs: attention received replaces the attention of a class token. The authors' code fails on odd numbers of tokens.
    """

    name = "vispruner"
    source = "arXiv 2412.01818"
    needs = frozenset({"attention"})

    important: Share = 0.5  # share of the kept tokens that attention selects
    step: Count = 8  # maximum number of tokens that a round removes

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = tokens.by_pair(snap(tokens.attention))
        unit = tokens.by_pair(tokens.normalised)
        return Selection.of_pairs(map(self.kept, attention, unit, spread(keep, len(unit))), unit.shape[1])

    def kept(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """Return int64 `[keep]`, ascending: the places that a frame pair keeps, given `attention` (`[n]`) and `unit` (`[n, D]`)."""
        order = ranked(attention)
        first = int(self.important * keep)
        rest = order[first:]
        distinct = rest[most_distinct(unit[rest], keep - first, self.step)]
        return torch.cat([order[:first], distinct]).sort().values


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """Return int64 `[keep]`: the rows left after rounds that remove up to `step` similar rows each.

    `unit`: `[n, D]`, the most attended row first.
    """
    if keep == 0:
        return arange_on(0, unit.device)
    left = arange_on(len(unit), unit.device)
    while len(left) > keep:
        even = left[::2]
        odd = left[1::2]
        like = torch.cat([snap(unit[block] @ unit[odd].T).amax(1) for block in even.split(BLOCK)])
        # Among equals the last is removed: a stable sort of the reversed rows puts it first.
        order = len(even) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([even[order[min(step, len(left) - keep) :]], odd])
    return left
