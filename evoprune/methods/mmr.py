"""Maximal marginal relevance, the selection of IDPruner (arXiv 2602.13315): important tokens that differ from each other.

As in the paper: importance is scaled to [0, 1] by its least and greatest value. The first token is the most important
one. Each further token has the highest lam * importance - (1 - lam) * (greatest cosine to a selected token), with lam
0.5.
Left out: the paper's importance comes from a trained scorer whose weights are not public. So this method is called
`mmr` and not IDPruner. Importance is the attention received in the last full-attention layer, or the norm of the keys
there, or in Python any vector (`most_relevant`).
Adapted: one selection covers the whole video, with a running maximum instead of an N x N matrix. Scores are rounded, so
equal tokens are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.ranking import scaled
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens

IMPORTANCE = ("attention", "keynorm")


@dataclass(frozen=True)
class Mmr(Selector):
    """O(K N D), memory O(N D). Fields:

    importance: `attention` for attention received, or `keynorm` for the norm of a unit's key.
    lam: weight of importance, from 0 to 1; diversity has the weight 1 - lam.
    """

    name: ClassVar[str] = "mmr"
    source: ClassVar[str] = "after arXiv 2602.13315, without its trained scorer"

    importance: str = "attention"
    lam: float = 0.5

    def __post_init__(self):
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance is one of {', '.join(IMPORTANCE)}, not {self.importance!r}")
        check_ranges(self, lam="[0, 1]")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention" if self.importance == "attention" else "keys"})

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention if self.importance == "attention" else tokens.keys.norm(dim=1)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_relevant(tokens.features, self.scores(tokens), keep, self.lam))


def most_relevant(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float = 0.5) -> torch.Tensor:
    """Selects rows by maximal marginal relevance; ties go to the lower index.

    Args:
        features: `[N, D]`, any float dtype.
        importance: float `[N]`, on any scale.
        keep: K, from 1 to N.
        lam: weight of importance, from 0 to 1.

    Returns:
        int64 `[K]`, indices of rows, ascending.
    """
    unit = F.normalize(features.float(), dim=1)
    important = lam * snap(scaled(importance.float()))
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    near = torch.zeros(len(unit), dtype=torch.float32, device=unit.device)
    for step in range(keep):
        latest = snap(important - (1 - lam) * near).masked_fill(selected, -torch.inf).argmax()
        selected[latest] = True
        cosine = snap(unit @ unit[latest])
        near = torch.maximum(near, cosine) if step else cosine
    return selected.nonzero().flatten()
