"""Which of a video's N places the language model reads: greedy farthest point over features and time.

What the encoder computes (rows) and what the language model reads (tokens) need not be the same units. Through `owner` every
unit has a feature at its own place and time, its row's; of these N the K most different are chosen, one after another, each as
far as can be from all chosen before:

    d(i, j) = (1 - cos(f_i, f_j)) + alpha / 2 * sal_j^2 * min(|t_i - t_j| / tau, 1)

where i is chosen, j a candidate and sal_j = 1 - cos(f_j, mean over all units), scaled to a maximum of 1. So the same thing at
another moment is news in proportion to how much the thing stands out: what stays or goes is told, background is not told twice.
Max-min diversity among features alone (alpha = 0) is DivPrune's choice (arXiv 2503.02175); the term in time is this project's.

Each unit that is not chosen is then nearest, by the same distance, to one that is: that one stands for it (`nearest_chosen`).

The choice is the exact greedy one; nothing as large as N x N, nor N x K, is ever held.
"""

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F

from evoprune.pruning.budget import spread

ALPHA = 1.5
DIMENSIONS = 128  # to which features are projected
FEW = 512  # rows, up to which features are not projected
POOL = 512  # candidates looked at between two passes over all of them; a matter of speed alone
AT_ONCE = 1024  # rows of which there are float32 copies
PIECE = 1 << 20  # numbers in the largest tensor of a pass
STEP = 1 / 16384  # distances are told apart to this; see `evoprune.pruning.score.settle`


