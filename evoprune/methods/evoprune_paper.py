"""EvoPrune after its paper (arXiv 2603.03681): `skip` allocation, attention in the score, a critical share."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_merge import EvoPruneMerge


@dataclass(frozen=True)
class EvoPrunePaper(EvoPruneMerge):
    """Fields as in `evoprune-merge`, with other defaults."""

    name: ClassVar[str] = "evoprune-paper"
    source: ClassVar[str] = "arXiv 2603.03681"

    allocation: str = "skip"
    attention: float = 0.1
    critical: float = 0.1
