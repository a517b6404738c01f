"""The selection: farthest-point sampling over features and time, and the clusters that it makes.

The K most different units of a video are selected, one after another, each the farthest from all selected before
(pruning/distance.py). It is the exact greedy selection, and holds no matrix of N x N or N x K numbers.
"""

import math

import numpy as np
import torch

from evoprune.model.machine import to_device
from evoprune.pruning.budget import spread
from evoprune.pruning.distance import Points, rounded
from evoprune.pruning.indices import ascending

POOL = 512  # candidates of a pool; affects the speed alone
PIECE = 1 << 20  # numbers in the largest tensor of a pass


def farthest_points(
    points: Points,
    grid: tuple[int, int, int],
    keep: int,
    *,
    within: float = 0.0,
    least: int = 1,
    floor: float = 0.0,
) -> torch.Tensor:
    """Selects `keep` units of one video, or as many as it takes until every unit is near a selected one.

    The first is the most salient unit. Ties go to the lower index. Once no remaining unit differs from the selected ones (a black
    video, for example), the others are spread evenly over time and over each frame pair.

    Args:
        points: all units that may be selected.
        keep: K, from 1 to the number of points.
        within: stop before K once no unit is farther than this from a selected one; 0 for exactly K.
        least: with `within`, the least number of units to select.
        floor: share of its even part of `keep` that each frame pair gets first, before units are selected among all; 0 for none, 1
            for an even spread.

    Returns:
        int64 `[keep]`, or fewer if `within` is above 0: units, ascending.

    Raises ValueError: `keep` is out of range.
    """
    if not 1 <= keep <= len(points):
        raise ValueError(f"cannot select {keep} of {len(points)} units")
    if keep == len(points) and not within:
        return points.units
    least = min(least, keep) if within else keep
    start = _of_each_pair(points, grid, least, floor) if floor else []
    start = start or _most_salient(points)
    selected = _filled(points, grid, _farthest(points, start, keep, within, least), least)
    return points.units[selected].sort().values


