"""ToMe (arXiv 2210.09461): the most similar rows merge, the same number in every layer of the encoder.

Of the paper: tokens alternate between two sets; each of one set takes the token of the other with the highest cosine of attention
keys (mean over heads); the r most similar pairs become size-weighted means. r is the same in all layers or falls (`allocation`:
decreasing). Attention weighs a merged token by what it represents (proportional attention); `size_bias` turns this off, as the
paper does for some models.
Of this project, because the paper's tower attends globally and its counts are free: units instead of patches; groups are windows
where the tower attends to windows and frame pairs elsewhere, and all lose the same share, as the author advises for window
attention; r follows from the budget, with a second round where it exceeds half of a group; rows merge after a layer's MLP, not
before it, and stay in order. The paper leaves open which set is absorbed: here the second of each two, which is not the larger one.

It is `evoprune-merge` without penalties and with another schedule.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_merge import EvoPruneMerge


@dataclass(frozen=True)
class ToMe(EvoPruneMerge):
    """Fields: `allocation`, `first`, `last` and `size_bias` as in `evoprune-merge`; its other settings are fixed."""

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "arXiv 2210.09461, section 3"

    allocation: str = "mean"
    first: float = 0.0
    last: float = 1.0
    size_bias: bool = True

    diversity: ClassVar[float] = 0.0
    attention: ClassVar[float] = 0.0
    critical: ClassVar[float] = 0.0
    neighbours: ClassVar[int] = 1
    features: ClassVar[str] = "keys"
