"""ToMe (arXiv 2210.09461): the most similar rows merge, as many in every layer of the encoder.

Of the paper: the tokens are cut in two sets by turns; each of one set is compared with all of the other by the cosine of the
attention keys (mean over heads) and takes the most similar; the r most similar pairs become size-weighted means. r is the same in
all layers, or falls (`allocation`: decreasing). Attention counts a merged token as often as what it stands for (proportional
attention), which the paper switches off for some models (`size_bias`).
Ours, because the paper's tower attends globally and its counts are free: merge units instead of patches; groups are windows where
the tower attends to windows, grids where it attends to grids, and all lose the same share, so that equal windows lose equal
counts, as its author advises for window attention; r follows from the budget, and where that is more than half of a group there
is a second round; rows merge after a layer's MLP instead of before it, and stay in order. Which set is absorbed the paper leaves
open: here the second of each two, the set that is not larger.

It is `evoprune-paper` without the penalties on loneliness and attention, and with another schedule.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_paper import EvoPrunePaper


@dataclass(frozen=True)
class ToMe(EvoPrunePaper):
    """Fields: `allocation`, `first`, `last` and `size_bias` as in `evoprune-paper`. What else that has is fixed."""

    name: ClassVar[str] = "tome"

    allocation: str = "mean"
    first: float = 0.0
    last: float = 1.0
    size_bias: bool = True

    diversity: ClassVar[float] = 0.0
    attention: ClassVar[float] = 0.0
    critical: ClassVar[float] = 0.0
    lonely: ClassVar[str] = "either"
    neighbours: ClassVar[int] = 1
    features: ClassVar[str] = "keys"
    split: ClassVar[str] = "alternate"
    survivor: ClassVar[str] = "destination"
    windows: ClassVar[bool] = True
    block: ClassVar[int] = 1
