"""MMR, the selection step of IDPruner without its trained scorer, which selects tokens by maximal marginal relevance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend import greedy_cosine
from evoprune.contrib.shared import Share, scaled
from evoprune.methods import Selection, Selector, Tokens, snap


@dataclass(frozen=True)
class Mmr(Selector):
    """Selects tokens by maximal marginal relevance, as in the selection step of IDPruner (based on arXiv 2602.13315).

    Each step keeps the token with the highest `lam` * importance - (1 - `lam`) * (highest cosine similarity to a kept token) in the
    whole video. Importance is scaled to the range from 0 to 1.

    Differences from the paper: `mmr` needs no trained scorer, unlike `idpruner`. A token's importance is its received attention or
    the norm of its key.
    """

    name = "mmr"
    source = "based on arXiv 2602.13315, without a scorer"

    importance: str = "attention"  # `attention` for the received attention, or `keynorm` for the norm of a unit's key
    lam: Share = 0.5  # weight of importance; the weight of diversity is 1 - lam

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
    """Select `keep` rows of `features` by maximal marginal relevance.

    Args:
        features: `[N, D]`, one row per token.
        importance: `[N]`, which the function scales to the range from 0 to 1.
        lam: The weight of importance. The weight of diversity is 1 - `lam`.

    Returns:
        int64 `[keep]`, ascending.
    """
    return diverse(features, scaled(importance.float()), keep, lam)


def diverse(features: torch.Tensor, importance: torch.Tensor, keep: int, lam: float) -> torch.Tensor:
    """Select like `most_relevant`, but without scaling the importance."""
    return greedy_cosine(F.normalize(features.float(), dim=1), None, lam * snap(importance), 1 - lam, keep, False)
