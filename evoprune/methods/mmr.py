"""Maximal marginal relevance, the choice of IDPruner (arXiv 2602.13315): important tokens that are unlike those chosen before.

Faithful: importance brought to [0, 1] by its least and greatest value; first the most important token, then always the one with
the highest lam * importance - (1 - lam) * (greatest cosine to what is chosen), lam 0.5. Left out: the paper's importance comes
from a scorer that was trained for it, and no such weights are at hand; so this is called `mmr` and not IDPruner. Importance is the
attention received at the last layer that sees whole grids, the norm of the keys there, or in Python any vector
(`most_relevant`). Adapted: a whole video at once, with a running maximum instead of an N x N matrix; scores are rounded so that
equals are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import scaled
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens

IMPORTANCE = ("attention", "keynorm")


@dataclass(frozen=True)
class Mmr(Selector):
    """O(K N D), memory O(N D). Fields:

    importance: attention received (`attention`), or the length of a unit's key (`keynorm`).
    lam: weight of importance, the rest is that of being different.
    """

    name: ClassVar[str] = "mmr"

    importance: str = "attention"
    lam: float = 0.5

    def __post_init__(self):
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance is one of {', '.join(IMPORTANCE)}, not {self.importance!r}")
        if not 0 <= self.lam <= 1:
            raise ValueError("lam is a weight from 0 to 1")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention" if self.importance == "attention" else "keys"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        importance = tokens.attention if self.importance == "attention" else tokens.keys.norm(dim=1)
        return Selection(most_relevant(tokens.features, importance, keep, self.lam))


def most_relevant(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float = 0.5) -> torch.Tensor:
    """The indices of `keep` rows of `features` (`[N, D]`), ascending; `importance`: `[N]`, on any scale."""
    unit = F.normalize(features.float(), dim=1)
    important = lam * snap(scaled(importance.float()))
    chosen = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    near = torch.zeros(len(unit), device=unit.device)
    for step in range(keep):
        latest = snap(important - (1 - lam) * near).masked_fill(chosen, -torch.inf).argmax()
        chosen[latest] = True
        cosine = snap(unit @ unit[latest])
        near = torch.maximum(near, cosine) if step else cosine
    return chosen.nonzero().flatten()
