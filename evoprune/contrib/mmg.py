"""The `mmg` method, based on MMG-Vid, which divides the budget among segments of the video by their marginal gains."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from evoprune.contrib.shared import (
    NEIGHBOURS,
    Cosine,
    Share,
    apportion,
    closest,
    peak_scores,
    segments,
    transitions,
)
from evoprune.methods import Selection, Selector, Tokens, highest, snap, spread


@dataclass(frozen=True)
class Mmg(Selector):
    """Divides the budget among segments by marginal gain. Based on MMG-Vid (arXiv 2508.21044).

    The video is cut between neighboring frame pairs with a cosine similarity below `threshold`. Each segment gets tokens in
    proportion to its length times exp(gain). Segments are picked greedily by gain, which is the cosine similarity between the
    segment's mean and the video's mean, minus `beta` times the highest similarity to a previously picked segment. Each frame pair
    keeps its highest density peaks, whose scores are first multiplied by the distance to the tokens kept in the previous frame
    pair.

    Differences from the paper: neither its formulas nor its code were available. This project uses its own formulas, so the results
    say little about MMG-Vid itself.
    """

    name = "mmg"
    source = "based on arXiv 2508.21044, with formulas filled in by this project"

    threshold: Cosine = 0.95  # the video is cut between neighboring frame pairs with a cosine similarity below this
    beta: Share = 0.5  # weight of the repetition penalty in a segment's gain

    def select(self, tokens: Tokens, keep: int) -> Selection:
        x = tokens.by_pair(tokens.features.float())
        like = transitions(tokens)
        spans = joined(segments(like, 1, self.threshold), like.tolist())
        means = torch.stack([x[span.start : span.stop].mean((0, 1)) for span in spans])
        gains = marginal_gains(means, x.mean((0, 1)), self.beta)
        weights = [len(span) * math.exp(gain) for span, gain in zip(spans, gains, strict=True)]
        shares = apportion(keep, weights, [len(span) * x.shape[1] for span in spans])
        kept = [self.distinct(x, span, share) for span, share in zip(spans, shares, strict=True)]
        return Selection(torch.cat(kept))

    def distinct(self, x: torch.Tensor, span: range, keep: int) -> torch.Tensor:
        """Select a segment's tokens: density peaks that differ from the tokens kept in the previous frame pair.

        Args:
            x: `[T, n, D]`, the features of the video.
            span: The frame pairs of the segment.

        Returns:
            int64 `[keep]`, the selected units, ascending.
        """
        kept = []
        before = None
        for pair, share in zip(span, spread(keep, len(span)), strict=True):
            gain = peak_scores(x[pair], NEIGHBOURS)
            unit = F.normalize(x[pair], dim=1)
            if before is not None and len(before):
                gain = snap(gain + (1 - closest(unit, before)[0]).log())  # scores are logarithms, so factors are added
            best = highest(gain, share)
            before = unit[best]
            kept.append(best + pair * x.shape[1])
        return torch.cat(kept)


def joined(spans: list[range], like: list[float]) -> list[range]:
    """Merge each segment with only one frame pair into its more similar neighbor.

    Args:
        spans: The segments, in order.
        like: The cosine similarity between each frame pair and the next one, from `transitions`.

    Returns:
        The merged segments.
    """
    merged: list[range] = []
    for number, span in enumerate(spans):
        right = like[span.stop - 1] if number + 1 < len(spans) else -math.inf
        if merged and (len(merged[-1]) == 1 or (len(span) == 1 and like[span.start - 1] >= right)):
            span = range(merged.pop().start, span.stop)
        merged.append(span)
    return merged


def marginal_gains(means: torch.Tensor, video: torch.Tensor, beta: float) -> list[float]:
    """Compute the marginal gain of each segment.

    Segments are picked one by one in order of gain, which is the cosine similarity between the segment's mean and the video's mean,
    minus `beta` times the highest similarity to a previously picked segment.

    Args:
        means: `[S, D]`, the segment means.
        video: `[D]`, the video's mean.
        beta: The weight of the repetition penalty.
    """
    unit = F.normalize(means, dim=1)
    represents = snap(unit @ F.normalize(video, dim=0))
    repeats = torch.zeros_like(represents)
    gains = torch.full_like(represents, -torch.inf)
    open_ = torch.ones(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(len(unit)):
        now = represents - beta * repeats
        best = int(now.masked_fill(~open_, -torch.inf).argmax())
        gains[best] = now[best]
        open_[best] = False
        to = snap(unit @ unit[best])
        if step:
            to = torch.maximum(repeats, to)
        repeats = to
    return gains.tolist()
