"""EvoPrune (arXiv 2603.03681) for Qwen2.5-VL: merging between the encoder's layers, each grid on its own.

Of the paper: training-free merging of token pairs across two disjoint sets, by a score made of similarity, diversity and attention;
a critical share of the most attended tokens that is not merged away; six allocations over layers.
Ours, because the paper covers a tower with global attention: merge units instead of patches, windows first and grids where
the tower attends to grids, hard counts, and the exact form of the score.

The defaults are what won on the demo model, in both sets of weights (docs/ablations.md): attention without a say, and most of the
merging in the first of the layers. The paper, on real weights, found attention to matter and `skip` the best allocation; that form
is `evoprune-paper:allocation=skip:attention=0.1:critical=0.1`.
"""

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch

from evoprune.methods.base import Candidates, Method
from evoprune.pruning.merge import SPLITS, SURVIVORS, best_partners, match, split_sources, survive_attended
from evoprune.pruning.schedule import TowerShape, layer_weights, rows_after_layers
from evoprune.pruning.score import (
    LONELY,
    composite_score,
    local_density,
    relative_attention,
    settle,
    similarity,
    strips,
)

FEATURES = ("keys", "keys_rotary", "hidden")


@dataclass(frozen=True)
class EvoPrunePaper(Method):
    """Fields:

    allocation, first, last: which layers reduce and how much, `first` and `last` in relative depth (pruning/schedule.py).
    diversity, attention: weights of the score's two penalties.
    critical: share of each group, the most attended, that is absorbed only when nothing else is left.
    lonely: whose loneliness the diversity penalty counts: of either row, of both, or of the absorbed one (pruning/score.py).
    neighbours: how many nearest rows make the density.
    features: what similarity is measured on: the layer's keys, keys after rotary, or hidden states.
    split: how a group is cut in two: alternate rows, or a checkerboard of places.
    survivor: whose place a merged row takes: the destination's, or the most attended one's.
    size_bias: whether attention counts a merged row as often as the units it stands for.
    block: grids of a block. Of a single grid, rows merge inside windows in layers that attend to windows, else anywhere in it; a
        block of several grids is always one place to merge in, and so is a single grid if `windows` is false.
    """

    name: ClassVar[str] = "evoprune-paper"
    acts: ClassVar[Literal["inside"]] = "inside"

    allocation: str = "decreasing"
    first: float = 0.2
    last: float = 0.5
    diversity: float = 0.1
    attention: float = 0.0
    critical: float = 0.0
    lonely: str = "either"
    neighbours: int = 4
    features: str = "keys"
    split: str = "alternate"
    survivor: str = "destination"
    size_bias: bool = True
    windows: bool = True
    block: int = 1

    def __post_init__(self):
        layer_weights(8, self.allocation, self.first, self.last)
        for name, value, known in (
            ("features", self.features, FEATURES),
            ("split", self.split, SPLITS),
            ("lonely", self.lonely, LONELY),
            ("survivor", self.survivor, SURVIVORS),
        ):
            if value not in known:
                raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
        if not 0 <= self.critical <= 1 or self.neighbours < 1:
            raise ValueError("critical is a share from 0 to 1, neighbours at least 1")
        if self.block < 1:
            raise ValueError("block is a number of grids, at least 1")
        if not (math.isfinite(self.diversity) and math.isfinite(self.attention)):
            raise ValueError("diversity and attention are finite weights")

    @property
    def needs(self) -> frozenset[str]:
        attended = self.attention or self.critical or self.survivor == "attended"
        return frozenset({self.features, "attention"} if attended else {self.features})

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        weights = layer_weights(tower.depth, self.allocation, self.first, self.last)
        if not (self.windows and self.block == 1):
            tower = replace(tower, full_layers=tuple(range(tower.depth)))
        return rows_after_layers(tower, units, windows, keep, weights)

    def scope(self, tower: TowerShape, layer: int) -> Literal["window", "block"]:
        return super().scope(tower, layer) if self.windows else "block"

    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        c = candidates
        attention = settle(relative_attention(c.attention, c.valid)) if c.attention is not None else None
        source = split_sources(c.place, c.moment, c.valid, c.grid_width, self.split)
        best, partner = self._best_partners(c, attention, source)
        into = match(best, partner, source, self._critical(attention, c.valid), remove)
        return survive_attended(into, attention) if self.survivor == "attended" else into

    def rounds(self, rows: int, left: int) -> int:
        if self.split == "checkerboard" and self.survivor == "attended":
            return rows - left  # in each round there may be but one row of a colour
        count = 0
        if self.split == "checkerboard" and rows > left:
            count, rows = 1, rows - 1  # the same in the first round; then one colour is left, and rows alternate
        while rows > left:  # every second row may go
            count, rows = count + 1, rows - min(rows - left, rows // 2)
        return count

    def _best_partners(
        self, c: Candidates, attention: torch.Tensor | None, source: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """As `merge.best_partners` of all rows, strip by strip."""
        parts, density = strips(*c.valid.shape), None
        if self.diversity:
            each = (local_density(similarity(c.features, rows), c.valid, self.neighbours, rows) for rows in parts)
            density = torch.cat(list(each), 1)
        found = []
        for rows in parts:
            cosine = similarity(c.features, rows)
            score = composite_score(cosine, density, attention, self.diversity, self.attention, self.lonely, rows)
            found.append(best_partners(settle(score), source[:, rows], c.valid & ~source))
        return tuple(torch.cat(of_each, 1) for of_each in zip(*found, strict=True))

    def _critical(self, attention: torch.Tensor | None, valid: torch.Tensor) -> torch.Tensor:
        """bool `[B, n]`: the `critical` share of each group that is most attended, rounded up; ties by index."""
        if not self.critical:
            return torch.zeros_like(valid)
        rank = attention.masked_fill(~valid, -1).argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        # In float64 and a hair lower, or 0.15 of 100 rows would be 16.
        return valid & (rank < (valid.sum(1, keepdim=True).double() * self.critical - 1e-9).ceil())
