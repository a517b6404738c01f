"""DivPrune (arXiv 2503.02175): the most diverse tokens, by greedy max-min distance."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.backend.greedy import greedy_cosine
from evoprune.methods.base import Selector
from evoprune.methods.types import Selection, Tokens


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
    return greedy_cosine(F.normalize(features.float(), dim=1), weight, None, 1.0, keep, True)
