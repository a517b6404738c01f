"""EvoPrune after its paper (arXiv 2603.03681): `skip` allocation, attention in the score, a critical share.

The code is that of `evoprune-merge`, whose file states what is adapted to Qwen2.5-VL. The form of the score, its weights and the
number of neighbours are this project's. No code of the authors is public.
"""

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
