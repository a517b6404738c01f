"""Marginal gains of segments and tokens, after the outline of MMG-Vid (arXiv 2508.21044)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.density import peak_scores
from evoprune.contrib.segments import segments, transitions
from evoprune.methods.base import Selector
from evoprune.methods.plans import apportion, spread
from evoprune.methods.ranking import closest, highest, snap
from evoprune.methods.settings import Cosine, Count, Share
from evoprune.methods.types import Selection, Tokens


@dataclass(frozen=True)
class Mmg(Selector):
    name = "mmg"
    source = "after arXiv 2508.21044, whose formulas this project fills in"

    threshold: Cosine = 0.95  # of neighbouring frame pairs; below it the video is cut
    beta: Share = 0.5  # weight of repetition in the gain of a segment
    neighbours: Count = 7  # a density is computed from so many nearest tokens

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x, like = tokens.by_pair(tokens.features.float()), transitions(tokens)
        spans = joined(segments(like, 1, self.threshold), like.tolist())
        means = torch.stack([x[span.start : span.stop].mean((0, 1)) for span in spans])
        gains = marginal_gains(means, x.mean((0, 1)), self.beta)
        weights = [len(span) * math.exp(gain) for span, gain in zip(spans, gains, strict=True)]
        shares = apportion(keep, weights, [len(span) * x.shape[1] for span in spans])
        kept = [self.distinct(x, span, share) for span, share in zip(spans, shares, strict=True)]
        return Selection(torch.cat(kept))

    def distinct(self, x: torch.Tensor, span: range, keep: int) -> torch.Tensor:
        """int64 `[keep]`, ascending: tokens of a segment that are density peaks and differ from the frame pair before.

        `x`: `[T, n, D]`, the features of the video.
        """
        kept, before = [], None
        for pair, share in zip(span, spread(keep, len(span)), strict=True):
            gain, unit = peak_scores(x[pair], self.neighbours), F.normalize(x[pair], dim=1)
            if before is not None and len(before):
                gain = snap(gain + (1 - closest(unit, before)[0]).log())  # logarithms, so factors are added
            best = highest(gain, share)
            before = unit[best]
            kept.append(best + pair * x.shape[1])
        return torch.cat(kept)


def joined(spans: list[range], like: list[float]) -> list[range]:
    """The segments after each of one frame pair has joined the more similar neighbour. `like`: cosines as of `transitions`."""
    made: list[range] = []
    for number, span in enumerate(spans):
        left = like[span.start - 1] if made else -math.inf
        right = like[span.stop - 1] if number + 1 < len(spans) else -math.inf
        if made and (len(made[-1]) == 1 or (len(span) == 1 and left >= right)):
            span = range(made.pop().start, span.stop)
        made.append(span)
    return made


def marginal_gains(means: torch.Tensor, video: torch.Tensor, beta: float) -> list[float]:
    """The gain of each segment when the segment of highest gain is always taken next.

    The gain is the cosine of its mean (one of `means`, `[S, D]`) to that of the `video` (`[D]`), less `beta` times the greatest
    cosine to a segment taken before.
    """
    unit = F.normalize(means, dim=1)
    represents = snap(unit @ F.normalize(video, dim=0))
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
