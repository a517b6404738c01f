"""FastVID (arXiv 2503.11187): the most attended tokens of a segment, and means around density peaks.

As in the paper: the video is cut into 8 segments at least, where the mean tokens of neighbouring frame pairs are least
similar, and wherever their cosine is below 0.84. 60% of a segment's tokens are the most attended ones, equally many
from each frame pair. The others are density peaks of every fourth frame pair. Each remaining token joins the most
similar peak. The peak stays at its place and has weight 0.6 in its mean, or more if that is its even share.
As in the authors' code for Qwen2.5-VL (LunarShen/FastVID): of frame pairs with a cosine of 0.95 or more to the next
one, nothing is kept. Every fourth of the others is counted from the end of the segment, and at most half of its tokens
are peaks, which are searched among those that attention did not select.
Adapted: attention is received in the last full-attention layer (the paper uses a class token or, for Qwen, softmax(mean
query . key)). Where there are too few tokens for peaks, attention selects more. In their code a remaining token joins
one peak of every fourth frame pair, so several at once; here it joins the most similar of all, because a unit belongs
to one token.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
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
    ignore: cosine from which on a frame pair is too similar to the next one for any of its tokens to stay.
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
    ignore: float = 0.95
    every: int = 4
    neighbours: int = 4
    centre: float = 0.6

    def __post_init__(self):
        counts = dict.fromkeys(("segments", "every", "neighbours"), "[1, inf)")
        check_ranges(self, salient="[0, 1]", centre="(0, 1]", threshold="[-1, 1]", ignore="[-1, 1]", **counts)

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        shares, like = spread(keep, pairs), transitions(tokens)
        attention = snap(tokens.attention).view(pairs, per_pair)
        x = tokens.features.float().view(pairs, per_pair, -1)
        into = torch.full_like(tokens.owner, -1).view(pairs, per_pair)
        for span in segments(like, self.segments, self.threshold):
            some = slice(span.start, span.stop)
            new = [*(like[span.start : span.stop - 1] < self.ignore).nonzero().flatten().tolist(), len(span) - 1]
            local = self.condensed(attention[some], x[some], new, sum(shares[some]))
            into[some] = torch.where(local < 0, -1, local + span.start * per_pair)
        into = into.flatten()
        return gathered(into, centre_weights(into, self.centre))

    def condensed(self, attention: torch.Tensor, x: torch.Tensor, new: list[int], keep: int) -> torch.Tensor:
        """Which token of a segment each of its tokens joins.

        Args:
            attention: `[g, n]`, of the segment's frame pairs.
            x: `[g, n, D]`, the features.
            new: the frame pairs that are not too similar to the next one, ascending.
            keep: how many tokens stay.

        Returns:
            int64 `[g, n]`, indices into the segment: its own if a token stays, -1 if it is dropped.
        """
        per_pair = attention.shape[1]
        index = ascending(attention.numel(), x.device).view(attention.shape)
        into = torch.full_like(index, -1).flatten()
        context = min(keep, max(1, int((1 - self.salient) * keep)))
        anchors = new[:: -self.every]
        wanted = dict(zip(anchors, apportion(context, [1] * len(anchors), [per_pair // 2] * len(anchors)), strict=True))
        salient = apportion(keep - context, [1] * len(new), [per_pair - wanted.get(pair, 0) for pair in new])
        best = torch.cat(
            [index[pair, highest(attention[pair], count)] for pair, count in zip(new, salient, strict=True)]
        )
        into[best] = best
        x = x.flatten(0, 1)
        free = {pair: index[pair][into[index[pair]] < 0] for pair in anchors}
        centres = torch.cat([some[peaks(x[some], wanted[pair], self.neighbours)] for pair, some in free.items()])
        into[centres] = centres
        best = highest(torch.where(into < 0, attention.flatten(), -torch.inf), keep - len(best) - len(centres))
        into[best] = best
        rest = (into < 0).nonzero().flatten()
        if len(centres):
            into[rest] = centres[nearest(F.normalize(x[rest], dim=1), F.normalize(x[centres], dim=1))]
        return into.view_as(index)
