"""Smaller frames: the simplest rival of pruning, which saves encoder time too (a baseline in VTC-Bench)."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.base import InputMethod
from evoprune.pruning.encoder_plan import Grid
from evoprune.pruning.shapes import smaller_frame


@dataclass(frozen=True)
class Downscale(InputMethod):
    """As many frame pairs, of smaller frames: whole units in nearly the same ratio, at least one."""

    name: ClassVar[str] = "downscale"
    source: ClassVar[str] = "VTC-Bench, a baseline there"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return count, *smaller_frame(height, width, keep // count)
