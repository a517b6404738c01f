"""The VisionZip method, which keeps the most attended tokens and means of the other tokens."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Share, centre_weights, closest, gathered
from evoprune.methods import Selection, Selector, Tokens, arange_on, highest, snap, spread


@dataclass(frozen=True)
class VisionZip(Selector):
    """VisionZip (arXiv 2412.04467): keeps the most attended tokens and means of the other tokens.

    Each frame pair gets an equal share of the budget, and a fraction `dominant` of it goes to the most attended tokens. Evenly
    spaced tokens among the remaining ones become targets. Every other token joins the target with the most similar key (by cosine).
    Each target is then replaced with the average of itself and the mean of the tokens that joined it.

    Differences from the authors' code: because Qwen's vision tower has no class token, this method replaces the class token's
    attention with the attention that a token receives within its frame pair. The authors' code adds the mean to the target without
    halving the sum.
    """

    name = "visionzip"
    source = "arXiv 2412.04467"
    needs = frozenset({"attention", "keys"})

    dominant: Share = 0.85  # fraction of the kept tokens selected by attention

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return tokens.attention

    def select(self, tokens: Tokens, keep: int) -> Selection:
        attention = snap(tokens.attention)
        keys = F.normalize(tokens.keys, dim=1)
        into = torch.full_like(tokens.unit_to_row, -1)
        index = tokens.by_pair(arange_on(len(into), into.device))
        for here, share in zip(index, spread(keep, len(index)), strict=True):
            best = here[highest(attention[here], round(self.dominant * share))]
            into[best] = best
            rest = here[into[here] < 0]
            count = share - len(best)
            if count:  # otherwise, all other tokens are dropped
                targets = rest[:: len(rest) // count][:count]
                into[rest] = targets[closest(keys[rest], keys[targets])[1]]
                into[targets] = targets
        return gathered(into, centre_weights(into, 0.5))
