"""ToMe: rows merge in every layer, the most similar ones first."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.evoprune_paper import EvoPrunePaper


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
