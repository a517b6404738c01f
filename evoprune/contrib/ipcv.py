"""IPCV (arXiv 2512.18747): rows that a layer hardly changes are set aside, follow similar rows, and come back at the end."""

from dataclasses import dataclass
from math import prod
from typing import Annotated

from evoprune.contrib.dart import Dart
from evoprune.methods.base import EncoderMethod
from evoprune.methods.plans import Grid, SetAside, Stage, TowerShape
from evoprune.methods.settings import Count, Share


@dataclass(frozen=True)
class Ipcv(EncoderMethod):
    """O(N n D) to find the nearest of n rows. Users may name another selector of tokens: `ipcv+NAME`."""

    name = "ipcv"
    source = "arXiv 2512.18747"
    combines = True
    tokens = Dart()

    keep: Annotated[float, "(0, 1]"] = 0.35  # share of the rows that stay
    first: Share = 3 / 32  # share of the tower's layers before rows are set aside
    follow: Share = 7 / 32  # share of the layers in which these rows follow and are keys and values
    neighbours: Count = 10  # how many rows each of them follows

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        units = prod(grid[1:])
        first, left = max(1, round(self.first * tower.depth)), max(1, int(self.keep * units))
        if first >= tower.depth or left == units:
            return []
        until = min(first + round(self.follow * tower.depth), tower.depth)
        return [Stage(first, grid[0] * left, SetAside(left, until, self.neighbours))]
