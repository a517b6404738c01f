"""FlashVID's stage inside the language model (arXiv 2602.08024): FastV after 20 of 28 layers, three tenths of the tokens stay."""

from dataclasses import dataclass
from typing import ClassVar

from evoprune.methods.fastv import FastV
from evoprune.methods.settings import Part


@dataclass(frozen=True)
class FlashVidInner(FastV):
    name: ClassVar[str] = "flashvid-inner"
    source: ClassVar[str] = "arXiv 2602.08024"
    default_share: ClassVar[float] = 0.3

    depth: Part = 20 / 28
