"""Reuse in time before any selector: `reuse+divprune`, `reuse:threshold=5+visionzip`.

A unit whose pixels have not changed since its place was last encoded is not encoded again (pruning/reuse.py). The
selector runs after the encoder and sees every unit of the clip; a reused unit has the feature of the row that
represents it.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.base import EncoderMethod
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.encoder_plan import Grid, Stage, TowerShape
from evoprune.pruning.reuse import THRESHOLD


@dataclass(frozen=True)
class Reuse(EncoderMethod):
    """Field: threshold: a unit is encoded again if it changes by at least this many levels of 255; above 0."""

    name: ClassVar[str] = "reuse"
    source: ClassVar[str] = "this project"
    combines: ClassVar[bool] = True

    threshold: float = THRESHOLD

    def __post_init__(self):
        check_ranges(self, threshold="(0, inf]")

    @property
    def reuse(self) -> float:
        return self.threshold

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        return []
