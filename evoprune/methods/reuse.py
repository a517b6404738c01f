"""Reuse in time before any selector: `reuse+divprune`, `reuse:threshold=5+visionzip`.

A unit whose pixels have not changed since its place was last encoded is not encoded again (pruning/reuse.py). The
selector runs after the encoder and sees every unit of the clip; a reused unit has the feature of the row that
represents it.
"""

from dataclasses import dataclass
from typing import Annotated

from evoprune.methods.base import EncoderMethod
from evoprune.pruning.encoder_plan import Grid, Stage, TowerShape
from evoprune.pruning.reuse import THRESHOLD


@dataclass(frozen=True)
class Reuse(EncoderMethod):
    """Reuse in front of a selector that users name."""

    name = "reuse"
    source = "this project"
    combines = True

    threshold: Annotated[float, "(0, inf]"] = (
        THRESHOLD  # a unit is encoded again if it changes by so many levels of 255
    )

    @property
    def reuse(self) -> float:
        return self.threshold

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        return []
