"""SCOPE (arXiv 2510.24214): tokens that are salient and cover what no other covers yet.

Faithful: a token is covered as well as the most similar chosen one is similar to it, at least 0; always the token is chosen with
the highest product of its saliency and of what it adds to the coverage of all tokens, saliency to the power of alpha, 1.
Adapted: saliency is the attention received at the tower's last layer that sees whole grids, for want of a class token; a whole
video at once. What a token adds only shrinks as others are chosen, so sums are kept as upper bounds and only those at the top
are brought up to date: the choice is the exact greedy one, and no N x N matrix is held. Cosines are rounded to multiples of
1/16384, whose sums are exact, so that equals are ties, which go by index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import BLOCK
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens

AT_ONCE = 32  # sums brought up to date at a time
STEPS = 16384  # in which cosines are counted, as `snap` has it


@dataclass(frozen=True)
class Scope(Selector):
    """O(N^2 D) for the first token, about O(K N D) for the others; memory O(N D). Fields:

    alpha: power of saliency; 0 leaves coverage alone.
    """

    name: ClassVar[str] = "scope"

    alpha: float = 1.0

    def __post_init__(self):
        if not 0 <= self.alpha < math.inf:
            raise ValueError("alpha is at least 0")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"} if self.alpha else ())

    def select(self, tokens: Tokens, keep: int) -> Selection:
        weight = snap(tokens.attention).double() ** self.alpha if self.alpha else None
        return Selection(best_covering(tokens.features, weight, keep))


def best_covering(features: torch.Tensor, weight: torch.Tensor | None, keep: int) -> torch.Tensor:
    """The indices of `keep` rows of `features` (`[N, D]`), ascending; `weight`: float64 `[N]`, at least 0, None for equal ones."""
    unit = F.normalize(features.float(), dim=1)
    every = torch.arange(len(unit), device=unit.device)
    weight = torch.ones_like(every, dtype=torch.float64) if weight is None else weight
    cover = torch.zeros(len(unit), device=unit.device)

    def cosine(some: torch.Tensor) -> torch.Tensor:
        return (unit[some] @ unit.T).mul_(STEPS).round_()

    def adds(some: torch.Tensor) -> torch.Tensor:
        return cosine(some).sub_(cover).clamp_(min=0).sum(1, dtype=torch.float64) * weight[some]

    most = torch.cat([adds(some) for some in every.split(BLOCK)])  # what each adds at most; -1 once chosen
    for _ in range(keep):
        known = most <= 0
        while not known[best := most.argmax()]:
            stale = torch.where(known, -torch.inf, most).topk(min(AT_ONCE, len(unit))).indices
            stale = stale[~known[stale]]
            most[stale], known[stale] = adds(stale), True
        most[best] = -1
        cover = torch.maximum(cover, cosine(best[None])[0])
    return (most < 0).nonzero().flatten()
