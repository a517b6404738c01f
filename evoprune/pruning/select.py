"""The selection: farthest-point sampling over features and time, and the clusters that it makes.

The K most different units of a video are selected, one after another, each as far as can be from all that were selected before
(pruning/distance.py). What the encoder computes (rows) and what is selected (units) need not be the same: each unit has its row's
feature at its own place and time. The selection is the exact greedy one; nothing as large as N x N, nor N x K, is ever held.
"""

import math

import numpy as np
import torch

from evoprune.pruning.budget import spread
from evoprune.pruning.distance import Points, lapse, snap

POOL = 512  # candidates compared between two passes over all of them; a matter of speed alone
PIECE = 1 << 20  # numbers in the largest tensor of a pass


def farthest_points(
    points: Points,
    grid: tuple[int, int, int],
    keep: int,
    *,
    within: float = 0.0,
    least: int = 1,
    floor: float = 0.0,
    pool: int = POOL,
) -> torch.Tensor:
    """Selects `keep` units of one video, or as many as it takes until every unit is near a selected one.

    The first is the most salient: unlike DivPrune's start (the unit whose nearest neighbour is farthest) this needs no N x N
    distances. Ties go to the lower index. Where nothing differs any more (equal features at equal times, such as a black video) the
    rest is spread evenly over time and over each frame pair.

    Args:
        points: all units that may be selected.
        grid: (T, H, W) in units.
        keep: K, from 1 to the number of points.
        within: stop before K once no unit is farther than this from a selected one; 0 for exactly K.
        least: but not before so many are selected.
        floor: share of an even spread over the frame pairs that each of them gets before units are selected among all; 0 for
            none, 1 for the even spread.

    Returns:
        int64 `[keep]`, or fewer if `within` is above 0: units, ascending.

    Raises:
        ValueError: `keep` is out of range.
    """
    if not 1 <= keep <= len(points):
        raise ValueError(f"cannot select {keep} of {len(points)} units")
    if keep == len(points) and not within:
        return points.units
    least = min(least, keep) if within else keep
    start = _of_each_pair(points, grid, least if within else keep, floor, pool) if floor else []
    start = start or _most_salient(points)
    selected = _filled(points, grid, _farthest(points, start, keep, pool, within, least), least)
    return points.units[selected].sort().values


