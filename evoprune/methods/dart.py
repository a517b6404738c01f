"""DART (arXiv 2502.11494): a few pivots, and the tokens that are least like them.

Faithful: pivots are the 4 visual and the 4 text tokens of greatest L1 norm; for each in turn the least similar of the tokens
that are left are kept, as many for each pivot. Adapted: the paper does this with keys and states of the language model's first
layers, which no method after the encoder has. Here norms and cosines are those of the embeddings that the language model reads,
visual and text, as in NVIDIA's TensorRT-Edge-LLM; the paper finds that little depends on how pivots are chosen. Text is the
question's. The first pivots, those of visual tokens, have the odd ones. Norms (as a share of the greatest) and cosines are
rounded so that equals are ties, which go by index.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.ranking import ranked
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Dart(Selector):
    """O(N D), memory O(N D). Fields:

    visual, text: pivots of either kind; without text it needs no question.
    """

    name: ClassVar[str] = "dart"

    visual: int = 4
    text: int = 4

    def __post_init__(self):
        if min(self.visual, self.text) < 0 or not self.visual + self.text:
            raise ValueError("visual and text are at least 0, and one of them more")

    @property
    def reads_question(self) -> bool:
        return self.text > 0

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.features.float()
        unit, first = F.normalize(x, dim=1), longest(x, min(self.visual, keep))
        pivots = unit[first]
        if self.text:
            pivots = torch.cat([pivots, F.normalize(tokens.question[longest(tokens.question, self.text)], dim=1)])
        unlike = -snap(unit @ pivots.T)
        unlike[first] = -torch.inf
        each, odd = divmod(keep - len(first), len(pivots))
        chosen = [first]
        for pivot in range(len(pivots)):
            chosen.append(ranked(unlike[:, pivot])[: each + (pivot < odd)])
            unlike[chosen[-1]] = -torch.inf
        return Selection(torch.cat(chosen).sort().values)


def longest(x: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count, or fewer]`: the rows of `x` (`[n, D]`) of greatest L1 norm, the greatest first."""
    norm = x.abs().sum(1)
    return ranked(snap(norm / norm.max().clamp(min=1e-12)))[:count]
