"""Nüwa's first stage, which keeps the most attended tokens in each region and replaces the weakest of them with weighted means."""

from dataclasses import dataclass, replace
from math import hypot
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import Share, ranked
from evoprune.methods import Selection, Selector, Tokens, arange_on, snap, spread


@dataclass(frozen=True)
class Nuwa(Selector):
    """Nüwa's first stage (arXiv 2602.02951), before the language model: keeps the most attended tokens in each region.

    Each frame pair is divided into cells of 2x2 positions, and the `cell` most attended tokens in each cell are candidates. The
    most attended candidates are kept, and other tokens are kept only if there are too few candidates. A kept token whose attention
    is below the `weak` quantile is replaced by a weighted mean over the frame pair. In this mean, the kept token has a weight of 1.
    The weight of any other token is the product of two factors, clamped at 0: the cosine similarity of the two tokens' states in
    the middle of the tower, and 1 - distance / (`reach` * diagonal).

    Differences from the authors' code: because Qwen's vision tower has no class token, this method replaces the class token's
    attention with the attention that a token receives within its frame pair. The authors' code leaves the states in window order
    and thus assigns the weights to the wrong positions. Here, states are in raster order.
    """

    name = "nuwa"
    source = "arXiv 2602.02951, the stage before the language model"
    needs = frozenset({"attention", "middle"})

    cell: Annotated[int, "[1, 4]"] = 3  # number of candidate tokens per cell of 2x2 positions
    weak: Share = 0.1  # quantile of the kept tokens' attention below which tokens are replaced with means
    reach: Annotated[float, "(0, inf]"] = 0.8  # distance at which weights reach 0, as a fraction of the diagonal

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return snap(tokens.attention)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        score = self.scores(tokens).view(tokens.grid)
        middle = tokens.by_pair(tokens.middle)
        late = (rank_in_cell(score).flatten(1) - self.cell + 1).clamp(min=0)
        kept = []
        means = []
        start = 0
        for pair, share in enumerate(spread(keep, len(score))):
            order = ranked(score[pair].flatten())
            here = order[late[pair][order].argsort(stable=True)][:share].sort().values
            if share:
                token, place, weight = self.means(score[pair], here, middle[pair])
                means.append((token + start, place + pair * len(order), weight))
            kept.append(here)
            start += share
        return replace(Selection.of_pairs(kept, len(order)), means=tuple(map(torch.cat, zip(*means, strict=True))))

    def means(
        self, score: torch.Tensor, kept: torch.Tensor, middle: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute the weighted means that replace a frame pair's weak tokens.

        Args:
            score: `[H, W]`, the attention received by each token.
            kept: int64 `[k]`, the kept positions.
            middle: `[H W, d]`, the tokens' states in the middle of the tower.

        Returns:
            int64 `[m]` tokens (indices into `kept`), int64 `[m]` positions to average, and float32 `[m]` weights.
        """
        height, width = score.shape
        attention = score.flatten()[kept]
        own = arange_on(len(kept), kept.device)
        weak = own[attention < attention.quantile(self.weak)]
        unit = F.normalize(middle.float(), dim=1)
        places = arange_on(height * width, kept.device)
        at = torch.stack([places // width, places % width], 1).float()
        near = 1 - torch.cdist(at[kept[weak]], at) / (self.reach * (hypot(height - 1, width - 1) or 1))
        weight = (unit[kept[weak]] @ unit.T).clamp(min=0) * near.clamp(min=0)
        weight[arange_on(len(weak), kept.device), kept[weak]] = 0  # the token's own weight of 1 is added below
        token, place = weight.nonzero().unbind(1)
        weight = torch.cat([torch.ones_like(attention), weight[token, place]])
        return torch.cat([own, weak[token]]), torch.cat([kept, place]), weight


def rank_in_cell(score: torch.Tensor) -> torch.Tensor:
    """Rank the scores within cells of 2x2 positions, with 0 for the highest score in a cell.

    `score` is `[T, H, W]`. Ties go to the position with the lower index.

    Returns:
        int64 `[T, H, W]`.
    """
    height, width = score.shape[1:]
    even = F.pad(score, (0, width % 2, 0, height % 2), value=-torch.inf)
    cells = even.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)
    rank = cells.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
    return rank.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
