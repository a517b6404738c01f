"""The VisPruner method, which keeps the most attended tokens, followed by tokens that differ from each other."""

from dataclasses import dataclass

import torch

from evoprune.contrib.shared import BLOCK, Count, Share, ranked
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap, spread


@dataclass(frozen=True)
class VisPruner(Selector):
    """VisPruner (arXiv 2412.01818): keeps the most attended tokens, then tokens that differ from each other.

    Each frame pair gets an equal share of the budget, and a fraction `important` of it goes to the most attended tokens. The other
    tokens are ordered by attention and thinned out in rounds. Each round compares tokens at even and odd positions, and removes up
    to `step` even-position tokens with the highest cosine similarity to any odd-position token.

    Differences from the authors' code: because Qwen's vision tower has no class token, this method replaces the class token's
    attention with the attention that a token receives within its frame pair. The authors' code fails on odd numbers of tokens.
    """

    name = "vispruner"
    source = "arXiv 2412.01818"
    needs = frozenset({"attention"})

    important: Share = 0.5  # fraction of the kept tokens selected by attention
    step: Count = 8  # maximum number of tokens to remove per round

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = tokens.by_pair(snap(tokens.attention))
        unit = tokens.by_pair(tokens.normalised)
        return Selection.of_pairs(map(self.kept, attention, unit, spread(keep, len(unit))), unit.shape[1])

    def kept(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """Select the positions to keep in a single frame pair.

        Args:
            attention: `[n]`, the attention received by each token of the frame pair.
            unit: `[n, D]`, the tokens, scaled to unit length.
            keep: The number of positions to keep.

        Returns:
            int64 `[keep]`, ascending.
        """
        order = ranked(attention)
        first = int(self.important * keep)
        rest = order[first:]
        distinct = rest[most_distinct(unit[rest], keep - first, self.step)]
        return torch.cat([order[:first], distinct]).sort().values


def most_distinct(unit: torch.Tensor, keep: int, step: int) -> torch.Tensor:
    """Remove similar rows in rounds, up to `step` rows per round, until `keep` rows are left.

    `unit` is `[n, D]`, unit-length rows, with the most attended row first.

    Returns:
        int64 `[keep]`, the indices of the remaining rows.
    """
    if keep == 0:
        return arange_on(0, unit.device)
    left = arange_on(len(unit), unit.device)
    while len(left) > keep:
        even = left[::2]
        odd = left[1::2]
        like = torch.cat([snap(unit[block] @ unit[odd].T).amax(1) for block in even.split(BLOCK)])
        # If cosines are equal, the last row is removed, because the stable sort of the reversed rows puts it first.
        order = len(even) - 1 - like.flip(0).argsort(descending=True, stable=True)
        left = torch.cat([even[order[min(step, len(left) - keep) :]], odd])
    return left
