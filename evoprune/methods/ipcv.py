"""IPCV (arXiv 2512.18747): rows that a layer hardly changes are set aside, follow similar rows, and come back at the end.

vision/followers.py runs it. docs/methods.md says what is adapted.
"""

from dataclasses import dataclass
from math import prod
from typing import ClassVar

from evoprune.methods.base import EncoderMethod
from evoprune.methods.dart import Dart
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.encoder_plan import Grid, SetAside, Stage, TowerShape


@dataclass(frozen=True)
class Ipcv(EncoderMethod):
    """Fields:

    keep: share of the rows that stay.
    first: share of the tower's layers before rows are dropped.
    follow: share of the layers in which dropped rows follow and are keys and values.
    neighbours: how many rows a dropped row follows.
    """

    name: ClassVar[str] = "ipcv"
    source: ClassVar[str] = "arXiv 2512.18747"
    combines: ClassVar[bool] = True
    tokens: ClassVar[Dart] = Dart()

    keep: float = 0.35
    first: float = 3 / 32
    follow: float = 7 / 32
    neighbours: int = 10

    def __post_init__(self):
        check_ranges(self, keep="(0, 1]", first="[0, 1]", follow="[0, 1]", neighbours="[1, inf)")

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        units = prod(grid[1:])
        first, left = max(1, round(self.first * tower.depth)), max(1, int(self.keep * units))
        if first >= tower.depth or left == units:
            return []
        until = min(first + round(self.follow * tower.depth), tower.depth)
        return [Stage(first, grid[0] * left, SetAside(left, until, self.neighbours))]
