"""Nuwa (arXiv 2602.02951), the stage before the language model: attended tokens of every corner, and means around the weakest.

As in the paper and in the authors' code for Qwen2.5-VL (Man-PaperRejected/Nuwa): the frame is divided into cells of 2x2
places. The three most attended tokens of each cell (`cell`) are candidates, and the most attended candidates are kept.
Those below the 10th percentile of the kept tokens' attention (`weak`) become weighted means of all tokens of the frame:
the weight is the cosine of the states in the middle of the tower, if above 0, times 1 - distance / (0.8 of the diagonal)
(`reach`), if above 0. A token's own weight is 1. All others stay as they are.
Adapted: exactly the budget is kept. If candidates do not suffice, the next of each cell follow (their code takes 4 of each
cell at 75%). Cells at an odd edge have fewer places; their code fills them up with zeros, which it may select and then
lose. An image of the paper is a frame pair here, and all frame pairs have equal shares. Attention is received in the last
full-attention layer. In their code the states from the middle of the tower stay in the order of windows, so that their
weights belong to other places; here each weight belongs to its own place. Attention is rounded, so equal tokens are ties,
which go by index.
The second stage, inside the language model, is a method of its own: `nuwa+nuwa-inner`.
"""

from dataclasses import dataclass
from math import hypot
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.budget import spread
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import ranked
from evoprune.pruning.score import snap
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Nuwa(Selector):
    """O(N D + weak K n D / T) for n tokens per frame pair, memory O(N D). Fields:

    cell: tokens of each cell of 2x2 places that are candidates, from 1 to 4.
    weak: quantile of the kept tokens' attention below which a token becomes a mean.
    reach: distance at which a weight falls to 0, as a share of the frame's diagonal.
    """

    name: ClassVar[str] = "nuwa"
    source: ClassVar[str] = "arXiv 2602.02951, the stage before the language model"
    needs: ClassVar[frozenset[str]] = frozenset({"attention", "middle"})

    cell: int = 3
    weak: float = 0.1
    reach: float = 0.8

    def __post_init__(self):
        check_ranges(self, cell="[1, 4]", weak="[0, 1]", reach="(0, inf]")

    def scores(self, tokens: Tokens) -> torch.Tensor:
        return snap(tokens.attention)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, height, width = tokens.grid
        attention = self.scores(tokens).view(pairs, -1)
        late = (rank_in_cell(attention.view(tokens.grid)).flatten(1) - self.cell + 1).clamp(min=0)
        kept, means, start = [], [], 0
        for pair, share in enumerate(spread(keep, pairs)):
            order = ranked(attention[pair])
            here = order[late[pair][order].argsort(stable=True)][:share].sort().values
            first = pair * height * width
            if share:
                middle = tokens.middle[first : first + height * width]
                token, place, weight = self.means(attention[pair][here], here, middle, height, width)
                means.append((token + start, place + first, weight))
            kept.append(here + first)
            start += share
        return Selection(torch.cat(kept), means=tuple(map(torch.cat, zip(*means, strict=True))))

    def means(
        self, attention: torch.Tensor, kept: torch.Tensor, middle: torch.Tensor, height: int, width: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What each kept token of a frame pair is the mean of.

        Args:
            attention: `[k]`, of the kept tokens.
            kept: int64 `[k]`, their places.
            middle: `[n, d]`, states of all places in the middle of the tower.

        Returns:
            int64 `[m]`, tokens; int64 `[m]`, places; float32 `[m]`, weights.
        """
        own = ascending(len(kept), kept.device)
        weak = own[attention < attention.quantile(self.weak)]
        unit, places = F.normalize(middle.float(), dim=1), ascending(height * width, kept.device)
        at = torch.stack([places // width, places % width], 1).float()
        near = 1 - torch.cdist(at[kept[weak]], at) / (self.reach * (hypot(height - 1, width - 1) or 1))
        weight = (unit[kept[weak]] @ unit.T).clamp(min=0) * near.clamp(min=0)
        weight[ascending(len(weak), kept.device), kept[weak]] = 0  # its own weight is exactly 1, below
        token, place = weight.nonzero().unbind(1)
        return (
            torch.cat([own, weak[token]]),
            torch.cat([kept, place]),
            torch.cat([torch.ones_like(attention), weight[token, place]]),
        )


def rank_in_cell(score: torch.Tensor) -> torch.Tensor:
    """int64 `[T, H, W]`: how many places of its cell come before each place by `score` (`[T, H, W]`); ties by index."""
    height, width = score.shape[1:]
    even = F.pad(score, (0, width % 2, 0, height % 2), value=-torch.inf)
    cells = even.unflatten(1, (-1, 2)).unflatten(3, (-1, 2)).transpose(2, 3).flatten(3)
    rank = cells.argsort(dim=3, descending=True, stable=True).argsort(dim=3)
    return rank.unflatten(3, (2, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, :height, :width]
