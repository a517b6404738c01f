"""The FastVID method, which keeps the most attended tokens and density peaks in each segment of the video."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import (
    Cosine,
    Count,
    Share,
    apportion,
    centre_weights,
    closest,
    gathered,
    peaks,
    segments,
    transitions,
)
from evoprune.methods import Selection, Selector, Tokens, arange_on, highest, snap, spread


@dataclass(frozen=True)
class FastVid(Selector):
    """FastVID (arXiv 2503.11187): in each segment of the video, keeps the most attended tokens and density peaks.

    The video is cut into at least `segments` segments, with a cut wherever the mean tokens of two neighboring frame pairs have a
    cosine similarity below `threshold`. The budget is spread evenly over frame pairs, so a segment's budget is proportional to its
    length. A `salient` fraction of it goes to the segment's most attended tokens. The remaining budget goes to density peaks in
    every `every`-th frame pair, counted backward from the last one. All other tokens are averaged into the most similar peak, which
    has a weight of at least `centre` in the mean. A frame pair keeps no tokens if its cosine similarity to the next frame pair is
    at least `ignore`.

    Differences from the authors' code: if too few tokens are left to serve as peaks, this method selects more tokens by attention,
    while the authors' code keeps fewer tokens. Here, each token is averaged into a single peak. In the authors' code, it is
    averaged into one peak in each frame pair.
    """

    name = "fastvid"
    source = "arXiv 2503.11187"
    needs = frozenset({"attention"})

    segments: Count = 8  # minimum number of segments
    # The video is always cut between neighboring frame pairs with a cosine similarity below this.
    threshold: Cosine = 0.84
    salient: Share = 0.6  # fraction of the tokens selected by attention
    # A frame pair keeps no tokens if its cosine similarity to the next frame pair is at least this.
    ignore: Cosine = 0.95
    every: Count = 4  # interval at which peaks are selected, in frame pairs
    centre: Annotated[float, "(0, 1]"] = 0.6  # minimum weight of a peak in its mean

    def select(self, tokens: Tokens, keep: int) -> Selection:
        like = transitions(tokens)
        shares = spread(keep, tokens.grid[0])
        x = tokens.features
        attention = snap(tokens.attention)
        into = torch.full_like(tokens.unit_to_row, -1)
        index = tokens.by_pair(arange_on(len(x), x.device))
        for span in segments(like, self.segments, self.threshold):
            new = (like[span.start : span.stop - 1] < self.ignore).nonzero().flatten().tolist()
            part = slice(span.start, span.stop)
            self.condense(x, attention, index[part], [*new, len(span) - 1], sum(shares[part]), into)
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
        """Decide which units of a segment to keep, and which of the kept units the others are averaged into.

        Args:
            x: `[N, D]`, the features of all units.
            attention: `[N]`, the attention received by each unit.
            index: int64 `[g, n]`, the units in the segment.
            new: The segment's frame pairs that differ from the next frame pair.
            keep: The number of units to keep.
            into: int64 `[N]`, modified in place. Kept units map to themselves, merged units map to a peak, and dropped units keep
                their value of -1.
        """
        half = index.shape[1] // 2
        context = min(keep, max(1, int((1 - self.salient) * keep)))
        anchors = new[:: -self.every]
        wanted = dict(zip(anchors, apportion(context, [1] * len(anchors), [half] * len(anchors)), strict=True))
        max_counts = [index.shape[1] - wanted.get(pair, 0) for pair in new]
        salient = zip(new, apportion(keep - context, [1] * len(new), max_counts), strict=True)
        best = torch.cat([index[pair, highest(attention[index[pair]], count)] for pair, count in salient])
        into[best] = best
        free = {pair: index[pair][into[index[pair]] < 0] for pair in anchors}
        centres = torch.cat([units[peaks(x[units], wanted[pair], 4)] for pair, units in free.items()])
        into[centres] = centres
        rest = index[into[index] < 0]
        more = rest[highest(attention[rest], keep - len(best) - len(centres))]
        into[more] = more
        rest = rest[into[rest] < 0]
        if len(centres):
            unit, peak = (F.normalize(x[units].float(), dim=1) for units in (rest, centres))
            into[rest] = centres[closest(unit, peak)[1]]
