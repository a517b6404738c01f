"""EvoPrune's merging with the settings that won on the demo (results/ablations.md), and with those of ToMe."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.settings import Share


@dataclass(frozen=True)
class EvoPruneMerge(EvoPrunePaper):
    name = "evoprune-merge"
    source = "arXiv 2603.03681, with other settings"

    allocation: str = "decreasing"
    attention: Annotated[float, "(-inf, inf)"] = 0.0
    critical: Share = 0.0


@dataclass(frozen=True)
class ToMe(EvoPrunePaper):
    """Without penalties, equally much in every layer, and the other row of each two absorbed; the rest is fixed."""

    name = "tome"
    source = "arXiv 2210.09461, section 3"
    absorbed = 0

    allocation: str = "mean"
    first: float = 0.0
    last: float = 1.0

    diversity: ClassVar[float] = 0.0
    attention: ClassVar[float] = 0.0
    critical: ClassVar[float] = 0.0
    neighbours: ClassVar[int] = 1
    features: ClassVar[str] = "keys"
