"""DivPrune (arXiv 2503.02175): the most diverse tokens, by greedy max-min distance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import BLOCK, greedy, snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class DivPrune(Selector):
    name = "divprune"
    source = "arXiv 2503.02175"

    def select(self, tokens: Tokens, keep: int) -> Selection:
        return Selection(most_diverse(tokens.features, keep))


def most_diverse(features: torch.Tensor, keep: int, weight: torch.Tensor | None = None) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `features` (`[N, D]`) by greedy max-min distance; ties go to the lower index.

    `weight`: float `[N]`, at least 0; multiplies the distance of a row to the selected rows. None for 1.
    """
    unit = F.normalize(features.float(), dim=1)

    def far(near: torch.Tensor) -> torch.Tensor:
        distance = 1 - near.clamp(min=-1)
        return distance if weight is None else snap(distance * weight)

    return greedy(unit, nearest_cosine(unit) if keep else unit[:, 0], keep, far)


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """float32 `[N]`: the cosine of each row of `unit` (`[N, D]`, of length one) to the most similar other row, -inf if none."""
    best = []
    for start in range(0, len(unit), BLOCK):
        cosine = snap(unit[start : start + BLOCK] @ unit.T)
        itself = ascending(len(cosine), unit.device)
        cosine[itself, itself + start] = -torch.inf
        best.append(cosine.amax(1))
    return torch.cat(best)
