"""Stretches of a video in which little changes, shared by the methods that cut one up."""

from itertools import pairwise

import torch

from evoprune.pruning.score import snap
from evoprune.pruning.types import Tokens


def transitions(tokens: Tokens) -> torch.Tensor:
    """float32 `[T - 1]`: the cosine of the mean tokens of each two neighbouring grids, rounded so that equals are ties."""
    mean = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1]).mean(1)
    return snap(torch.cosine_similarity(mean[1:], mean[:-1], dim=1))


def segments(similarity: torch.Tensor, least: int, threshold: float) -> list[range]:
    """The grids of each segment, in order: cut at the `least - 1` lowest of `similarity` and wherever it is below `threshold`."""
    lowest = similarity.argsort(stable=True)[: max(0, least - 1)].tolist()
    below = (similarity < threshold).nonzero().flatten().tolist()
    edges = [0, *sorted(cut + 1 for cut in {*lowest, *below}), len(similarity) + 1]
    return [range(first, last) for first, last in pairwise(edges)]


def averaged(index: torch.Tensor, parts: list[range], alike: list[torch.Tensor], saved: int) -> torch.Tensor:
    """The unit that each goes into if exactly `saved` of them go into others, over time, of the places that stand stillest.

    Args:
        index: int64 `[T, n]`, the numbers of the units.
        parts: the segments. alike: of each, how still its places stand, `[n]`.
        saved: all places whole, except for the last, which may be averaged over the first grids of its segment only.
    """
    into, n = index.clone(), index.shape[1]
    for best in torch.cat(alike).argsort(descending=True, stable=True).tolist():
        if not saved:
            break
        part, place = parts[best // n], best % n
        fewer = min(saved, len(part) - 1)
        into[part.start : part.start + fewer + 1, place] = index[part.start, place]
        saved -= fewer
    return into
