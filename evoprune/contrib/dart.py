"""DART (arXiv 2502.11494): a few pivot tokens, and the tokens that are least similar to them."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranking import ranked, snap
from evoprune.methods.types import Selection, Tokens


@dataclass(frozen=True)
class Dart(Selector):
    name = "dart"
    source = "arXiv 2502.11494"

    visual: Annotated[int, "[0, inf)"] = 4  # number of visual pivots
    text: Annotated[int, "[0, inf)"] = 4  # number of pivots of the question; with 0 the method does not read it

    def __post_init__(self):
        super().__post_init__()
        if not self.visual + self.text:
            raise ValueError("visual and text are both 0, and one of them must be more")

    @property
    def reads_question(self) -> bool:
        return self.text > 0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        unit, first = tokens.normalised, longest(tokens.features.float(), min(self.visual, keep))
        pivots = unit[first]
        if self.text:
            pivots = torch.cat([pivots, F.normalize(tokens.question[longest(tokens.question, self.text)], dim=1)])
        unlike = -snap(unit @ pivots.T)
        unlike[first] = -torch.inf
        each, odd = divmod(keep - len(first), len(pivots))
        selected = [first]
        for pivot in range(len(pivots)):
            selected.append(ranked(unlike[:, pivot])[: each + (pivot < odd)])
            unlike[selected[-1]] = -torch.inf
        return Selection(torch.cat(selected).sort().values)


def longest(x: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[min(count, n)]`: the rows of `x` (`[n, D]`) of greatest L1 norm, the greatest first; ties by index."""
    norm = x.abs().sum(1)
    return ranked(snap(norm / norm.max().clamp(min=1e-12)))[:count]