def assign_clusters(points: Points, kept: torch.Tensor, total: int) -> torch.Tensor:
    """The selected unit nearest to each unit, ties to the lower index; a selected unit belongs to itself.

    Args:
        points: all units that may be selected.
        kept: int64 `[K]`, ascending, from `farthest_points`.
        total: N, units of the video.

    Returns:
        int64 `[N]`, indices into `kept`; -1 for a unit that is not among the points.
    """
    device = points.units.device
    selected = points.some(torch.searchsorted(points.units, kept))
    few, back = selected.row.unique(return_inverse=True)  # one row is often selected at many times
    found = torch.empty(len(points), dtype=torch.int64, device=device)
    for some in torch.arange(len(points), device=device).split(max(1, PIECE // len(kept))):
        of, place = points.row[some].unique(return_inverse=True)
        distance = lapse(points.time[some], selected.time).mul_(points.weight[points.row[some]][:, None])
        distance.add_(points.apart(of, few)[place[:, None], back])
        found[some] = snap(distance).argmin(1)
    owner = torch.full((total,), -1, dtype=torch.int64, device=device)
    owner[points.units] = found
    owner[kept] = torch.arange(len(kept), device=device)
    return owner


def _of_each_pair(points: Points, grid: tuple[int, int, int], keep: int, floor: float, pool: int) -> list[int]:
    """Indices of the units that each frame pair is sure of: its most different ones, `floor` times its even share of `keep`."""
    selected, pair = [], points.units // (grid[1] * grid[2])
    counts = torch.bincount(pair, minlength=grid[0]).tolist()
    pairs = torch.arange(len(points), device=pair.device).split(counts)
    for there, share in zip(pairs, spread(keep, grid[0]), strict=True):
        few = min(math.floor(floor * share), len(there))
        if few:
            inside = points.some(there)
            found = _filled(inside, grid, _farthest(inside, _most_salient(inside), few, pool, 0.0, few), few)
            selected += there[found].tolist()
    return selected


def _filled(points: Points, grid: tuple[int, int, int], selected: torch.Tensor, least: int) -> torch.Tensor:
    """`selected` and, where they are fewer than `least`, others at even distances."""
    if len(selected) >= least:
        return selected
    left = torch.ones(len(points), dtype=torch.bool, device=selected.device)
    left[selected] = False
    left = left.nonzero()[:, 0]
    return torch.cat([selected, left[_even(points.units[left], grid, least - len(selected))]])


def _most_salient(points: Points) -> list[int]:
    """The first point of the most salient row; none if no row stands out."""
    of_each = points.salience[points.row]
    top = of_each.max()
    return [int((of_each == top).to(torch.uint8).argmax())] if top > 0 else []


def _farthest(points: Points, start: list[int], keep: int, pool: int, within: float, least: int) -> torch.Tensor:
    """Greedy farthest points, exactly as if after each selection all candidates were compared with it.

    They are not: a distance to what is selected can only shrink. So the `pool` farthest candidates are compared among themselves,
    and selected from while the farthest is farther than all outside ever were. Only then are the others brought up to date with
    what was selected, all of it in one matrix product.

    Args:
        start: what is selected already.

    Returns:
        int64 `[at most keep]`, indices in the order of selection; fewer if all others are at distance 0 of a selected one, or, once
        there are `least`, at distance `within` at most.
    """
    device = points.row.device
    selected, fresh = list(start), list(start)
    nearest = torch.full(
        (len(points),), torch.inf, dtype=torch.float32, device=device
    )  # to what is selected; -1 once selected
    while fresh and len(selected) < keep:
        latest = torch.tensor(fresh, dtype=torch.int64, device=device)
        _update(nearest, points, latest)
        nearest[latest] = -1
        members, bound, before = _farthest_few(nearest, pool)
        few, back = points.row[members].unique(return_inverse=True)  # one row is often there at many times
        apart = points.apart(few, few)[back[:, None], back]
        apart.add_(lapse(points.time[members], points.time[members]).mul_(points.weight[points.row[members]]))
        most, fewest = keep - len(selected), least - len(selected)
        fresh = _select_in_pool(nearest[members], snap(apart), members, bound, before, most, within, fewest)
        selected += fresh
    return torch.tensor(selected, dtype=torch.int64, device=device)


def _update(nearest: torch.Tensor, points: Points, fresh: torch.Tensor) -> None:
    """Brings `nearest` up to date with newly selected points."""
    every = torch.arange(len(points.place), device=nearest.device)
    for few in fresh.split(max(1, PIECE // len(every))):
        apart = points.apart(every, points.row[few])
        # Time only adds to a distance: a point nearer already than without it stays as it is. Those are nearly all.
        near = (nearest > snap(apart.amin(1))[points.row]).nonzero()[:, 0]
        for some in near.split(max(1, PIECE // len(few))):
            row = points.row[some]
            distance = lapse(points.time[some], points.time[few]).mul_(points.weight[row][:, None]).add_(apart[row])
            nearest[some] = torch.minimum(nearest[some], snap(distance.amin(1)))


def _farthest_few(nearest: torch.Tensor, count: int) -> tuple[torch.Tensor, float, int]:
    """The `count` farthest candidates, ascending, ties by index; how far others may be at most; the first other so far."""
    if len(nearest) <= count:
        return torch.arange(len(nearest), device=nearest.device), -1.0, 0
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
    """Selects among the members of a pool while the farthest is certain to be the farthest of all.

    Args:
        apart: `[n, n]`, distances to each member (the first index) once it is selected.
        bound, before: no candidate outside is farther than `bound`; the first that is exactly so far.
    """
    at, apart, index = nearest.cpu().numpy().copy(), apart.cpu().numpy(), members.cpu().numpy()
    selected = []
    while len(selected) < most:
        i = int(at.argmax())  # the first of equals
        if at[i] <= (within if len(selected) >= least else 0):
            break  # if others may be farther, they come first in the next pool
        if at[i] < bound or (at[i] == bound and index[i] > before):
            break
        selected.append(int(index[i]))
        np.minimum(at, apart[i], out=at)
        at[i] = -1
    return selected


def _even(units: torch.Tensor, grid: tuple[int, int, int], keep: int) -> torch.Tensor:
    """`keep` of `units` (ascending) at even distances in time, in each frame pair evenly over its places; indices into `units`."""
    places = grid[1] * grid[2]
    g, place = units // places, units % places
    last = torch.bincount(g, minlength=grid[0]).cumsum(0)
    ends = last * keep // len(units)  # how many are taken up to the end of each grid
    before = torch.cat([ends.new_zeros(1), ends])
    # Each grid goes on where the one before left off in an order of the places of which any stretch lies evenly.
    turn = (_scattered(grid[1], grid[2]).to(units.device)[place] - before[g]) % places
    order = turn.argsort(stable=True)
    order = order[g[order].argsort(stable=True)]  # by grid, then by turn
    rank = torch.arange(len(units), device=units.device) - torch.cat([last.new_zeros(1), last])[g]
    return order[rank < before.diff()[g]]


def _scattered(height: int, width: int) -> torch.Tensor:
    """int64 `[height * width]`, raster: the turn of each place, in the order in which a low-discrepancy sequence comes by.

    The sequence is Roberts's R2: steps of the powers of 1 / 1.3247..., the root of s^3 = s + 1.
    """
    n, step = torch.arange(1, 8 * height * width + 1, dtype=torch.float64, device="cpu"), 1.324717957244746
    visits = (n / step % 1 * height).long() * width + (n / step**2 % 1 * width).long()
    never = len(n)
    first = torch.full((height * width,), never, device="cpu").scatter_reduce(
        0, visits, torch.arange(never, device="cpu"), "amin"
    )
    return first.argsort(stable=True).argsort()
