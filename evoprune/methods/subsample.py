"""Fewer frames, as at a lower frame rate: a rival of pruning that saves encoder time too.

EarlyTom (arXiv 2605.30010) reports it as a baseline. Nothing is adapted: the frames are sampled again at even
distances. So the two frames of a pair are farther apart as well, and the language model gets the true seconds between
frame pairs.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.base import InputMethod
from evoprune.pruning.encoder_plan import Grid


@dataclass(frozen=True)
class Subsample(InputMethod):
    """Fewer whole frame pairs, at least one. No fields."""

    name: ClassVar[str] = "subsample"
    source: ClassVar[str] = "arXiv 2605.30010, a baseline there"

    def resize(self, grid: Grid, keep: int) -> Grid:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width
