"""SCOPE: saliency times added coverage."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import BLOCK
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap


@dataclass(frozen=True)
class Scope(Selector):
    """SCOPE (arXiv 2510.24214): keep tokens that are salient and add coverage.

    Over the whole video, repeatedly keep the token with the highest saliency * added coverage. Saliency is attention to the power
    `alpha`. The coverage of a token is its greatest cosine to a kept token, at least 0. A candidate's added coverage is the sum of
    its increases to the coverage of all tokens.

    What differs: attention received replaces the attention of a class token.
    """

    name = "scope"
    source = "arXiv 2510.24214"

    alpha: Annotated[float, "[0, inf)"] = 1.0  # power of saliency; at 0, only coverage decides

    @property
    def needs(self) -> frozenset[str]:
        if self.alpha == 0:
            return frozenset()
        return frozenset({"attention"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        # The coverage that a row adds only shrinks while others are selected. So earlier sums are upper bounds, and only the
        # highest are computed again.
        unit = tokens.normalised
        every = arange_on(len(unit), unit.device)
        cover = torch.zeros_like(unit[:, 0])
        weight = torch.ones_like(every).double()
        if self.alpha:
            weight = snap(tokens.attention).double() ** self.alpha

        def cosine(rows: torch.Tensor) -> torch.Tensor:
            return (unit[rows] @ unit.T).mul_(16384).round_()  # in steps, like `snap`

        def adds(rows: torch.Tensor) -> torch.Tensor:
            return cosine(rows).sub_(cover).clamp_(min=0).sum(1, dtype=torch.float64) * weight[rows]

        bounds = torch.cat([adds(rows) for rows in every.split(BLOCK)])  # bounds on added coverage; -1 once selected
        for _ in range(keep):
            known = bounds <= 0
            while not known[best := bounds.argmax()]:
                stale = torch.where(known, -torch.inf, bounds).topk(min(32, len(unit))).indices
                stale = stale[~known[stale]]
                bounds[stale] = adds(stale)
                known[stale] = True
            bounds[best] = -1
            cover = torch.maximum(cover, cosine(best[None])[0])
        return Selection((bounds < 0).nonzero().flatten())
