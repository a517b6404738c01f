"""Density peaks (Rodriguez and Laio, Science 344, 2014): tokens that other tokens gather around.

A peak has near neighbours (a high density) and is far from all denser tokens. Distances are Euclidean. Scores are logarithms,
because densities of long tokens would all round to 0.
"""

from functools import lru_cache

import torch

from evoprune.methods.ranking import BLOCK, centre_weights, gathered, highest, snap
from evoprune.methods.types import Selection, ascending

HELD = 4  # blocks of distances that are held; more are computed twice
FAR = 1 << 30  # steps that are more than any distance
STEPS = 16384  # distances are integers of this many steps of the tokens' root mean square length


def peaks(x: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """int64 `[count]`, ascending: the rows of `x` (`[n, D]`) with the highest peak scores."""
    return highest(peak_scores(x, neighbours), count) if count else ascending(0, x.device)


def joined_peaks(x: torch.Tensor, count: int, neighbours: int) -> torch.Tensor:
    """int64 `[n]`: the nearest of the `count` peaks to each row of `x` (`[n, D]`); a peak joins itself."""
    centres, (points, _) = peaks(x, count, neighbours), _points(x)
    to = torch.cat([_distances(some, points[centres]).argmin(1) for some in points.split(BLOCK)])
    return centres[to].index_copy(0, centres, centres)


def fewer_neighbours(neighbours: int, count: int) -> int:
    """As many neighbours as there are peaks, if that is less; at least 2: with one, itself, every token would be as dense."""
    return min(neighbours, max(2, count))


def join_groups(
    into: torch.Tensor,
    features: torch.Tensor,
    groups: list[torch.Tensor],
    counts: list[int],
    neighbours: int,
    centre: float | None = None,
) -> Selection:
    """Merges the tokens of each group around density peaks.

    Args:
        into: int64 `[N]`, the unit that each unit joins, -1 for the units of groups, which is changed.
        features: float32 `[N, D]`.
        groups: int64 `[m, g]` each: m tokens, each the mean of g units. `counts`: tokens to keep of each, 0 drops it.
        centre: the least weight of a peak, as in `centre_weights`; None for equal weights.
    """
    weight = torch.ones_like(into, dtype=torch.float32)
    for group, count in zip(groups, counts, strict=True):
        if count:
            to = joined_peaks(features[group].mean(1), count, fewer_neighbours(neighbours, count))
            into[group] = group[to, :1].expand(group.shape)
            own = torch.ones_like(to, dtype=torch.float32) if centre is None else centre_weights(to, centre)
            weight[group] = (own / group.shape[1])[:, None].expand(group.shape)
    return gathered(into, weight)


def peak_scores(x: torch.Tensor, neighbours: int) -> torch.Tensor:
    """float64 `[n]`: the logarithm of density times distance to the nearest denser row; for the densest row, the greatest distance.

    Density is exp(-m), m the mean squared distance / D to the `neighbours` nearest rows, itself the first; a constant is left out.
    Of equally dense rows the first counts as denser. O(n^2 D), memory O(n D).
    """
    points, step = _points(x)
    index = ascending(len(points), x.device)
    blocks = index.split(BLOCK)

    @lru_cache(HELD if len(blocks) <= HELD else 0)
    def distances(number: int) -> torch.Tensor:
        return _distances(points[blocks[number]], points)

    nearest = min(neighbours, len(points))
    near = [distances(number).topk(nearest, largest=False).values for number in range(len(blocks))]
    sparse = torch.cat([each.square().mean(1) for each in near])  # exact: integers
    apart, farthest = torch.empty_like(sparse), sparse.new_zeros(())
    for number, some in enumerate(blocks):
        distance = distances(number)
        denser = (sparse < sparse[some, None]) | ((sparse == sparse[some, None]) & (index < some[:, None]))
        farthest = torch.maximum(farthest, distance.max())
        apart[some] = distance.masked_fill(~denser, torch.inf).amin(1)
    return snap(torch.minimum(apart, farthest).log() - sparse * step.square() / x.shape[1])


def vicinity_clusters(x: torch.Tensor, place: torch.Tensor, count: int, cutoff: float, near: float) -> torch.Tensor:
    """int64 `[n]`: the one of `count` centres whose cluster each row of `x` (`[n, D]`) is in (ViTCoP, arXiv 2601.17818).

    Each row follows the nearest of the denser rows whose `place` (`[n, 2]`) is at most `near` away, or else of all denser rows.
    What ends at a centre is its cluster. Centres are the rows of the greatest density times distance to the one they would follow.
    The density is the sum of exp(-d^2) over all rows, where d is a distance over `cutoff` times the root mean square distance of
    two rows. Of equally dense rows the first counts as denser. O(n^2 D), memory O(n D).
    """
    points = _points(x)[0]
    scale = cutoff * (2 * (points - points.mean(0)).square().sum(1).mean()).sqrt().clamp(min=1)
    index, place = ascending(len(points), x.device), place.double()
    blocks = index.split(BLOCK)
    dense = snap(torch.cat([(-(_distances(points[some], points) / scale).square()).exp().sum(1) for some in blocks]))
    apart, follows = torch.empty_like(dense), torch.empty_like(index)
    for some in blocks:
        denser = (dense > dense[some, None]) | ((dense == dense[some, None]) & (index < some[:, None]))
        far = snap(torch.cdist(place[some], place) - near) > 0
        distance = (_distances(points[some], points) + far * FAR).masked_fill(~denser, torch.inf)
        apart[some], follows[some] = distance.min(1)
    centres = highest(snap(dense * apart / scale), count)
    follows[centres] = centres
    for _ in range(len(points).bit_length()):
        follows = follows[follows]
    return follows


def _points(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 `[n, D]`, the rows of `x` in steps; and the length of a step."""
    x = x.double()
    step = x.square().sum(1).mean().sqrt().clamp(min=1e-30) / STEPS
    return x / step, step


def _distances(some: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """`[p, n]`: distances in whole steps."""
    return torch.cdist(some, points).round_()
