"""Maximal marginal relevance, the selection of IDPruner (arXiv 2602.13315): important tokens that differ from each other."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend.operators import greedy_cosine
from evoprune.methods.base import Selector
from evoprune.methods.ranking import scaled, snap
from evoprune.methods.settings import Share
from evoprune.methods.types import Selection, Tokens

IMPORTANCE = ("attention", "keynorm")


@dataclass(frozen=True)
class Mmr(Selector):
    name = "mmr"
    source = "after arXiv 2602.13315, without its trained scorer"

    importance: str = "attention"  # `attention` received, or `keynorm` for the norm of a unit's key
    lam: Share = 0.5  # weight of importance; diversity has the weight 1 - lam

    def __post_init__(self):
        super().__post_init__()
        if self.importance not in IMPORTANCE:
            raise ValueError(f"importance is one of {', '.join(IMPORTANCE)}, not {self.importance!r}")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention" if self.importance == "attention" else "keys"})

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention if self.importance == "attention" else tokens.keys.norm(dim=1)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_relevant(tokens.features, self.scores(tokens), keep, self.lam))


def most_relevant(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float = 0.5) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `features` (`[N, D]`) by maximal marginal relevance; `lam` weighs `importance` (`[N]`)."""
    important = lam * snap(scaled(importance.float()))
    return greedy_cosine(F.normalize(features.float(), dim=1), None, important, 1 - lam, keep, False)