def choose_units(
    features: torch.Tensor,
    owner: torch.Tensor,
    grid: tuple[int, int, int],
    seconds: Sequence[float],
    keep: int,
    *,
    alpha: float = ALPHA,
    tau: float | None = None,
    dimensions: int | None = DIMENSIONS,
    pool: int = POOL,
    within: float = 0.0,
    least: int = 1,
    floor: float = 0.0,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Chooses `keep` units of one video, or as many as it takes until every unit is near a chosen one.

    The first is the most salient: unlike the start of DivPrune (the unit whose nearest neighbour is farthest) it needs no
    N x N distances. Ties go to the lower index. What is left to choose when nothing differs any more (equal features at equal
    times, say a black video) is spread evenly over time, and over each grid.

    Args:
        features: `[E, D]`, any float dtype, one a row.
        owner: int64 `[T * H * W]`, the row that stands for each unit, or -1 for a unit that cannot be chosen.
        grid: (T, H, W) in units.
        seconds: T times, one a grid.
        keep: K, from 1 to the number of units that can be chosen.
        within: stop before K once no unit is farther from what is chosen than this; 0 for exactly K.
        least: but not before so many are chosen.
        floor: share of an even spread over the grids that each of them gets, of the units that are most different there, before any
            are chosen among all; 0 for none, 1 for the even spread itself.
        alpha: weight of time.
        tau: seconds from which on moments are as far apart as can be; default: from the first grid to the last.
        dimensions: project features to so many if they have more than four times as many, and there are more than a few rows;
            None for never.
        known: from `points_and_salience` for these features, owners and dimensions, if it is there already.

    Returns:
        int64 `[keep]`, or fewer if `within` is above 0: units, ascending.

    Raises:
        ValueError: `keep` is out of range.
    """
    units = (owner >= 0).nonzero()[:, 0]
    if not 1 <= keep <= len(units):
        raise ValueError(f"cannot choose {keep} of {len(units)} units")
    if keep == len(units) and not within:
        return units
    least = min(least, keep) if within else keep
    row, time = owner[units], _time(units, grid, seconds, tau)
    points, salience = known or points_and_salience(features, owner, dimensions)
    weight = alpha / 2 * salience**2

    def choose(among: torch.Tensor, start: list[int], keep: int, within: float, least: int) -> torch.Tensor:
        chosen = _farthest(points, weight, row[among], time[among], start, keep, pool, within, least)
        if len(chosen) < least:
            left = torch.ones(len(among), dtype=torch.bool, device=features.device)
            left[chosen] = False
            left = left.nonzero()[:, 0]
            chosen = torch.cat([chosen, left[_even(units[among[left]], grid, least - len(chosen))]])
        return among[chosen]

    start = []
    if floor:
        due = spread(least if within else keep, grid[0])
        for there, share in zip(_by_grid(units, grid), due, strict=True):
            few = min(math.floor(floor * share), len(there))
            if few:
                start += choose(there, _start(salience, row[there]), few, 0.0, few).tolist()
    every = torch.arange(len(units), device=features.device)
    chosen = choose(every, start or _start(salience, row), keep, within, least)
    return units[chosen].sort().values


def nearest_chosen(
    features: torch.Tensor,
    owner: torch.Tensor,
    grid: tuple[int, int, int],
    seconds: Sequence[float],
    kept: torch.Tensor,
    *,
    alpha: float = ALPHA,
    tau: float | None = None,
    dimensions: int | None = DIMENSIONS,
    known: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Which chosen unit stands for each unit: the nearest, ties to the lower index; a chosen one for itself.

    Args:
        kept: int64 `[K]`, ascending, of `choose_units` with the same settings.

    Returns:
        int64 `[T * H * W]`, indices into `kept`; -1 where `owner` is -1.
    """
    device = features.device
    units = (owner >= 0).nonzero()[:, 0]
    row, time = owner[units], _time(units, grid, seconds, tau)
    points, salience = known or points_and_salience(features, owner, dimensions)
    weight, half = alpha / 2 * salience**2, points.square().sum(1) / 2
    few, back = owner[kept].unique(return_inverse=True)  # the same row at many times is common
    moment = _time(kept, grid, seconds, tau)
    found = torch.empty(len(units), dtype=torch.int64, device=device)
    for some in torch.arange(len(units), device=device).split(max(1, PIECE // len(kept))):
        of, place = row[some].unique(return_inverse=True)
        distance = _lapse(time[some], moment).mul_(weight[row[some]][:, None])
        distance.add_(_apart(points, half, of, few)[place[:, None], back])
        found[some] = _settle(distance).argmin(1)
    stands = torch.full_like(owner, -1)
    stands[units] = found
    stands[kept] = torch.arange(len(kept), device=device)
    return stands


def _by_grid(units: torch.Tensor, grid: tuple[int, int, int]) -> tuple[torch.Tensor, ...]:
    """Of `units` (ascending), the indices of those in each grid."""
    counts = torch.bincount(units // (grid[1] * grid[2]), minlength=grid[0])
    return torch.arange(len(units), device=units.device).split(counts.tolist())


def _time(units: torch.Tensor, grid: tuple[int, int, int], seconds: Sequence[float], tau: float | None) -> torch.Tensor:
    """float32: when each of `units` is, in tau from the first grid on."""
    time = torch.tensor(seconds, dtype=torch.float64)
    time = (time - time.min()) / (tau or float(time.max() - time.min()) or 1.0)
    return time.float().to(units.device)[units // (grid[1] * grid[2])]


def points_and_salience(
    features: torch.Tensor, owner: torch.Tensor, dimensions: int | None = DIMENSIONS
) -> tuple[torch.Tensor, torch.Tensor]:
    """What distances are computed from.

    Args:
        features: `[E, D]`.
        owner: int64 `[N]`, the row of each unit, -1 for none.

    Returns:
        float32 `[E, d]`, points with |p_i - p_j|^2 / 2 = 1 - cos(f_i, f_j), about, if projected; equal features give equal
        points. And the salience `[E]`, from the features themselves, at most 1; all 0 where none stands out.
    """
    count = torch.bincount(owner[owner >= 0], minlength=len(features))
    project = dimensions and features.shape[1] > 4 * dimensions and len(features) > FEW  # else there is nothing to gain
    to = _projection(features.shape[1], dimensions).to(features.device) if project else None

    def units() -> Iterator[torch.Tensor]:  # float32 and of length one, of a few rows at a time, for a row may be long
        return (F.normalize(some.float(), dim=1) for some in features.split(AT_ONCE))

    weights = count.float().split(AT_ONCE)
    mean = sum(weight @ unit for weight, unit in zip(weights, units(), strict=True)) / count.sum()
    common = F.normalize(mean, dim=0)
    made = [(unit if to is None else unit @ to, 1 - unit @ common) for unit in units()]
    points, apart = (torch.cat(parts) for parts in zip(*made, strict=True))
    salience = _settle(apart) * (count > 0)
    return points, salience / salience.max().clamp(min=STEP)


@lru_cache(maxsize=8)
def _projection(wide: int, narrow: int) -> torch.Tensor:
    """float32 `[wide, narrow]`: orthogonal columns in random directions, always the same, which keep squared lengths on average
    (with 128 columns to an eighth or so, whatever the features).
    """
    generator = torch.Generator("cpu").manual_seed(0)
    columns = torch.linalg.qr(torch.randn(wide, narrow, generator=generator, device="cpu")).Q
    return columns * math.sqrt(wide / narrow)


def _settle(x: torch.Tensor) -> torch.Tensor:
    """Rounded to steps, so that equal rows are at distance 0 and equal distances are ties. The least of several can be rounded
    instead of all of them."""
    return (x * (1 / STEP)).round_().mul_(STEP).clamp_(min=0)


def _start(salience: torch.Tensor, row: torch.Tensor) -> list[int]:
    """The first candidate of the most salient row; none if no row stands out."""
    of_each = salience[row]
    top = of_each.max()
    return [int((of_each == top).to(torch.uint8).argmax())] if top > 0 else []


def _farthest(
    points: torch.Tensor,
    weight: torch.Tensor,
    row: torch.Tensor,
    time: torch.Tensor,
    start: list[int],
    keep: int,
    pool: int,
    within: float,
    least: int,
) -> torch.Tensor:
    """Greedy farthest point, exactly as if after each choice all candidates were compared with it.

    They are not: a distance to what is chosen can only shrink. So the `pool` farthest candidates are compared among
    themselves, and chosen from while the farthest is farther than all outside ever were; only then are those brought up to date
    with what was chosen, all of it in one matrix product.

    Args:
        points: `[E, d]`.
        weight: `[E]`, of time.
        row: int64 `[N]`, of each candidate.
        time: `[N]`, in tau.
        start: the first choice, or nothing.

    Returns:
        int64 `[at most keep]`, candidates in the order of their choice; fewer if all others are at distance 0 of a choice, or,
        once there are `least`, at distance `within` at most.
    """
    half = points.square().sum(1) / 2
    chosen, fresh = list(start), list(start)
    nearest = torch.full((len(row),), torch.inf, device=points.device)  # the distance to what is chosen; -1 once chosen
    while fresh and len(chosen) < keep:
        _update(nearest, points, half, weight, row, time, torch.tensor(fresh, device=points.device))
        nearest[torch.tensor(fresh, device=points.device)] = -1
        members, bound, before = _farthest_few(nearest, pool)
        of = row[members]
        few, back = of.unique(return_inverse=True)  # the same row at many times is common
        apart = _apart(points, half, few, few)[back[:, None], back]
        apart.add_(_lapse(time[members], time[members]).mul_(weight[of]))
        most, fewest = keep - len(chosen), least - len(chosen)
        fresh = _choose(nearest[members], _settle(apart), members, bound, before, most, within, fewest)
        chosen += fresh
    return torch.tensor(chosen, dtype=torch.int64, device=points.device)


def _apart(points: torch.Tensor, half: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Distances `[a, b]` of rows without the term of time, not settled yet."""
    return torch.addmm(half[b], points[a], points[b].T, alpha=-1).add_(half[a][:, None])


def _lapse(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """How much time lies between, at most 1: `[a, b]`."""
    return (a[:, None] - b).abs_().clamp_(max=1)


def _update(nearest, points, half, weight, row, time, fresh) -> None:
    """Brings `nearest` up to date with the choices `fresh`."""
    every = torch.arange(len(points), device=points.device)
    for few in fresh.split(max(1, PIECE // len(points))):
        apart = _apart(points, half, every, row[few])
        # Time only adds to a distance: whoever is nearer already than without it stays as it is. Those are nearly all.
        near = (nearest > _settle(apart.amin(1))[row]).nonzero()[:, 0]
        for some in near.split(max(1, PIECE // len(few))):
            distance = _lapse(time[some], time[few]).mul_(weight[row[some]][:, None]).add_(apart[row[some]])
            nearest[some] = torch.minimum(nearest[some], _settle(distance.amin(1)))


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


def _choose(
    nearest: torch.Tensor,
    apart: torch.Tensor,
    members: torch.Tensor,
    bound: float,
    before: int,
    most: int,
    within: float,
    least: int,
) -> list[int]:
    """Chooses among the members of a pool while the farthest is certain to be the farthest of all.

    Args:
        apart: `[n, n]`, distances to each member (the first index) once it is chosen.
        bound, before: no candidate outside is farther than `bound`; the first that is exactly so far.
    """
    at, apart, index = nearest.cpu().numpy().copy(), apart.cpu().numpy(), members.cpu().numpy()
    chosen = []
    while len(chosen) < most:
        i = int(at.argmax())  # the first of equals
        if at[i] <= (within if len(chosen) >= least else 0):
            break  # if others may be farther, they come first in the next pool
        if at[i] < bound or (at[i] == bound and index[i] > before):
            break
        chosen.append(int(index[i]))
        np.minimum(at, apart[i], out=at)
        at[i] = -1
    return chosen


def _even(units: torch.Tensor, grid: tuple[int, int, int], keep: int) -> torch.Tensor:
    """`keep` of `units` (ascending) at even distances in time, and in each grid evenly over its places: indices into `units`."""
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
