"""ToMe (arXiv 2210.09461): the most similar rows merge, equally many in every layer of the encoder.

As in the paper: tokens alternate between two sets. Each token of one set is matched with the token of the other set
that has the highest cosine of attention keys (mean over heads). The r most similar pairs become size-weighted means. r
is equal in all layers, or falls (`allocation`: decreasing). Attention weighs a merged token by its cluster size
(proportional attention); `size_bias` turns this off, as the paper does for some models.
Adapted, because the paper's tower attends globally and its counts are free: units instead of patches. Groups are
windows where the tower attends to windows, and frame pairs elsewhere; all groups lose the same share, as the author
advises for window attention. r follows from the budget, with a second round where it exceeds half of a group. Rows
merge after a layer's MLP, not before it, and keep their order. The paper does not say which set is absorbed: as in the
authors' code (facebookresearch/ToMe) it is the first token of each two, of which one round removes at most half of a
group.

It is `evoprune-merge` without penalties, with another schedule and the other set absorbed.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_merge import EvoPruneMerge


@dataclass(frozen=True)
class ToMe(EvoPruneMerge):
    """Fields: `allocation`, `first`, `last` and `size_bias` as in `evoprune-merge`; its other settings are fixed."""

    name: ClassVar[str] = "tome"
    source: ClassVar[str] = "arXiv 2210.09461, section 3"
    absorbed: ClassVar[int] = 0

    allocation: str = "mean"
    first: float = 0.0
    last: float = 1.0
    size_bias: bool = True

    diversity: ClassVar[float] = 0.0
    attention: ClassVar[float] = 0.0
    critical: ClassVar[float] = 0.0
    neighbours: ClassVar[int] = 1
    features: ClassVar[str] = "keys"
