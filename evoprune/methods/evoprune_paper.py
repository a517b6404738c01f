"""EvoPrune as its paper has it (arXiv 2603.03681): rows merge inside windows and frame pairs, layer by layer."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.methods import ranking
from evoprune.methods.base import Merger
from evoprune.methods.plans import TowerShape, layer_weights, rows_after_layers
from evoprune.methods.settings import Count, Share
from evoprune.methods.types import Candidates

FEATURES = ("keys", "keys_rotary", "hidden")


@dataclass(frozen=True)
class EvoPrunePaper(Merger):
    """O(n^2 D) for a group of n rows."""

    name = "evoprune-paper"
    source = "arXiv 2603.03681"
    absorbed = 1  # which row of each two may merge into another: 0 for the first, 1 for the second

    allocation: str = "skip"  # which layers merge and how much, from `first` to `last` in relative depth
    first: float = 0.2
    last: float = 0.5
    diversity: Annotated[float, "(-inf, inf)"] = 0.1  # weights of the score's two penalties (methods/ranking.py)
    attention: Annotated[float, "(-inf, inf)"] = 0.1
    critical: Share = 0.1  # share of each group, its most attended rows, that merges only when no other row is left
    neighbours: Count = 4  # how many nearest rows the density is computed from
    features: str = "keys"  # what similarity compares: keys of the layer, keys_rotary (after rotary), or hidden states
    size_bias: bool = True  # whether attention weighs a merged row by its cluster size

    def __post_init__(self):
        layer_weights(8, self.allocation, self.first, self.last)
        if self.features not in FEATURES:
            raise ValueError(f"features is one of {', '.join(FEATURES)}, not {self.features!r}")
        super().__post_init__()

    @property
    def needs(self) -> frozenset[str]:
        if self.attention or self.critical:
            return frozenset({self.features, "attention"})
        return frozenset({self.features})

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        weights = layer_weights(tower.depth, self.allocation, self.first, self.last)
        return rows_after_layers(tower, units, windows, keep, weights)

    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        c = candidates
        attention = None
        if c.attention is not None:
            attention = ranking.snap(ranking.relative_attention(c.attention, c.valid))
        source = ranking.alternate(c.valid, self.absorbed)
        best, partner = self._best_partners(c, attention, source)
        at_most = torch.minimum(remove, c.valid.sum(1) // 2)  # one row must be left, also where all are sources
        return ranking.match(best, partner, source, self._critical(attention, c.valid), at_most)

    def rounds(self, rows: int, left: int) -> int:
        count = 0
        while rows > left:  # a round removes at most every second row
            count = count + 1
            rows = rows - min(rows - left, rows // 2)
        return count

    def _best_partners(
        self, c: Candidates, attention: torch.Tensor | None, source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Find `ranking.best_partners` of all rows, strip by strip, so that a group's full score matrix is never held."""
        pieces = ranking.strips(*c.valid.shape)
        density = None
        partners = []
        if self.diversity:
            cosines = ((rows, ranking.similarity(c.features, rows)) for rows in pieces)
            densities = [ranking.local_density(cosine, c.valid, self.neighbours, rows) for rows, cosine in cosines]
            density = torch.cat(densities, 1)
        for rows in pieces:
            cosine = ranking.similarity(c.features, rows)
            score = ranking.composite_score(cosine, density, attention, self.diversity, self.attention, rows)
            partners.append(ranking.best_partners(ranking.snap(score), source[:, rows], c.valid & ~source))
        return tuple(torch.cat(of_each, 1) for of_each in zip(*partners, strict=True))

    def _critical(self, attention: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
        """Return bool `[B, n]`: the most attended rows of each group, a share of `critical`, rounded up; ties by index."""
        if not self.critical:
            return torch.zeros_like(valid)
        rank = attention.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # In float64 and slightly lower, because 0.15 of 100 rows must not become 16.
        return valid & (rank < (valid.sum(1, keepdim=True).double() * self.critical - 1e-9).ceil())
