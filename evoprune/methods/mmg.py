"""Marginal gains of segments and tokens, after the outline of MMG-Vid (arXiv 2508.21044).

As in the paper: the kept tokens should represent the video and repeat each other little. The value of a piece is what
it represents less `beta` times what it repeats. The video is cut between neighbouring frame pairs whose mean tokens
have a cosine below 0.95, and a segment of one frame pair joins a neighbour. A segment gets tokens by the gain that it
adds to the segments before it. In a segment, tokens are density peaks of their frame pair that differ from the tokens
kept in the frame pair before.
Adapted: no code is public and the formulas were not readable, so this project fills them in, and the method has a name
of its own; its results are not the paper's. A segment represents the video by the cosine of its mean token to the mean
of all tokens. It repeats the most similar segment that was taken before it. Its weight is its number of frame pairs
times exp(gain). The gain of a token is its peak score times 1 less its greatest cosine to a token kept in the frame
pair before. From left to right, a lone frame pair joins the more similar neighbour; one that is left for the next
segment joins it in any case. Ties go by index.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from evoprune.methods.base import Selector
from evoprune.methods.ranges import check_ranges
from evoprune.pruning.budget import apportion, spread
from evoprune.pruning.density import peak_scores
from evoprune.pruning.ranking import closest, highest
from evoprune.pruning.score import snap
from evoprune.pruning.segments import segments, transitions
from evoprune.pruning.types import Selection, Tokens


@dataclass(frozen=True)
class Mmg(Selector):
    """O(N n D) for n tokens per frame pair, and O(S^2 D) for S segments; memory O(N D). Fields:

    threshold: cosine of neighbouring frame pairs below which the video is cut.
    beta: weight of repetition in the gain of a segment.
    neighbours: how many nearest tokens a density is computed from.
    """

    name: ClassVar[str] = "mmg"
    source: ClassVar[str] = "after arXiv 2508.21044, whose formulas this project fills in"

    threshold: float = 0.95
    beta: float = 0.5
    neighbours: int = 7

    def __post_init__(self):
        check_ranges(self, threshold="[-1, 1]", beta="[0, 1]", neighbours="[1, inf)")

    def select(self, tokens: Tokens, keep: int) -> Selection:
        pairs, per_pair = tokens.grid[0], tokens.grid[1] * tokens.grid[2]
        x = tokens.features.float().view(pairs, per_pair, -1)
        like = transitions(tokens)
        spans = joined(segments(like, 1, self.threshold), like.tolist())
        means = torch.stack([x[span.start : span.stop].mean((0, 1)) for span in spans])
        gains = marginal_gains(means, x.mean((0, 1)), self.beta)
        weights = [len(span) * math.exp(gain) for span, gain in zip(spans, gains, strict=True)]
        shares = apportion(keep, weights, [len(span) * per_pair for span in spans])
        unit = F.normalize(x, dim=2)
        kept = [self.distinct(x, unit, span, share) for span, share in zip(spans, shares, strict=True)]
        return Selection(torch.cat(kept))

    def distinct(self, x: torch.Tensor, unit: torch.Tensor, span: range, keep: int) -> torch.Tensor:
        """int64 `[keep]`, ascending: tokens of a segment that are density peaks and differ from the frame pair before.

        Args:
            x: `[T, n, D]`, the features of the video.
            unit: the same, of length one.
            span: the frame pairs of the segment.
        """
        per_pair, kept, before = unit.shape[1], [], None
        for pair, share in zip(span, spread(keep, len(span)), strict=True):
            gain = peak_scores(x[pair], self.neighbours)  # a logarithm, so factors are added
            if before is not None and len(before):
                gain = snap(gain + (1 - closest(unit[pair], before)[0]).log())
            best = highest(gain, share)
            before = unit[pair, best]
            kept.append(best + pair * per_pair)
        return torch.cat(kept)


def joined(spans: list[range], like: list[float]) -> list[range]:
    """The segments, in order, after each segment of one frame pair has joined the more similar neighbour.

    Args:
        like: `like[t]` is the cosine of the mean tokens of frame pairs t and t + 1.
    """
    made: list[range] = []
    for number, span in enumerate(spans):
        left = like[span.start - 1] if made else -math.inf
        right = like[span.stop - 1] if number + 1 < len(spans) else -math.inf
        if made and (len(made[-1]) == 1 or (len(span) == 1 and left >= right)):
            span = range(made.pop().start, span.stop)
        made.append(span)
    return made


def marginal_gains(means: torch.Tensor, whole: torch.Tensor, beta: float) -> list[float]:
    """The gain of each segment when the segment of highest gain is always taken next.

    The gain is the cosine to `whole`, less `beta` times the greatest cosine to a segment taken before.

    Args:
        means: `[S, D]`, the mean token of each segment.
        whole: `[D]`, the mean token of the video.
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
