"""Stretches of a video in which little changes, shared by the methods that cut one up."""

from itertools import pairwise

import torch

from evoprune.methods.base import Tokens
from evoprune.pruning.score import settle


def transitions(tokens: Tokens) -> torch.Tensor:
    """float32 `[T - 1]`: the cosine of the mean tokens of each two neighbouring grids, rounded so that equals are ties."""
    mean = tokens.features.float().view(tokens.grid[0], -1, tokens.features.shape[1]).mean(1)
    return settle(torch.cosine_similarity(mean[1:], mean[:-1], dim=1))


def segments(similarity: torch.Tensor, least: int, threshold: float) -> list[range]:
    """The grids of each segment, in order: cut at the `least - 1` lowest of `similarity` and wherever it is below `threshold`."""
    lowest = similarity.argsort(stable=True)[: max(0, least - 1)].tolist()
    below = (similarity < threshold).nonzero().flatten().tolist()
    edges = [0, *sorted(cut + 1 for cut in {*lowest, *below}), len(similarity) + 1]
    return [range(first, last) for first, last in pairwise(edges)]
