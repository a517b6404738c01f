"""SCOPE: keeps tokens that are salient and add coverage."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import BLOCK
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap


@dataclass(frozen=True)
class Scope(Selector):
    """SCOPE (arXiv 2510.24214): keeps tokens that are salient and add coverage.

    Repeatedly keeps the token of the whole video with the highest product of saliency and added coverage. Saliency is attention to
    the power of `alpha`. The coverage of a token is its highest cosine to a kept token, but at least 0. The added coverage of a
    candidate is the sum of the increases in the coverage of all tokens.

    Differences from the paper: this method uses the attention that each token receives instead of the class token's attention,
    because Qwen's tower has no class token.
    """

    name = "scope"
    source = "arXiv 2510.24214"

    alpha: Annotated[float, "[0, inf)"] = 1.0  # exponent of saliency; with 0, only coverage counts

    @property
    def needs(self) -> frozenset[str]:
        if self.alpha == 0:
            return frozenset()
        return frozenset({"attention"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        # The coverage that a row adds can only shrink as other rows are selected. Earlier sums are therefore upper bounds, and only
        # the highest sums need to be recomputed.
        unit = tokens.normalised
        every = arange_on(len(unit), unit.device)
        cover = torch.zeros_like(unit[:, 0])
        weight = torch.ones_like(every).double()
        if self.alpha:
            weight = snap(tokens.attention).double() ** self.alpha

        def cosine(rows: torch.Tensor) -> torch.Tensor:
            return (unit[rows] @ unit.T).mul_(16384).round_()  # in the same steps as `snap`

        def adds(rows: torch.Tensor) -> torch.Tensor:
            return cosine(rows).sub_(cover).clamp_(min=0).sum(1, dtype=torch.float64) * weight[rows]

        bounds = torch.cat([adds(rows) for rows in every.split(BLOCK)])  # bounds on added coverage; -1 if selected
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
