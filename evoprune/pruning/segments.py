"""Segments: runs of frame pairs in which little changes, shared by the methods that cut a video."""

from itertools import pairwise

import torch

from evoprune.pruning.ranking import snap
from evoprune.pruning.types import Tokens


def transitions(tokens: Tokens) -> torch.Tensor:
    """float32 `[T - 1]`: the cosine of the mean tokens of neighbouring frame pairs, rounded."""
    mean = tokens.by_pair(tokens.features.float()).mean(1)
    return snap(torch.cosine_similarity(mean[1:], mean[:-1], dim=1))


def segments(similarity: torch.Tensor, least: int, threshold: float) -> list[range]:
    """The frame pairs of each segment: cut at the `least - 1` lowest of `similarity` (`[T - 1]`), and below `threshold`."""
    lowest = similarity.argsort(stable=True)[: max(0, least - 1)].tolist()
    below = (similarity < threshold).nonzero().flatten().tolist()
    edges = [0, *sorted(cut + 1 for cut in {*lowest, *below}), len(similarity) + 1]
    return [range(first, last) for first, last in pairwise(edges)]


def averaged(
    index: torch.Tensor, spans: list[range], still: list[torch.Tensor], limit: float, keep: int
) -> torch.Tensor | None:
    """int64 `[T, n]`: the unit that each joins when the stillest places are averaged over time until `keep` units are left.

    Places are averaged over their segment (`spans`); the last one over as many of its first frame pairs as necessary.

    Args:
        index: int64 `[T, n]`, the numbers of the units.
        still: for each segment, `[n]`, how still each place stands; ties go by index. Only those above `limit` are averaged.

    Returns None if more than `keep` are left.
    """
    into, n, saved = index.clone(), index.shape[1], index.numel() - keep
    if sum(int((each > limit).sum()) * (len(span) - 1) for span, each in zip(spans, still, strict=True)) < saved:
        return None
    for best in torch.cat(still).argsort(descending=True, stable=True).tolist():
        if not saved:
            break
        span, place = spans[best // n], best % n
        fewer = min(saved, len(span) - 1)
        into[span.start : span.start + fewer + 1, place] = index[span.start, place]
        saved -= fewer
    return into
