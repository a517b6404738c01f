"""EvoPrune (arXiv 2603.03681), which merges similar rows layer by layer inside windows and frame pairs.

This module provides two variants of the method: one with the paper's settings, and one with settings that work better on the demo
model.
"""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.backend import snap
from evoprune.methods.merger import Merger, layer_weights, rows_after_layers
from evoprune.methods.plans import TowerShape
from evoprune.methods.ranking import alternate, match
from evoprune.methods.types import Candidates, arange_on

FEATURES = ("keys", "keys_rotary", "hidden")
MAX_SCORES = 1 << 22  # maximum number of scores in memory at a time (16 MiB), unless a single row per group needs more
ALL = slice(None)


@dataclass(frozen=True)
class EvoPrunePaper(Merger):
    """Merges rows as in EvoPrune (arXiv 2603.03681). Takes O(n^2 D) time for a group of n rows."""

    name = "evoprune-paper"
    source = "arXiv 2603.03681"
    absorbed = 1  # which of every two consecutive rows may merge into another row: 0 for the first, 1 for the second

    allocation: str = "skip"  # how merging is distributed over the layers from `first` to `last` (relative depths)
    first: float = 0.2
    last: float = 0.5
    diversity: Annotated[float, "(-inf, inf)"] = 0.1  # weights of the score's two penalties (see `composite_score`)
    attention: Annotated[float, "(-inf, inf)"] = 0.1
    # The fraction of each group's rows to protect because they receive the most attention. They merge after all other rows.
    critical: Annotated[float, "[0, 1]"] = 0.1
    neighbours: Annotated[int, "[1, inf)"] = 4  # number of nearest rows for computing the density
    # The features to compare by cosine similarity: the layer's "keys", its "keys_rotary" (after rotary embedding), or "hidden"
    # states.
    features: str = "keys"
    size_bias: bool = True  # whether attention weights a merged row by its cluster size

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
        at_most = torch.minimum(remove, c.valid.sum(1) // 2)  # one row must remain even if all rows are sources
        return match(best, partner, source, self._critical(attention, c.valid), at_most)

    def rounds(self, rows: int, left: int) -> int:
        count = 0
        while rows > left:  # each round can remove at most every second row
            count = count + 1
            rows = rows - min(rows - left, rows // 2)
        return count

    def _best_partners(
        self, c: Candidates, attention: torch.Tensor | None, source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Find the best merge partner for every row, processing rows in strips so that the full score matrix is never in memory."""
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
        """Return a mask of the rows that receive the most attention in each group: bool `[B, n]`.

        The number of True entries per group is `critical` times the group size, rounded up. Ties go to the lower index.
        """
        if not self.critical:
            return torch.zeros_like(valid)
        rank = attention.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # Computed in float64 and reduced slightly, so that 0.15 of 100 rows does not become 16.
        return valid & (rank < (valid.sum(1, keepdim=True).double() * self.critical - 1e-9).ceil())


def strips(groups: int, rows: int) -> list[slice]:
    """Split `rows` into slices small enough for a score matrix `[groups, slice, rows]` to have at most `MAX_SCORES` entries."""
    step = max(1, MAX_SCORES // max(1, groups * rows))
    return [slice(first, min(first + step, rows)) for first in range(0, rows, step)]


def similarity(features: torch.Tensor, rows: slice = ALL) -> torch.Tensor:
    """Compute the cosine similarity between the given `rows` and all rows of the same group.

    Args:
        features: `[B, n, D]`, the features of B groups.
        rows: The m rows to compare. The default is all of them.

    Returns:
        `[B, m, n]`. The similarity to a zero vector is 0.
    """
    unit = F.normalize(features.float(), dim=-1)
    return unit[:, rows] @ unit.transpose(1, 2)


def local_density(cosine: torch.Tensor, valid: torch.Tensor, neighbours: int, rows: slice = ALL) -> torch.Tensor:
    """Return the mean similarity between each row and its nearest neighbors: `[B, m]`, with 1 for rows without neighbors.

    Args:
        cosine: `[B, m, n]`, from `similarity`.
        valid: bool `[B, n]`, False for padding, which is ignored.
        neighbours: The number of nearest neighbors to average over.
        rows: The m rows in dimension 1 of `cosine`.
    """
    n = cosine.shape[2]
    index = arange_on(n, cosine.device)
    others = valid[:, None, :] & valid[:, rows, None] & (index[rows, None] != index)
    count = others.sum(-1).clamp(max=neighbours)
    nearest = cosine.masked_fill(~others, -torch.inf).topk(min(neighbours, n), dim=-1).values
    total = nearest.masked_fill(nearest.isinf(), 0).sum(-1)
    return torch.where(count > 0, total / count.clamp(min=1), 1.0)


def relative_attention(received: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Divide each row's received attention by the maximum in its group. Returns `[B, n]`, with 0 for padding."""
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
    """Compute EvoPrune's score for merging row i into row j (arXiv 2603.03681).

        S_ij = s_ij - w_div * max(1 - d_i, 1 - d_j) - w_att * max(a_i, a_j)

    Args:
        cosine: s, `[B, m, n]`, from `similarity`.
        density: d, the local density `[B, n]`, which discourages merging rows unlike all others. None if its weight is 0.
        attention: a, the relative attention `[B, n]`. None if its weight is 0.
        diversity_weight: w_div.
        attention_weight: w_att.
        rows: The m rows in dimension 1 of `cosine`.

    Returns:
        `[B, m, n]`. Dimension 1 is the row to be absorbed.
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
    """For each source row, find the row with the highest merge score.

    Args:
        score: `[B, m, n]`, from `composite_score`.
        source: bool `[B, m]`, True for rows that may merge into another row.
        destination: bool `[B, n]`, True for rows that source rows may merge into.

    Returns:
        `[B, m]`, each row's highest score (-inf for non-source rows), and int64 `[B, m]`, the index of the corresponding
        destination. Ties go to the lower index.
    """
    allowed = source[:, :, None] & destination[:, None, :]
    return tuple(score.masked_fill(~allowed, -torch.inf).max(2))


@dataclass(frozen=True)
class EvoPruneMerge(EvoPrunePaper):
    """EvoPrune with the settings that worked best on the demo model (results/ablations.md)."""

    name = "evoprune-merge"
    source = "arXiv 2603.03681, with other settings"

    allocation: str = "decreasing"
    attention: Annotated[float, "(-inf, inf)"] = 0.0
    critical: Annotated[float, "[0, 1]"] = 0.0
