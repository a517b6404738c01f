"""FastVID (arXiv 2503.11187): segments; in each, the most attended tokens, and means around density peaks of every fourth grid.

Faithful: the video is cut where neighbouring grids, pooled, are least alike (into 8 segments at least) and wherever they are less
alike than 0.84. 60% of a segment's tokens are its most attended ones, evenly from its grids; the others are the density peaks
of every fourth grid. Of what is left each token goes to the most similar peak, which keeps its place and counts 0.6 in the mean,
however many there are. Adapted: attention received at the last layer that sees whole grids, where the paper has a class token
or, for Qwen, softmax(mean query . key); peaks are looked for among the tokens that attention has not taken; distances are those
of tokens at length one; shares are whole, and what is more than there are tokens for peaks goes by attention. Ties go by index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion, spread
from evoprune.pruning.density import peaks
from evoprune.pruning.ranking import gathered, highest, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import segments, transitions
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class FastVid(Selector):
    """O(N n D) for n tokens a grid, memory O(N D). Fields:

    segments: how many there are at least. threshold: similarity of neighbouring grids below which there is always a cut.
    salient: share of the tokens that attention chooses.
    every: how far apart the grids are in which peaks are looked for. neighbours: of which densities are made.
    centre: how much a peak counts in its mean, at least.
    """

    name: ClassVar[str] = "fastvid"
    needs: ClassVar[frozenset[str]] = frozenset({"attention"})

    segments: int = 8
    threshold: float = 0.84
    salient: float = 0.6
    every: int = 4
    neighbours: int = 4
    centre: float = 0.6

    def __post_init__(self):
        if not (0 <= self.salient <= 1 and 0 < self.centre <= 1 and -1 <= self.threshold <= 1):
            raise ValueError("salient and centre are shares, threshold a cosine")
        if min(self.segments, self.every, self.neighbours) < 1:
            raise ValueError("segments, every and neighbours are at least 1")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        grids, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        shares = spread(keep, grids)
        attention = snap(tokens.attention).view(grids, per_pair)
        unit = F.normalize(tokens.features.float(), dim=1).view(grids, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(grids, per_pair)
        for part in segments(transitions(tokens), self.segments, self.threshold):
            some = slice(part.start, part.stop)
            local = self.condensed(attention[some], unit[some], sum(shares[some]))
            into[some] = torch.where(local < 0, -1, local + part.start * per_pair)
        into = into.flatten()
        return gathered(into, self.weights(into))

    def condensed(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """int64 `[g, n]`: the token of a segment that each goes into, itself if it stays, -1 for none; `keep` stay.

        Args:
            attention: `[g, n]`, of its grids. unit: `[g, n, D]`, of length one.
        """
        grids, per_pair = attention.shape
        index = torch.arange(attention.numel(), device=unit.device).view(grids, per_pair)
        into = torch.full_like(index, -1).flatten()
        salient = spread(math.floor(self.salient * keep + 0.5), grids)
        best = torch.cat([index[grid, highest(attention[grid], share)] for grid, share in enumerate(salient)])
        into[best] = best
        anchors = range(0, grids, self.every)
        rooms = [per_pair - salient[grid] for grid in anchors]
        wanted = apportion(keep - len(best), [1] * len(anchors), rooms)
        free = [index[grid, into[index[grid]] < 0] for grid in anchors]
        unit = unit.flatten(0, 1)
        found = [some[peaks(unit[some], count, self.neighbours)] for some, count in zip(free, wanted, strict=True)]
        centres = torch.cat(found)
        into[centres] = centres
        best = highest(torch.where(into < 0, attention.flatten(), -torch.inf), keep - len(best) - len(centres))
        into[best] = best
        rest = (into < 0).nonzero().flatten()
        if len(centres):
            into[rest] = centres[nearest(unit[rest], unit[centres])]
        return into.view_as(index)

    def weights(self, into: torch.Tensor) -> torch.Tensor:
        """float32 `[N]`: of a peak with n others max(1 / (n + 1), `centre`), the rest shared out among them evenly."""
        stays = into == torch.arange(len(into), device=into.device)
        others = torch.bincount(into[(into >= 0) & ~stays], minlength=len(into))[into.clamp(min=0)]
        own = torch.where(others > 0, (1 / (others + 1)).clamp(min=self.centre), 1.0)
        return torch.where(stays, own, (1 - own) / others.clamp(min=1))
