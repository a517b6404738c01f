"""Reuse in time before any selector: `reuse+divprune`, `reuse:threshold=5+visionzip`.

A unit whose pixels have not changed since its place was last encoded is not encoded again (pruning/reuse.py). The
selector runs after the encoder and sees every unit of the clip; a reused unit has the feature of the row that
represents it.
"""

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from evoprune.methods.base import Front
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.encoder_plan import EncoderPlan, Grid, TowerShape, full_plan
from evoprune.pruning.reuse import THRESHOLD


@dataclass(frozen=True)
class Reuse(Front):
    """Fields:

    threshold: a unit is encoded again if it changes by at least this many levels of 255; above 0.
    then: the selector, which users name after `reuse+`.
    """

    name: ClassVar[str] = "reuse"
    source: ClassVar[str] = "this project"
    acts: ClassVar[Literal["inside"]] = "inside"

    threshold: float = THRESHOLD

    def __post_init__(self):
        check_ranges(self, threshold="(0, inf]")

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        plan = full_plan(tower, grid, keep)
        return replace(plan, exact=False, reuse=self.threshold) if plan.prunes else plan
