"""After D2Pruner (arXiv 2512.19443): attention without the bias of position, then tokens that are unlike each other."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.methods.fastv import FastV
from evoprune.methods.settings import Share
from evoprune.pruning.ranking import ranked, relative, snap
from evoprune.pruning.types import LayerTokens, Selection


@dataclass(frozen=True)
class D2Pruner(FastV):
    name = "d2pruner"
    source = "after arXiv 2512.19443"

    pivots: Share = 0.7  # share of the budget that goes by score alone
    alike: Annotated[float, "(-inf, inf)"] = 0.8  # above this cosine, two of the other tokens do not both stay

    def select(self, tokens: LayerTokens) -> Selection:
        order = ranked(relative(tokens.attention() / (tokens.evened().attention() + 1e-7)))
        pivots = int(tokens.left * self.pivots)
        rest, chosen = order[pivots:], []
        unit = F.normalize(tokens.hidden[rest].float(), dim=1)
        free = torch.ones_like(rest, dtype=torch.bool)
        while len(chosen) < tokens.left - pivots and free.any():
            best = int(free.nonzero()[0])
            chosen.append(best)
            free &= snap(unit @ unit[best]) <= self.alike
            free[best] = False
        late = torch.ones_like(rest).index_fill_(0, rest.new_tensor(chosen), 0)
        filled = rest[late.argsort(stable=True)]  # the unlike ones, then the others, each by score
        return Selection(torch.cat([order[:pivots], filled[: tokens.left - pivots]]).sort().values)
