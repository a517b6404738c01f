"""FlashVID's stage inside the language model (arXiv 2602.08024): FastV after 20 of 28 layers, three tenths of the tokens stay.

As in the authors' code. It lets the stage before the language model keep a quarter more tokens, so that the mean over all layers
is the budget; here `-b` is what reaches the language model.
"""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.fastv import FastV


@dataclass(frozen=True)
class FlashVidInner(FastV):
    """Field: depth: as in `FastV`."""

    name: ClassVar[str] = "flashvid-inner"
    source: ClassVar[str] = "arXiv 2602.08024"
    default_share: ClassVar[float] = 0.3

    depth: float = 20 / 28
