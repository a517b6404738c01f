"""FastVID (arXiv 2503.11187): the most attended tokens of a segment, and means around density peaks.

As in the paper: the video is cut into 8 segments at least, where the mean tokens of neighbouring frame pairs are least
similar, and wherever their cosine is below 0.84. 60% of a segment's tokens are the most attended ones, equally many
from each frame pair. The others are density peaks of every fourth frame pair. Each remaining token joins the most
similar peak. The peak stays at its place and has weight 0.6 in its mean, or more if that is its even share.
Adapted: attention is received in the last full-attention layer (the paper uses a class token or, for Qwen, softmax(mean
query . key)). Peaks are searched among the tokens that attention did not select. Distances are between tokens of length
one. Shares are whole numbers; where there are too few tokens for peaks, attention selects more. Ties go by index. The
public code also differs in two points: it ignores cuts above 0.95, and counts every fourth frame pair from the end of a
segment.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.pruning.budget import apportion, spread
from evoprune.pruning.density import peaks
from evoprune.pruning.indices import ascending
from evoprune.pruning.ranking import centre_weights, gathered, highest, nearest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import segments, transitions
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class FastVid(Selector):
    """O(N n D) for n tokens per frame pair, memory O(N D). Fields:

    segments: the least number of segments.
    threshold: cosine of neighbouring frame pairs below which the video is always cut.
    salient: share of the tokens that attention selects.
    every: peaks are searched in one of so many frame pairs.
    neighbours: how many nearest tokens a density is computed from.
    centre: the least weight of a peak in its mean.
    """

    name: ClassVar[str] = "fastvid"
    source: ClassVar[str] = "arXiv 2503.11187"
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
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        shares = spread(keep, pairs)
        attention = snap(tokens.attention).view(pairs, per_pair)
        unit = F.normalize(tokens.features.float(), dim=1).view(pairs, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(pairs, per_pair)
        for span in segments(transitions(tokens), self.segments, self.threshold):
            some = slice(span.start, span.stop)
            local = self.condensed(attention[some], unit[some], sum(shares[some]))
            into[some] = torch.where(local < 0, -1, local + span.start * per_pair)
        into = into.flatten()
        return gathered(into, centre_weights(into, self.centre))

    def condensed(self, attention: torch.Tensor, unit: torch.Tensor, keep: int) -> torch.Tensor:
        """Which token of a segment each of its tokens joins.

        Args:
            attention: `[g, n]`, of the segment's frame pairs.
            unit: `[g, n, D]`, the features, of length one.
            keep: how many tokens stay.

        Returns:
            int64 `[g, n]`, indices into the segment: its own if a token stays, -1 if it is dropped.
        """
        pairs, per_pair = attention.shape
        index = ascending(attention.numel(), unit.device).view(pairs, per_pair)
        into = torch.full_like(index, -1).flatten()
        salient = spread(math.floor(self.salient * keep + 0.5), pairs)
        best = torch.cat([index[pair, highest(attention[pair], share)] for pair, share in enumerate(salient)])
        into[best] = best
        anchors = range(0, pairs, self.every)
        rooms = [per_pair - salient[pair] for pair in anchors]
        wanted = apportion(keep - len(best), [1] * len(anchors), rooms)
        free = [index[pair, into[index[pair]] < 0] for pair in anchors]
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
