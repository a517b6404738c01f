"""SCOPE (arXiv 2510.24214): salient tokens that cover what no selected token covers yet."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranking import BLOCK, snap
from evoprune.methods.types import Selection, Tokens, ascending

AT_ONCE = 32  # sums that are computed again at a time
STEPS = 16384  # cosines are integers of this many steps, as in `ranking.snap`


@dataclass(frozen=True)
class Scope(Selector):
    name = "scope"
    source = "arXiv 2510.24214"

    alpha: Annotated[float, "[0, inf)"] = 1.0  # power of saliency; at 0, coverage alone decides

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention"} if self.alpha else ())

    def select(self, tokens: Tokens, keep: int) -> Selection:
        weight = snap(tokens.attention).double() ** self.alpha if self.alpha else None
        return Selection(best_covering(tokens.features, weight, keep))


def best_covering(features: torch.Tensor, weight: torch.Tensor | None, keep: int) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `features` (`[N, D]`) greedily by coverage times `weight` (float64 `[N]`); ties by index.

    What a row adds only shrinks while others are selected. So earlier sums are upper bounds; only the highest are computed anew.
    """
    unit = F.normalize(features.float(), dim=1)
    every = ascending(len(unit), unit.device)
    weight = torch.ones_like(every, dtype=torch.float64) if weight is None else weight
    cover = torch.zeros(len(unit), dtype=torch.float32, device=unit.device)

    def cosine(some: torch.Tensor) -> torch.Tensor:
        return (unit[some] @ unit.T).mul_(STEPS).round_()

    def adds(some: torch.Tensor) -> torch.Tensor:
        return cosine(some).sub_(cover).clamp_(min=0).sum(1, dtype=torch.float64) * weight[some]

    most = torch.cat([adds(some) for some in every.split(BLOCK)])  # what each adds at most; -1 once selected
    for _ in range(keep):
        known = most <= 0
        while not known[best := most.argmax()]:
            stale = torch.where(known, -torch.inf, most).topk(min(AT_ONCE, len(unit))).indices
            stale = stale[~known[stale]]
            most[stale], known[stale] = adds(stale), True
        most[best] = -1
        cover = torch.maximum(cover, cosine(best[None])[0])
    return (most < 0).nonzero().flatten()
