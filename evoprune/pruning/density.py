"""Density peaks (Rodriguez and Laio, Science 344, 2014), with densities from nearest neighbours: which tokens others gather around.

A peak has near neighbours and is far from all that have nearer ones. Distances are those of tokens at length one, because how
long a token is says something of the projector rather than of the picture; cosines and densities are rounded, and of equally
dense tokens the first counts as denser, so that of equal tokens one is a peak. Many implementations add noise instead.
"""

import torch

from evoprune.pruning.ranking import BLOCK, highest
from evoprune.pruning.score import snap


def peaks(unit: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """int64 `[count]`, ascending: the rows of `unit` (`[n, D]`, of length one) that are most of a peak."""
    return highest(peak_scores(unit, neighbours), count) if count else torch.arange(0, device=unit.device)


def peak_scores(unit: torch.Tensor, neighbours: int) -> torch.Tensor:
    """float32 `[n]`: density times the distance to the nearest denser row; for the densest, to the farthest row of all.

    Density is exp(-m), m the mean squared distance to the `neighbours` nearest other rows. O(n^2 D), memory O(n).
    """
    n = len(unit)
    index = torch.arange(n, device=unit.device)
    parts = index.split(BLOCK)
    nearest = min(neighbours, n - 1)
    density = torch.ones(n, device=unit.device)
    for part in parts if nearest else ():
        squared = _squared(unit, part)
        squared[torch.arange(len(part), device=unit.device), part] = torch.inf
        density[part] = snap((-squared.topk(nearest, largest=False).values.mean(1)).exp())
    apart = torch.empty(n, device=unit.device)
    for part in parts:
        squared = _squared(unit, part)
        denser = (density > density[part, None]) | ((density == density[part, None]) & (index < part[:, None]))
        farthest = squared.amax(1)
        apart[part] = torch.where(denser.any(1), squared.masked_fill(~denser, torch.inf).amin(1), farthest)
    return snap(density * apart.sqrt())


def _squared(unit: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Squared distances `[p, n]` of some rows to all; a zero row is as far from all others as if it stood at right angles."""
    return (2 - 2 * snap(unit[part] @ unit.T)).clamp_(min=0)
