"""MMR, the selection of IDPruner: maximal marginal relevance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend import greedy_cosine
from evoprune.contrib.shared import Share, scaled
from evoprune.methods import Selection, Selector, Tokens, snap


@dataclass(frozen=True)
class Mmr(Selector):
    """The selection of IDPruner (after arXiv 2602.13315): maximal marginal relevance.

    Over the whole video, repeatedly keep the token with the highest `lam` * importance - (1 - `lam`) * (greatest cosine to a kept
    token). Importance is scaled to the range 0 to 1.

    What differs: the paper trains a scorer, which is not available. Here importance is attention received or the norm of keys.
    """

    name = "mmr"
    source = "based on arXiv 2602.13315, without its trained scorer"

    importance: str = "attention"  # `attention` received, or `keynorm` for the norm of a unit's key
    lam: Share = 0.5  # weight of importance; diversity has the weight 1 - lam

    def __post_init__(self):
        super().__post_init__()
        if self.importance not in ("attention", "keynorm"):
            raise ValueError(f"importance must be attention or keynorm, not {self.importance!r}")

    @property
    def needs(self) -> frozenset[str]:
        if self.importance == "attention":
            return frozenset({"attention"})
        return frozenset({"keys"})

    def scores(self, tokens: Tokens) -> torch.Tensor:
        if self.importance == "attention":
            return tokens.attention
        return tokens.keys.norm(dim=1)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_relevant(tokens.features, self.scores(tokens), keep, self.lam))


def most_relevant(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float = 0.5) -> torch.Tensor:
    """Return int64 `[keep]`, ascending: rows of `features` by maximal marginal relevance.

    Args:
        features: `[N, D]`.
        importance: `[N]`, weighted by `lam`.
    """
    important = lam * snap(scaled(importance.float()))
    return greedy_cosine(F.normalize(features.float(), dim=1), None, important, 1 - lam, keep, False)