def assign_clusters(points: Points, kept: torch.Tensor, total: int) -> torch.Tensor:
    """int64 `[total]`: the index in `kept` (from `farthest_points`) of the selected unit nearest to each unit; -1 for no point.

    Ties go to the lower index. A selected unit is its own.
    """
    device = points.units.device
    selected = torch.searchsorted(points.units, kept)
    rows, back = points.row[selected].unique(return_inverse=True)  # one row is often selected at many times
    found = torch.empty(len(points), dtype=torch.int64, device=device)
    for some in ascending(len(points), device).split(max(1, PIECE // len(kept))):
        of, place = points.row[some].unique(return_inverse=True)
        distance = points.add_time(points.in_features(of, rows)[place[:, None], back], some, selected)
        found[some] = rounded(distance).argmin(1)
    owner = torch.full((total,), -1, dtype=torch.int64, device=device)
    owner[points.units] = found
    owner[kept] = ascending(len(kept), device)
    return owner


def _of_each_pair(points: Points, grid: tuple[int, int, int], keep: int, floor: float) -> list[int]:
    """Indices of points that each frame pair gets first: its most different ones, `floor` times its even part of `keep`."""
    selected, pair = [], points.units // (grid[1] * grid[2])
    counts = torch.bincount(pair, minlength=grid[0]).tolist()
    members = ascending(len(points), pair.device).split(counts)
    for there, share in zip(members, spread(keep, grid[0]), strict=True):
        count = min(math.floor(floor * share), len(there))
        if count:
            inside = points.some(there)
            found = _filled(inside, grid, _farthest(inside, _most_salient(inside), count, 0.0, count), count)
            selected += there[found].tolist()
    return selected


def _filled(points: Points, grid: tuple[int, int, int], selected: torch.Tensor, least: int) -> torch.Tensor:
    """`selected`, filled up to `least` with other points at even distances."""
    if len(selected) >= least:
        return selected
    left = torch.ones(len(points), dtype=torch.bool, device=selected.device)
    left[selected] = False
    left = left.nonzero()[:, 0]
    return torch.cat([selected, left[_even(points.units[left], grid, least - len(selected))]])


def _most_salient(points: Points) -> list[int]:
    """The index of the first point of the most salient row; none if no row stands out."""
    of_each = points.salience[points.row]
    top = of_each.max()
    return [int((of_each == top).to(torch.uint8).argmax())] if top > 0 else []


def _farthest(points: Points, start: list[int], keep: int, within: float, least: int) -> torch.Tensor:
    """Greedy farthest points, exactly as if every candidate were compared with each newly selected point.

    The distance of a candidate to the selected points can only shrink. So the `POOL` farthest candidates are compared among
    themselves, and points are selected from this pool while its farthest is certain to be the farthest of all. Only then are the
    distances of all candidates updated, for all newly selected points in one matrix product.

    `start`: indices of points that are selected already.

    Returns int64 `[keep or fewer]`, indices in the order of selection. There are fewer if all other points are at distance 0 of
    a selected one; or if at least `least` are selected and all other points are at distance `within` or less.
    """
    device = points.row.device
    selected, fresh = list(start), list(start)
    # The distance of each point to the nearest selected one; -1 once it is selected itself.
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float32, device=device)
    while fresh and len(selected) < keep:
        latest = torch.tensor(fresh, dtype=torch.int64, device=device)
        _update(nearest, points, latest)
        nearest[latest] = -1
        members, bound, before = _farthest_candidates(nearest, POOL)
        rows, back = points.row[members].unique(return_inverse=True)  # a row is often there at several times
        apart = points.in_features(rows, rows)[back[:, None], back]  # [selected, candidate]
        points.add_time(apart.T, members, members)
        most, fewest = keep - len(selected), least - len(selected)
        fresh = _select_in_pool(nearest[members], rounded(apart), members, bound, before, most, within, fewest)
        selected += fresh
    return torch.tensor(selected, dtype=torch.int64, device=device)


def _update(nearest: torch.Tensor, points: Points, fresh: torch.Tensor) -> None:
    """Updates `nearest` (float32 `[n]`) for the newly selected points `fresh` (int64)."""
    every = ascending(len(points.place), nearest.device)
    for latest in fresh.split(max(1, PIECE // len(every))):
        apart = points.in_features(every, points.row[latest])
        # The term in time only adds to a distance. So nearly all points are nearer to an earlier one, and need no term in time.
        near = (nearest > rounded(apart.amin(1))[points.row]).nonzero()[:, 0]
        for some in near.split(max(1, PIECE // len(latest))):
            distance = points.add_time(apart[points.row[some]], some, latest)
            nearest[some] = torch.minimum(nearest[some], rounded(distance.amin(1)))


def _farthest_candidates(nearest: torch.Tensor, count: int) -> tuple[torch.Tensor, float, int]:
    """Indices of the `count` farthest candidates, ascending; the greatest distance of any other; and the first index of those."""
    if len(nearest) <= count:
        return ascending(len(nearest), nearest.device), -1.0, 0
    bound = nearest.topk(count).values[-1]
    ties = (nearest == bound).nonzero()[:, 0]
    farther = (nearest > bound).nonzero()[:, 0]
    inside = count - len(farther)
    first = int(ties[inside]) if inside < len(ties) else len(nearest)
    return torch.cat([farther, ties[:inside]]).sort().values, float(bound), first


def _select_in_pool(
    nearest: torch.Tensor,
    apart: torch.Tensor,
    members: torch.Tensor,
    bound: float,
    before: int,
    most: int,
    within: float,
    least: int,
) -> list[int]:
    """Indices of points selected from a pool, in order, while its farthest member is certain to be the farthest of all candidates.

    Args:
        nearest: float32 `[n]`, the distance of each member to the nearest selected point.
        apart: float32 `[n, n]`, the distance of each member (second dimension) to each member that is selected (first dimension).
        members: int64 `[n]`, indices of the members among all points.
        bound, before: the greatest distance outside the pool, and the first candidate at that distance.
        most: the most points to select.
        within, least: stop at distance `within` once `least` points are selected.
    """
    at, apart, index = nearest.cpu().numpy().copy(), apart.cpu().numpy(), members.cpu().numpy()
    selected = []
    while len(selected) < most:
        i = int(at.argmax())  # the first of equals
        if at[i] <= (within if len(selected) >= least else 0):
            break  # a farther candidate outside comes first in the next pool
        if at[i] < bound or (at[i] == bound and index[i] > before):
            break
        selected.append(int(index[i]))
        np.minimum(at, apart[i], out=at)
        at[i] = -1
    return selected


def _even(units: torch.Tensor, grid: tuple[int, int, int], keep: int) -> torch.Tensor:
    """int64 `[keep]`: indices of `units` (int64, ascending), even over time and over the places of each frame pair."""
    places = grid[1] * grid[2]
    pair, place = units // places, units % places
    last = torch.bincount(pair, minlength=grid[0]).cumsum(0)
    ends = last * keep // len(units)  # how many are selected up to the end of each frame pair
    before = torch.cat([ends.new_zeros(1), ends])
    # Any stretch of the order of `_scattered` covers the frame evenly, and each frame pair continues where the last one ended.
    turn = (to_device(_scattered(grid[1], grid[2]), units.device)[place] - before[pair]) % places
    order = turn.argsort(stable=True)
    order = order[pair[order].argsort(stable=True)]  # by frame pair, then by turn
    rank = ascending(len(units), units.device) - torch.cat([last.new_zeros(1), last])[pair]
    return order[rank < before.diff()[pair]]


def _scattered(height: int, width: int) -> torch.Tensor:
    """int64 `[height * width]`: the order in which a low-discrepancy sequence (Roberts's R2) first visits the places."""
    n, step = torch.arange(1, 8 * height * width + 1, dtype=torch.float64, device="cpu"), 1.324717957244746
    visits = (n / step % 1 * height).long() * width + (n / step**2 % 1 * width).long()
    never = len(n)
    first = torch.full((height * width,), never, dtype=torch.int64, device="cpu").scatter_reduce(
        0, visits, ascending(never, "cpu"), "amin"
    )
    return first.argsort(stable=True).argsort()
