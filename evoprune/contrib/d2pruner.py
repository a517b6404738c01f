"""The `d2pruner` method, which keeps tokens with high attention, corrected for positional bias, and then dissimilar tokens."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Part, Share, ranked, relative
from evoprune.methods import LanguageMethod, LanguagePlan, LayerTokens, Selection, one_drop, snap


@dataclass(frozen=True)
class D2Pruner(LanguageMethod):
    """Keeps tokens with high debiased attention, then dissimilar tokens. Based on D2Pruner (arXiv 2512.19443), but not on the
    authors' code.

    After the first `depth` fraction of the layers, each token's score is the attention that it receives from the last token,
    divided by a prior. A `pivots` fraction of the budget goes to the highest-scoring tokens. The remaining budget goes, in order of
    score, to tokens with a pairwise cosine similarity of at most `alike`. Any leftover budget goes to the other tokens.

    Differences from the paper: this method follows the abstract and two ports of the code. The prior is the attention that a token
    would receive if all visual tokens had the same key, namely the mean of their keys. The authors instead measure the prior over
    many images.
    """

    name = "d2pruner"
    source = "after arXiv 2512.19443"

    depth: Part = 2 / 32  # fraction of the layers that run before tokens are dropped
    pivots: Share = 0.7  # fraction of the budget that goes to the highest-scoring tokens
    alike: Annotated[float, "(-inf, inf)"] = 0.8  # maximum cosine similarity between any two dissimilar tokens

    def drops(self, depth: int, tokens: int, budget: float) -> LanguagePlan:
        return one_drop(depth, tokens, self.depth, budget)

    def select(self, tokens: LayerTokens) -> Selection:
        order = ranked(relative(tokens.attention() / (tokens.evened().attention() + 1e-7)))
        pivots = int(tokens.left * self.pivots)
        rest = order[pivots:]
        chosen = []
        unit = F.normalize(tokens.hidden[rest].float(), dim=1)
        free = torch.ones_like(rest, dtype=torch.bool)
        while len(chosen) < tokens.left - pivots and free.any():
            best = int(free.nonzero()[0])
            chosen.append(best)
            free &= snap(unit @ unit[best]) <= self.alike
            free[best] = False
        late = torch.ones_like(rest).index_fill_(0, rest.new_tensor(chosen), 0)
        filled = rest[late.argsort(stable=True)]  # dissimilar tokens, then all other tokens, both in order of score
        return Selection(torch.cat([order[:pivots], filled[: tokens.left - pivots]]).sort().values)
