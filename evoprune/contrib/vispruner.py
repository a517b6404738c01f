"""VisPruner: keeps attended tokens, then tokens that differ from each other."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import BLOCK, Count, Share, ranked
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap, spread


@dataclass(frozen=True)
class VisPruner(Selector):
    """VisPruner (arXiv 2412.01818): keeps attended tokens, then tokens that differ from each other.

    Each frame pair gets an equal share of the budget. A fraction `important` of it goes to the most attended tokens. The other
    tokens, ordered by attention, are thinned out in rounds. In each round, the tokens at even positions are compared with the
    tokens at odd positions. Up to `step` of the tokens at even positions, those with the highest cosine to any token at an odd
    position, are removed.

    Differences from the authors' code: this method uses the attention that each token receives instead of the class token's
    attention, because Qwen's tower has no class token. The authors' code fails on odd numbers of tokens.
    """

    name = "vispruner"
    source = "arXiv 2412.01818"
    needs = frozenset({"attention"})

    important: Share = 0.5  # share of the kept tokens that are selected by attention
    step: Count = 8  # the maximum number of tokens to remove in a round

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = tokens.by_pair(snap(tokens.attention))
        unit = tokens.by_pair(tokens.normalised)
        return Selection.of_pairs(map(self.kept, attention, unit, spread(keep, len(unit))), unit.shape[1])

    def kept(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """Return int64 `[keep]`, ascending: the places that a frame pair keeps.

        Args:
            attention: `[n]`, the attention that each token of the frame pair receives.
            unit: `[n, D]`, the tokens, scaled to unit length.
            keep: The number of places to keep.
        """
        order = ranked(attention)
        first = int(self.important * keep)
        rest = order[first:]
        distinct = rest[most_distinct(unit[rest], keep - first, self.step)]
        return torch.cat([order[:first], distinct]).sort().values


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """Remove similar rows in rounds, up to `step` rows per round, until `keep` rows are left. Returns int64 `[keep]`.

    `unit` is `[n, D]`, with the most attended row first.
    """
    if keep == 0:
        return arange_on(0, unit.device)
    left = arange_on(len(unit), unit.device)
    while len(left) > keep:
        even = left[::2]
        odd = left[1::2]
        like = torch.cat([snap(unit[block] @ unit[odd].T).amax(1) for block in even.split(BLOCK)])
        # If cosines are equal, the last row is removed. A stable sort of the reversed rows puts it first.
        order = len(even) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([even[order[min(step, len(left) - keep) :]], odd])
    return left
