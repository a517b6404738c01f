"""PixelPrune, which does not encode units whose pixels are predicted exactly by their neighbors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods import DivPrune, EncoderMethod, Grid, Selector, Stage, TowerShape


@dataclass(frozen=True)
class PixelPrune(EncoderMethod):
    """PixelPrune (arXiv 2604.00886) with a threshold of 0: units with the same pixels as a neighbor are not encoded.

    Each unit is predicted from the units on its left, above it, and above on the left, with the rule of JPEG-LS (see
    `predicted_units` in vision/patches.py). This loses nothing but positions, and saves time on screens and slides.

    Differences from the authors' code: the budget determines the number of tokens, which `divprune` or the method NAME in
    `pixelprune+NAME` selects, whereas the authors keep exactly the units that are not predicted. In attention, a row counts as many
    times as it has units. The authors do not prune videos. Here, a unit can also be predicted by the same position in the previous
    frame pair. Thresholds above 0 are not implemented; `reuse` has one.
    """

    name = "pixelprune"
    source = "arXiv 2604.00886"
    combines = True
    predict = True
    tokens: ClassVar[Selector] = DivPrune()

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> Sequence[Stage]:
        return ()
