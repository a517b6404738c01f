"""evoprune, this project's own method: reuse over time, two selections of rows inside the encoder, and one of tokens after it.

1. Reuse: a unit whose pixels have not changed since its place was last encoded is not encoded again. Its row stays visible to
   attention (vision/preprocess.py).
2. Rows: farthest-point sampling over features and time (methods/farthest.py) selects the patch embeddings that enter the tower
   and, after the first eighth of the layers, the rows that continue. Both numbers are powers of the budget.
3. Tokens: after the tower, the tokens are selected among these rows in the same way. Each becomes the mean of its cluster.
4. Bias: the language model's attention adds half the log of the cluster size to each token's logits.

On CUDA, an input of few units skips the first two steps, because launches bound its time in the tower and fewer rows save nothing.

No paper describes this method; docs/methods.md says what it shares with other methods. results/frontier.md has the contribution
of its stages, results/ablations.md the settings that were tried without benefit.
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

# A unit has changed if a block differs by at least this many levels of 255 (Euclidean over red, green and blue).
THRESHOLD = 8.0


@dataclass(frozen=True)
class Reuse(EncoderMethod):
    """Reuse combined with a selector that users name: `reuse+divprune`, `reuse:threshold=5+visionzip`.

    The selector sees every unit of the clip. A unit that is not encoded again has the feature of an earlier row.
    """

    name = "reuse"
    source = "this project"
    combines = True

    # A unit is encoded again if it changes by at least this many of 255 levels.
    threshold: Annotated[float, "(0, inf]"] = THRESHOLD

    @property
    def reuse(self) -> float:
        return self.threshold

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        return []


INNER = ("auto", "always")  # when the method prunes inside the tower
WITHIN = 0.01  # `within` under `--budget auto`
# Scales the powers `rows` and `first` for an input of one frame pair, whose units no other frame pair repeats.
ONE_PAIR_POWER = 2 / 3


@dataclass(frozen=True)
class FarthestPoints(Selector):
    """Farthest-point sampling over features and time. The fields are as in `EvoPruneMethod`."""

    source: ClassVar[str] = "this project"
    drops: ClassVar[bool] = False

    alpha: float = ALPHA
    floor: float = 0.0
    average: bool = True
    count: float = 0.5
    within: float = 0.0
    # Whether to read rows before the next layer's norm, which would make flat patches as different as any others.
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
        """Return float32 `[tokens]`: the cluster size that the language model assumes for each token, or None for 1."""
        if not self.count or tokens == len(unit_to_token):
            return None
        return unit_counts(unit_to_token, tokens) ** self.count


@dataclass(frozen=True)
class EvoPruneMethod(EncoderMethod):
    """Reuse, then three selections; see the module docstring."""

    name: ClassVar[str] = "evoprune"
    source: ClassVar[str] = "this project; same goal as arXiv 2603.03681"

    # A unit is encoded again if it changes by at least this many of 255 levels; 0 encodes every unit.
    reuse: Annotated[float, "[0, inf]"] = THRESHOLD
    # Share of the tower's layers before the second selection; 1 selects only after the tower.
    depth: Annotated[float, "(0, 1]"] = 0.125
    alpha: Annotated[float, "[0, inf)"] = ALPHA  # weight of time in the selection's distance
    # Rows that enter the tower: units * budget ** first; rows after the second selection: units * budget ** rows. 0 keeps all
    # units, 1 as many rows as tokens.
    first: Annotated[float, "[0, 1]"] = 0.4
    rows: Annotated[float, "[0, 1]"] = 0.75
    floor: Annotated[float, "[0, 1]"] = 0.0  # minimum for a frame pair, as a share of its even part of the budget
    average: bool = True  # whether a token becomes the mean of its cluster
    # The language model's attention weighs a token by (cluster size) ** count; 0 weighs all tokens equally, 1 is ToMe's
    # proportional attention (arXiv 2210.09461, section 3).
    count: Annotated[float, "[0, inf)"] = 0.5
    # The last selection ends once every unit is within this distance of a selected one, but keeps at least 1/20 of the units; 0
    # selects as many as the budget allows.
    within: Annotated[float, "[0, inf)"] = 0.0
    # auto: a launch-bound small input is pruned only after the tower, without reuse. always: every
    # input is pruned inside the tower, on every device.
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
