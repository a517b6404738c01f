"""Fewer or smaller frames: the simplest rivals of pruning, which save encoder time too."""

from dataclasses import dataclass

from evoprune.methods.base import InputMethod
from evoprune.pruning.encoder_plan import Grid
from evoprune.pruning.shapes import smaller_frame


@dataclass(frozen=True)
class Subsample(InputMethod):
    """Fewer whole frame pairs, at least one."""

    name = "subsample"
    source = "arXiv 2605.30010, a baseline there"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width


@dataclass(frozen=True)
class Downscale(InputMethod):
    """As many frame pairs, of smaller frames: whole units in nearly the same ratio, at least one."""

    name = "downscale"
    source = "VTC-Bench, a baseline there"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return count, *smaller_frame(height, width, keep // count)
