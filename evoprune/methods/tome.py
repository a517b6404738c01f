"""ToMe (arXiv 2210.09461): the most similar rows merge, equally many in every layer of the encoder.

It is `evoprune-merge` without penalties, with another schedule and the other set absorbed. docs/methods.md says what is adapted.
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
