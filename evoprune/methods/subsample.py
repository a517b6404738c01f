"""Fewer frames, as at a lower frame rate: a rival of pruning that saves encoder time too (a baseline in arXiv 2605.30010)."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.base import InputMethod
from evoprune.pruning.encoder_plan import Grid


@dataclass(frozen=True)
class Subsample(InputMethod):
    """Fewer whole frame pairs, at least one."""

    name: ClassVar[str] = "subsample"
    source: ClassVar[str] = "arXiv 2605.30010, a baseline there"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width
