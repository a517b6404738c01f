"""ToMe: rows merge in every layer, the most similar ones first."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods import EvoPrunePaper


@dataclass(frozen=True)
class ToMe(EvoPrunePaper):
    """ToMe (arXiv 2210.09461, section 3): rows merge in every layer, the most similar ones first.

    In a window or frame pair, every second row is matched with its most similar other row, by the cosine of keys. The most similar
    pairs merge into their size-weighted means, the same number in every layer, and attention weights a row by its size. It is
    `EvoPrunePaper` without penalties; the settings that are not fields here are fixed.

    What differs: units instead of patches, windows as groups in layers with window attention, counts set by the budget. Rows merge
    after a layer's MLP, in the authors' code before it.
    """

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
