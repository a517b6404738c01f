"""The SCOPE method, which keeps salient tokens that cover tokens unlike those already kept."""

from dataclasses import dataclass
from typing import Annotated

import torch

from evoprune.contrib.shared import BLOCK
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap


@dataclass(frozen=True)
class Scope(Selector):
    """SCOPE (arXiv 2510.24214): keeps salient tokens that add coverage.

    Each step keeps the token with the highest product of saliency and added coverage in the whole video. Saliency is attention
    raised to the power `alpha`. A token's coverage is its highest cosine similarity to a kept token, but at least 0. A candidate's
    added coverage is the amount by which keeping it would increase the total coverage.

    Differences from the paper: because Qwen's vision tower has no class token, this method replaces the class token's attention
    with the attention that a token receives within its frame pair.
    """

    name = "scope"
    source = "arXiv 2510.24214"

    alpha: Annotated[float, "[0, inf)"] = 1.0  # exponent of the saliency; if 0, only coverage matters

    @property
    def needs(self) -> frozenset[str]:
        if self.alpha == 0:
            return frozenset()
        return frozenset({"attention"})

    def select(self, tokens: Tokens, keep: int) -> Selection:
        # A row's added coverage can only shrink as other rows are selected. The sums from earlier steps are therefore upper bounds,
        # so only the highest sums need to be recomputed.
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

        # Bounds on added coverage; -1 for selected rows.
        bounds = torch.cat([adds(rows) for rows in every.split(BLOCK)])
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
