"""VisionZip (arXiv 2412.04467): the most attended tokens as they are, and means of the other tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.settings import Share
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import centre_weights, closest, gathered, highest, snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class VisionZip(Selector):
    name = "visionzip"
    source = "arXiv 2412.04467"
    needs = frozenset({"attention", "keys"})

    dominant: Share = 0.85  # share of the kept tokens that attention selects

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention, keys = snap(tokens.attention), F.normalize(tokens.keys, dim=1)
        into = torch.full_like(tokens.owner, -1)
        index = tokens.by_pair(ascending(len(into), into.device))
        for here, share in zip(index, spread(keep, len(index)), strict=True):
            best = here[highest(attention[here], round(self.dominant * share))]
            into[best] = best
            rest, count = here[into[here] < 0], share - len(best)
            if count:  # otherwise the other tokens are dropped
                targets = rest[:: len(rest) // count][:count]
                into[rest] = targets[closest(keys[rest], keys[targets])[1]]
                into[targets] = targets
        return gathered(into, centre_weights(into, 0.5))
