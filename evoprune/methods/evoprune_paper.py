"""EvoPrune as in its paper (arXiv 2603.03681) and with other settings: rows merge layer by layer inside windows and frame pairs."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.backend import snap
from evoprune.methods.base import Merger
from evoprune.methods.plans import TowerShape, layer_weights, rows_after_layers
from evoprune.methods.ranking import alternate, match
from evoprune.methods.types import Candidates, arange_on

FEATURES = ("keys", "keys_rotary", "hidden")
MAX_SCORES = 1 << 22  # scores in memory at a time (16 MiB), or one row per group if that is more
ALL = slice(None)


@dataclass(frozen=True)
class EvoPrunePaper(Merger):
    """EvoPrune (arXiv 2603.03681). O(n^2 D) for a group of n rows."""

    name = "evoprune-paper"
    source = "arXiv 2603.03681"
    absorbed = 1  # which row in every two may merge into another: 0 for the first, 1 for the second

    allocation: str = "skip"  # which layers merge and how much, from `first` to `last` in relative depth
    first: float = 0.2
    last: float = 0.5
    diversity: Annotated[float, "(-inf, inf)"] = 0.1  # weights of the score's two penalties (`composite_score`)
    attention: Annotated[float, "(-inf, inf)"] = 0.1
    critical: Annotated[float, "[0, 1]"] = (
        0.1  # share of a group, its most attended rows, that merges only after all other rows
    )
    neighbours: Annotated[int, "[1, inf)"] = 4  # how many nearest rows the density is computed from
    features: str = "keys"  # what similarity compares: keys of the layer, keys_rotary (after rotary), or hidden states
    size_bias: bool = True  # whether attention weighs a merged row by its cluster size

    def __post_init__(self):
        layer_weights(8, self.allocation, self.first, self.last)
        if self.features not in FEATURES:
            raise ValueError(f"features must be one of {', '.join(FEATURES)}, not {self.features!r}")
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
            attention = snap(relative_attention(c.attention, c.valid))
        source = alternate(c.valid, self.absorbed)
        best, partner = self._best_partners(c, attention, source)
        at_most = torch.minimum(remove, c.valid.sum(1) // 2)  # one row must be left even if all are sources
        return match(best, partner, source, self._critical(attention, c.valid), at_most)

    def rounds(self, rows: int, left: int) -> int:
        count = 0
        while rows > left:  # a round removes at most every second row
            count = count + 1
            rows = rows - min(rows - left, rows // 2)
        return count

    def _best_partners(
        self, c: Candidates, attention: torch.Tensor | None, source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Compute `best_partners` for all rows, strip by strip, so that a group's full score matrix is never in memory."""
        pieces = strips(*c.valid.shape)
        density = None
        partners = []
        if self.diversity:
            cosines = ((rows, similarity(c.features, rows)) for rows in pieces)
            densities = [local_density(cosine, c.valid, self.neighbours, rows) for rows, cosine in cosines]
            density = torch.cat(densities, 1)
        for rows in pieces:
            cosine = similarity(c.features, rows)
            score = composite_score(cosine, density, attention, self.diversity, self.attention, rows)
            partners.append(best_partners(snap(score), source[:, rows], c.valid & ~source))
        return tuple(torch.cat(of_each, 1) for of_each in zip(*partners, strict=True))

    def _critical(self, attention: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
        """Return bool `[B, n]`: the most attended rows of a group, a share of `critical`, rounded up; ties by index."""
        if not self.critical:
            return torch.zeros_like(valid)
        rank = attention.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # In float64 and slightly lower, because 0.15 of 100 rows must not become 16.
        return valid & (rank < (valid.sum(1, keepdim=True).double() * self.critical - 1e-9).ceil())


def strips(groups: int, rows: int) -> list[slice]:
    """Return slices that split `rows` so that the scores of a strip, `[groups, strip, rows]`, are at most `MAX_SCORES`."""
    step = max(1, MAX_SCORES // max(1, groups * rows))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def similarity(features: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """Return the cosines `[B, m, n]` of the m `rows` of `features` `[B, n, D]` to all rows of their group; 0 for zero vectors."""
    unit = F.normalize(features.float(), dim=-1)
    return unit[:, rows] @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int, rows: slice = ALL) -> torch.Tensor:
    """Return `[B, m]`: the mean `cosine` (`[B, m, n]`) of the m `rows` to their nearest `valid` others (bool `[B, n]`).

    It is 1 for a row without others.
    """
    n = cosine.shape[2]
    index = arange_on(n, cosine.device)
    others = valid[:, None, :] & valid[:, rows, None] & (index[rows, None] != index)
    count = others.sum(-1).clamp(max=neighbours)
    nearest = cosine.masked_fill(~others, -torch.inf).topk(min(neighbours, n), dim=-1).values
    total = nearest.masked_fill(nearest.isinf(), 0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def relative_attention(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Return `[B, n]`: the attention received, divided by the group's maximum, in [0, 1]; 0 at padding."""
    top = received.masked_fill(~valid, 0).amax(1, keepdim=True)
    return torch.where(valid, received / top.clamp(min=1e-12), 0)


def composite_score(
    cosine: torch.Tensor,
    density: torch.Tensor | None,
    attention: torch.Tensor | None,
    diversity_weight: float,
    attention_weight: float,
    rows: slice = ALL,
) -> torch.Tensor:
    """Return `[B, m, n]`: EvoPrune's score for merging two rows (arXiv 2603.03681); dimension 1 is the row to be absorbed.

        S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

    s: `cosine` `[B, m, n]` of the m `rows`, from `similarity`; d: local density `[B, n]` (rows unlike all others should not merge);
    a: relative attention `[B, n]`. d and a are None if their weights are zero.
    """
    score = cosine
    if diversity_weight:
        unlike = 1 - density
        score = score - diversity_weight * torch.maximum(unlike[:, rows, None], unlike[:, None, :])
    if attention_weight:
        score = score - attention_weight * torch.maximum(attention[:, rows, None], attention[:, None, :])
    return score


def best_partners(
    score: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the best destination for every source row.

    Args:
        score: `[B, m, n]`.
        source: bool `[B, m]`, rows that may merge.
        destination: bool `[B, n]`, rows that they may merge into.

    Returns:
        `[B, m]`, the highest score, -inf for rows that are not sources; and int64 `[B, m]`, the index of its destination. Ties go
        to the lower index.
    """
    allowed = source[:, :, None] & destination[:, None, :]
    return tuple(score.masked_fill(~allowed, -torch.inf).max(2))


@dataclass(frozen=True)
class EvoPruneMerge(EvoPrunePaper):
    """EvoPrune with the settings that were best on the demo model (results/ablations.md)."""

    name = "evoprune-merge"
    source = "arXiv 2603.03681, with other settings"

    allocation: str = "decreasing"
    attention: Annotated[float, "(-inf, inf)"] = 0.0
    critical: Annotated[float, "[0, 1]"] = 0.0
