"""After D2Pruner (arXiv 2512.19443): attention without the bias of position, then tokens that are unlike each other.

1. Score: attention of the last token after the second layer, mean over heads, divided by a prior plus 1e-7.
2. The best seven tenths of the budget stay. Of the other tokens, in order of score, each stays that has no cosine above 0.8 to one
   that did (a greedy maximal independent set). The rest of the budget is filled up by score.

No code of the authors could be had; this follows the abstract and two ports. Adapted: their prior is the mean attention of each
position over many images of one size, measured once for a model. Videos have no common size, so the prior here is the attention
that the same query would give if all visual tokens had the same key, their mean: what position alone makes of it, in this
model, layer and prompt. Left out: edges between near tokens, which their setting for general questions (alpha 1) does not use.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.fastv import FastV
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.layer_tokens import LayerTokens
from evoprune.pruning.ranking import ranked, relative
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection


@dataclass(frozen=True)
class D2Pruner(FastV):
    """O(K n D). Fields:

    depth: as in `FastV`.
    pivots: share of the budget that goes by score alone, in [0, 1].
    alike: cosine above which two of the other tokens do not both stay.
    """

    name: ClassVar[str] = "d2pruner"
    source: ClassVar[str] = "after arXiv 2512.19443"

    pivots: float = 0.7
    alike: float = 0.8

    def __post_init__(self):
        super().__post_init__()
        check_ranges(self, pivots="[0, 1]", alike="(-inf, inf)")

    def select(self, tokens: LayerTokens) -> Selection:
        score = relative(tokens.attention() / (tokens.evened().attention() + 1e-7))
        return Selection(
            pivots_and_unlike(score, tokens.hidden, tokens.left, int(tokens.left * self.pivots), self.alike)
        )


def pivots_and_unlike(
    score: torch.Tensor, features: torch.Tensor, keep: int, pivots: int, alike: float
) -> torch.Tensor:
    """int64 `[keep]`, ascending: the `pivots` best of `score` (`[n]`), then those whose `features` (`[n, D]`) are unlike."""
    order = ranked(score)
    rest, chosen = order[pivots:], []
    unit = F.normalize(features[rest].float(), dim=1)
    free = torch.ones_like(rest, dtype=torch.bool)
    while len(chosen) < keep - pivots and free.any():
        best = int(free.nonzero()[0])
        chosen.append(best)
        free &= snap(unit @ unit[best]) <= alike
        free[best] = False
    first = torch.ones_like(rest, dtype=torch.bool)
    if chosen:
        first[chosen] = False
    filled = rest[first.int().argsort(stable=True)]  # the unlike ones, then the others, each by score
    return torch.cat([order[:pivots], filled[: keep - pivots]]).sort().values
