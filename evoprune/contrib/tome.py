"""The ToMe method, which merges the most similar rows in every layer of the vision encoder."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods import EvoPrunePaper


@dataclass(frozen=True)
class ToMe(EvoPrunePaper):
    """ToMe (arXiv 2210.09461, section 3): merges rows in every layer, starting with the most similar ones.

    In each window or frame pair, every second row is matched with the remaining row whose key is most similar (by cosine). The most
    similar pairs merge into means, weighted by cluster size. Every layer merges the same number of rows, and attention weights each
    row by its cluster size. The implementation is `EvoPrunePaper` without its penalties. Settings declared as class variables here
    cannot be changed by users.

    Differences from the authors' code: rows are units instead of patches, rows merge within windows in layers with window
    attention, and the budget determines how many rows merge. Rows merge after a layer's MLP, while the authors' code merges them
    before it.
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
