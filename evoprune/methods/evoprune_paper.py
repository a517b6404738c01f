"""EvoPrune after its paper (arXiv 2603.03681): `skip` allocation, attention in the score, a critical share."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from evoprune.methods.evoprune_merge import EvoPruneMerge
from evoprune.methods.settings import Share


@dataclass(frozen=True)
class EvoPrunePaper(EvoPruneMerge):
    """Fields as in `evoprune-merge`, with other defaults."""

    name: ClassVar[str] = "evoprune-paper"
    source: ClassVar[str] = "arXiv 2603.03681"

    allocation: str = "skip"
    attention: Annotated[float, "(-inf, inf)"] = 0.1
    critical: Share = 0.1
