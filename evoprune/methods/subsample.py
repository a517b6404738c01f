"""Fewer frames, as a lower frame rate takes them: a rival that saves time in the encoder too.

EarlyTom (arXiv 2605.30010) reports it as a baseline. Nothing is adapted: frames are taken anew at even distances, so the two of
a grid lie farther apart as well, and the language model is told the true seconds between grids.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.base import InputMethod
from evoprune.pruning.plan import Grid


@dataclass(frozen=True)
class Subsample(InputMethod):
    """Whole grids, at least one."""

    name: ClassVar[str] = "subsample"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width
