"""Segments: runs of frame pairs in which little changes, shared by the methods that cut a video."""

from itertools import pairwise

import torch

from evoprune.methods.ranking import snap
from evoprune.methods.types import Tokens


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
