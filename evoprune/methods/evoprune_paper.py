"""EvoPrune with the paper's own settings (arXiv 2603.03681): `skip` allocation, attention in the score, a critical share.

What is adapted to Qwen2.5-VL is in `evoprune-merge`, which has the same code and other defaults.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_merge import EvoPruneMerge


@dataclass(frozen=True)
class EvoPrunePaper(EvoPruneMerge):
    """Fields as in `evoprune-merge`."""

    name: ClassVar[str] = "evoprune-paper"
    source: ClassVar[str] = "arXiv 2603.03681"

    allocation: str = "skip"
    attention: float = 0.1
    critical: float = 0.1
