"""EvoPrune's merging with the settings that were best on the demo model (results/ablations.md)."""

from dataclasses import dataclass
from typing import Annotated

from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.settings import Share


@dataclass(frozen=True)
class EvoPruneMerge(EvoPrunePaper):
    name = "evoprune-merge"
    source = "arXiv 2603.03681, with other settings"

    allocation: str = "decreasing"
    attention: Annotated[float, "(-inf, inf)"] = 0.0
    critical: Share = 0.0
