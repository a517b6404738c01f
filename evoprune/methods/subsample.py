"""Fewer frames, as a lower frame rate takes them: a rival that saves time in the encoder too.

EarlyTom (arXiv 2605.30010) reports it as a baseline. Nothing is adapted: frames are taken anew at even distances, so the two of
a grid lie farther apart as well, and the language model is told the true seconds between grids.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from evoprune.methods.base import Method


@dataclass(frozen=True)
class Subsample(Method):
    """Whole grids, at least one."""

    name: ClassVar[str] = "subsample"
    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    def plan(self, grid: tuple[int, int, int], keep: int) -> tuple[int, int, int]:
        count, height, width = grid
        return min(count, max(1, keep // (height * width))), height, width
