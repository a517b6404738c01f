"""Reuse in time before any selector: `reuse+divprune`, `reuse:threshold=5+visionzip`.

The selector sees every unit of the clip; one that is not encoded again (vision/reuse.py) has the feature of an earlier row.
"""

from dataclasses import dataclass
from typing import Annotated

from evoprune.methods.base import EncoderMethod
from evoprune.methods.encoder_plan import Grid, Stage, TowerShape

# A unit has changed if a block differs by at least this many levels of 255 (Euclidean over red, green and blue).
THRESHOLD = 8.0


@dataclass(frozen=True)
class Reuse(EncoderMethod):
    """Reuse in front of a selector that users name."""

    name = "reuse"
    source = "this project"
    combines = True

    # A unit is encoded again if it changes by so many levels of 255.
    threshold: Annotated[float, "(0, inf]"] = THRESHOLD

    @property
    def reuse(self) -> float:
        return self.threshold

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        return []
