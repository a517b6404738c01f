"""evoprune, this project's own method: reuse over time, two row selections inside the encoder, and a token selection after it.

1. Reuse: a unit is not encoded again if its pixels have hardly changed since the same position in the frame was last encoded. Its
earlier row stays visible to attention (vision/preprocess.py).
2. Rows: farthest-point sampling over features and time (methods/farthest.py) selects the patch embeddings that enter the tower.
   After the first eighth of the layers, it also selects the rows that continue through the remaining layers. The fraction that each
   selection keeps is a power of the budget.
3. Tokens: after the tower, the same algorithm selects tokens from these rows. Each token becomes the mean of its cluster.
4. Bias: the language model's attention adds half the log of the cluster size to each token's logits.

On CUDA, inputs with few units skip the first two steps. On such inputs, the tower's run time is dominated by kernel launches, so
computing fewer rows would not make it faster.

No paper describes this method. docs/methods.md explains what it shares with other methods. results/frontier.md shows how much
each stage contributes, and results/ablations.md lists the settings that were tried without benefit.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, ClassVar

import torch

from evoprune.backend import unit_counts
from evoprune.methods.base import EncoderMethod, Selector
from evoprune.methods.budget import AUTO_LEAST, Budget
from evoprune.methods.farthest import ALPHA, assign_clusters, farthest_points, points_of
from evoprune.methods.plans import Grid, Stage, TowerShape
from evoprune.methods.types import Selection, Tokens

# A unit has changed if one of its blocks differs by at least this many of 255 levels (Euclidean distance over red, green, and
# blue).
THRESHOLD = 8.0


@dataclass(frozen=True)
class Reuse(EncoderMethod):
    """Combines reuse with a selector of the user's choice, as in `reuse+divprune` or `reuse:threshold=5+visionzip`.

    The selector still sees every unit of the clip, because reused units take their features from an earlier frame pair.
    """

    name = "reuse"
    source = "this project"
    combines = True

    # Units are re-encoded if their pixels changed by at least this many of 255 levels.
    threshold: Annotated[float, "(0, inf]"] = THRESHOLD

    @property
    def reuse(self) -> float:
        return self.threshold

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        return []


INNER = ("auto", "always")  # possible values of `EvoPruneMethod.inner`
WITHIN = 0.01  # value of `within` for `--budget auto`
# Scales the powers `rows` and `first` for single-frame-pair inputs, which have no temporal redundancy.
ONE_PAIR_POWER = 2 / 3


@dataclass(frozen=True)
class FarthestPoints(Selector):
    """Selects units by farthest-point sampling over features and time. See `EvoPruneMethod` for the fields."""

    source: ClassVar[str] = "this project"
    drops: ClassVar[bool] = False

    alpha: float = ALPHA
    floor: float = 0.0
    average: bool = True
    count: float = 0.5
    within: float = 0.0
    # Whether to compare rows before the next layer's norm is applied. After the norm, untextured patches would differ from each
    # other as much as any other patches do.
    before_norm: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"hidden"}) if self.before_norm else frozenset()

    @property
    def weighs(self) -> bool:
        return self.count > 0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        points = points_of(tokens.rows, tokens.unit_to_row, tokens.grid, self.alpha)
        min_keep = Budget.count(AUTO_LEAST, len(tokens.unit_to_row))
        kept = farthest_points(points, keep, within=self.within, least=min_keep, floor=self.floor)
        unit_to_token = assign_clusters(points, kept)
        return Selection(kept, unit_to_token, size=self._sizes(unit_to_token, len(kept)), averages=self.average)

    def suffices(self, count: int, keep: int, units: int) -> bool:
        return count == keep or (self.within > 0 and Budget.count(AUTO_LEAST, units) <= count <= keep)

    def _sizes(self, unit_to_token: torch.Tensor, tokens: int) -> torch.Tensor | None:
        """Return the cluster size that the language model assumes for each token: float32 `[tokens]`, or None if all are 1."""
        if not self.count or tokens == len(unit_to_token):
            return None
        return unit_counts(unit_to_token, tokens) ** self.count


@dataclass(frozen=True)
class EvoPruneMethod(EncoderMethod):
    """Reuses unchanged units, selects rows twice inside the vision tower, and selects tokens after it. See the module docstring."""

    name: ClassVar[str] = "evoprune"
    source: ClassVar[str] = "this project; same goal as arXiv 2603.03681"

    # Units are re-encoded if their pixels changed by at least this many of 255 levels. With 0, every unit is encoded.
    reuse: Annotated[float, "[0, inf]"] = THRESHOLD
    # The fraction of the tower's layers that run before the second selection. With 1, units are selected only after the tower.
    depth: Annotated[float, "(0, 1]"] = 0.125
    alpha: Annotated[float, "[0, inf)"] = ALPHA  # weight of the time difference in the selection's distance
    # units * budget ** first rows enter the tower, and units * budget ** rows remain after the second selection. A power of 0 keeps
    # all units. A power of 1 keeps as many rows as tokens.
    first: Annotated[float, "[0, 1]"] = 0.4
    rows: Annotated[float, "[0, 1]"] = 0.75
    # The minimum number of units to keep in each frame pair, as a fraction of an equal share of the budget.
    floor: Annotated[float, "[0, 1]"] = 0.0
    average: bool = True  # whether a token becomes the mean of its cluster
    # The language model's attention weights each token by (cluster size) ** count. With 0, all tokens are weighted equally. A value
    # of 1 corresponds to ToMe's proportional attention (arXiv 2210.09461, section 3).
    count: Annotated[float, "[0, inf)"] = 0.5
    # The last selection stops once every unit is within this distance of a selected unit, but it keeps at least 1/20 of the units.
    # With 0, it selects as many units as the budget allows.
    within: Annotated[float, "[0, inf)"] = 0.0
    # "auto" prunes small, launch-bound inputs only after the tower and disables reuse for them. "always" prunes every input inside
    # the tower, on every device.
    inner: str = "auto"

    def __post_init__(self):
        if self.inner not in INNER:
            raise ValueError(f"inner must be one of {', '.join(INNER)}, not {self.inner!r}")
        super().__post_init__()

    @property
    def exact(self) -> bool:
        return not self.within

    @property
    def small_after_tower(self) -> bool:
        return self.inner == "auto"

    @property
    def tokens(self) -> FarthestPoints:
        return FarthestPoints(self.alpha, self.floor, self.average, self.count, self.within)

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        if self.depth == 1:
            return []
        units = prod(grid)
        stages = []
        after = min(max(1, round(self.depth * tower.depth)), tower.depth - 1)
        points = replace(self.tokens, average=False, within=0.0)
        before = units
        patches = replace(points, before_norm=True)
        for layer, power, select in ((0, self.first, patches), (after, self.rows, points)):
            if grid[0] == 1:
                power *= ONE_PAIR_POWER
            rows = max(keep, round(units * (keep / units) ** power))
            if rows < before:
                stages.append(Stage(layer, rows, select, self.exact))
                before = rows
        return stages

    def automatic(self) -> "EvoPruneMethod":
        return replace(self, within=self.within or WITHIN)
