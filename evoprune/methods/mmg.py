"""Marginal gains of segments and of tokens, after the outline of MMG-Vid (arXiv 2508.21044), which had to be filled in.

Faithful: what is kept shall represent the video and repeat itself little, the sum of what each piece represents less `beta` times
what it repeats, and is chosen in three steps. The video is cut where neighbouring grids, pooled, are less alike than 0.95, and a
segment of one grid joins a neighbour. Segments get tokens by what each adds to those chosen before it. In a segment, tokens are
density peaks of their grid that are unlike what the grid before has kept. Ours, because the formulas could not be read and no
code is public: a segment, pooled, represents the video as far as its cosine to the mean of all tokens says, and repeats its most
similar segment among those chosen before; its weight is its grids times exp(gain). A token's gain is its score as a peak times 1
less its greatest cosine to a token kept in the grid before. From left to right, a lone grid joins the neighbour it is more like;
one that waits for the next takes it whatever that is like. So it bears a name of its own, and what it scores is not the paper's
figure. Ties go by index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion, spread
from evoprune.pruning.density import peak_scores
from evoprune.pruning.ranking import closest, highest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import segments, transitions
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Mmg(Selector):
    """O(N n D) for n tokens a grid, and O(S^2 D) for S segments; memory O(N D). Fields:

    threshold: similarity of neighbouring grids below which there is a cut.
    beta: how much repetition counts against a segment.
    neighbours: of which densities are made.
    """

    name: ClassVar[str] = "mmg"

    threshold: float = 0.95
    beta: float = 0.5
    neighbours: int = 7

    def __post_init__(self):
        if not (-1 <= self.threshold <= 1 and 0 <= self.beta <= 1 and self.neighbours >= 1):
            raise ValueError("threshold is a cosine, beta from 0 to 1, neighbours at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        x = tokens.features.float().view(grids, per_pair, -1)
        like = transitions(tokens)
        parts = joined(segments(like, 1, self.threshold), like.tolist())
        gains = marginal_gains(
            torch.stack([x[part.start : part.stop].mean((0, 1)) for part in parts]), x.mean((0, 1)), self.beta
        )
        weights = [len(part) * math.exp(gain) for part, gain in zip(parts, gains, strict=True)]
        shares = apportion(keep, weights, [len(part) * per_pair for part in parts])
        unit = F.normalize(x, dim=2)
        kept = [self.distinct(unit, part, share) for part, share in zip(parts, shares, strict=True)]
        return Selection(torch.cat(kept))

    def distinct(self, unit: torch.Tensor, part: range, keep: int) -> torch.Tensor:
        """int64 `[keep]`, ascending: the tokens of a segment that are peaks of their grids and new in them.

        Args:
            unit: `[T, n, D]`, of length one, of all grids.
        """
        per_pair, kept, before = unit.shape[1], [], None
        for grid, share in zip(part, spread(keep, len(part)), strict=True):
            gain = peak_scores(unit[grid], self.neighbours)
            if before is not None and len(before):
                gain = snap(gain * (1 - closest(unit[grid], before)[0]))
            best = highest(gain, share)
            before = unit[grid, best]
            kept.append(best + grid * per_pair)
        return torch.cat(kept)


def joined(parts: list[range], like: list[float]) -> list[range]:
    """The segments after each of one grid has joined the neighbour it is more like (`like[g]`: grid g to g + 1), in order."""
    made: list[range] = []
    for number, part in enumerate(parts):
        left = like[part.start - 1] if made else -math.inf
        right = like[part.stop - 1] if number + 1 < len(parts) else -math.inf
        if made and (len(made[-1]) == 1 or (len(part) == 1 and left >= right)):
            part = range(made.pop().start, part.stop)
        made.append(part)
    return made


def marginal_gains(means: torch.Tensor, whole: torch.Tensor, beta: float) -> list[float]:
    """What each segment adds when the best is always taken next: cosine to `whole` less `beta` times that to its like so far.

    Args:
        means: `[S, D]`, a segment each. whole: `[D]`.
    """
    unit = F.normalize(means, dim=1)
    represents = snap(unit @ F.normalize(whole, dim=0))
    repeats = torch.zeros_like(represents)
    gains = torch.full_like(represents, -torch.inf)
    open_ = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(len(unit)):
        now = represents - beta * repeats
        best = int(now.masked_fill(~open_, -torch.inf).argmax())
        gains[best], open_[best] = now[best], False
        to = snap(unit @ unit[best])
        repeats = torch.maximum(repeats, to) if step else to
    return gains.tolist()
