"""FastVID (arXiv 2503.11187): the most attended tokens of a segment, and means around density peaks."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.density import peaks
from evoprune.contrib.segments import segments, transitions
from evoprune.methods.base import Selector
from evoprune.methods.plans import apportion, spread
from evoprune.methods.ranking import centre_weights, closest, gathered, highest, snap
from evoprune.methods.settings import Cosine, Count, Share
from evoprune.methods.types import Selection, Tokens, ascending


@dataclass(frozen=True)
class FastVid(Selector):
    name = "fastvid"
    source = "arXiv 2503.11187"
    needs = frozenset({"attention"})

    segments: Count = 8  # the least number of segments
    threshold: Cosine = 0.84  # of neighbouring frame pairs; below it the video is always cut
    salient: Share = 0.6  # share of the tokens that attention selects
    ignore: Cosine = 0.95  # of a frame pair and the next one; from here on none of its tokens stay
    every: Count = 4  # peaks are searched in one of so many frame pairs
    neighbours: Count = 4  # a density is computed from so many nearest tokens
    centre: Annotated[float, "(0, 1]"] = 0.6  # least weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        like, shares = transitions(tokens), spread(keep, tokens.grid[0])
        x, attention, into = tokens.features, snap(tokens.attention), torch.full_like(tokens.owner, -1)
        index = tokens.by_pair(ascending(len(x), x.device))
        for span in segments(like, self.segments, self.threshold):
            new = (like[span.start : span.stop - 1] < self.ignore).nonzero().flatten().tolist()
            some = slice(span.start, span.stop)
            self.condense(x, attention, index[some], [*new, len(span) - 1], sum(shares[some]), into)
        return gathered(into, centre_weights(into, self.centre))

    def condense(
        self,
        x: torch.Tensor,
        attention: torch.Tensor,
        index: torch.Tensor,
        new: list[int],
        keep: int,
        into: torch.Tensor,
    ) -> None:
        """Writes to `into` (int64 `[N]`) which unit each unit of a segment joins: `keep` themselves, others peaks or nothing.

        `x`, `attention`: `[N, D]`, `[N]`. `index`: int64 `[g, n]`, the segment's units. `new`: its frame pairs unlike the next one.
        """
        half, context = index.shape[1] // 2, min(keep, max(1, int((1 - self.salient) * keep)))
        anchors = new[:: -self.every]
        wanted = dict(zip(anchors, apportion(context, [1] * len(anchors), [half] * len(anchors)), strict=True))
        most = [index.shape[1] - wanted.get(pair, 0) for pair in new]
        salient = zip(new, apportion(keep - context, [1] * len(new), most), strict=True)
        best = torch.cat([index[pair, highest(attention[index[pair]], count)] for pair, count in salient])
        into[best] = best
        free = {pair: index[pair][into[index[pair]] < 0] for pair in anchors}
        centres = torch.cat([some[peaks(x[some], wanted[pair], self.neighbours)] for pair, some in free.items()])
        into[centres] = centres
        rest = index[into[index] < 0]
        more = rest[highest(attention[rest], keep - len(best) - len(centres))]
        into[more] = more
        rest = rest[into[rest] < 0]
        if len(centres):
            unit, peak = (F.normalize(x[some].float(), dim=1) for some in (rest, centres))
            into[rest] = centres[closest(unit, peak)[1]]
