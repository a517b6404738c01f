"""The selection: farthest-point sampling over features and time, and the clusters that it makes.

The K most different units of a video are selected, one after another, each the farthest from all selected before. It is the exact
greedy selection, and holds no matrix of N x N or N x K numbers. The distance is how much two units differ, in features and in time:

    d(i, j) = |p_i - p_j|^2 / 2 + alpha / 2 * salience_j^2 * |t_i - t_j|

Unit i is selected and unit j is a candidate. p is a unit's feature minus the mean over all units of the clip, with every
channel divided by its standard deviation, and all divided by the length of the longest (results/geometry.md). t runs from 0 to 1
over the clip. salience_j = |p_j|^2: the more a thing stands out, the more it counts as new at another time.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch

from evoprune.model.machine import to_device
from evoprune.pruning.budget import spread
from evoprune.pruning.encoder_plan import Grid
from evoprune.pruning.indices import ascending

ALPHA = 1.5
DIMENSIONS = 128  # of the projected features
UNPROJECTED = 512  # up to this number of rows, features are not projected
AT_ONCE = 1024  # rows that have float32 copies at a time
STILL = 1e-3  # of the mean variance, added to each channel's, so that one that hardly varies counts less
ROUNDING = 1 / 256  # of a channel's mean: a deviation as small as that of rounding does not count as one
STEP = 1 / 16384  # resolution of distances
POOL = 512  # candidates of a pool; affects the speed alone
PIECE = 1 << 20  # numbers in the largest tensor of a pass


@dataclass(frozen=True)
class Points:
    """The n units of a video as points with distances; E rows represent them."""

    units: torch.Tensor  # int64 [n], ascending
    row: torch.Tensor  # int64 [n], the row of each unit
    time: torch.Tensor  # float32 [n], from 0 to 1
    place: torch.Tensor  # float32 [E, d], at most about 1 long; distances are approximate if it is projected
    half: torch.Tensor  # float32 [E], half of the squared length of each place
    salience: torch.Tensor  # float32 [E], from 0 to 1; all 0 if all features are equal
    weight: torch.Tensor  # float32 [E], of time: alpha / 2 * salience^2

    def __len__(self) -> int:
        return len(self.units)

    def some(self, index: torch.Tensor) -> "Points":
        """The points with these indices (int64); all rows stay."""
        return replace(self, units=self.units[index], row=self.row[index], time=self.time[index])

    def in_features(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """float32 `[a, b]`: the first term of the distance, between rows `a` and rows `b` (int64), before `rounded`."""
        return torch.addmm(self.half[b], self.place[a], self.place[b].T, alpha=-1).add_(self.half[a][:, None])

    def add_time(self, distance: torch.Tensor, candidates: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Adds the second term in place to `distance` `[candidates, selected]`; both are indices of points (int64)."""
        lapse = (self.time[candidates][:, None] - self.time[selected]).abs_()
        return distance.add_(lapse.mul_(self.weight[self.row[candidates]][:, None]))


def points_of(
    rows: torch.Tensor, owner: torch.Tensor, grid: tuple[int, int, int], seconds: Sequence[float], alpha: float
) -> Points:
    """The points of one video: `rows`, `owner`, `grid` as in `Tokens`; seconds of each frame pair; `alpha`, the weight of time."""
    units = (owner >= 0).nonzero()[:, 0]
    time = torch.tensor(seconds, dtype=torch.float64, device="cpu")
    time = (time - time.min()) / (float(time.max() - time.min()) or 1.0)
    place, salience = places_and_salience(rows, owner)
    return Points(
        units=units,
        row=owner[units],
        time=to_device(time.float(), units.device)[units // (grid[1] * grid[2])],
        place=place,
        half=place.square().sum(1) / 2,
        salience=salience,
        weight=alpha / 2 * salience**2,
    )


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Rounds distances, or a minimum of them, to multiples of `STEP`: equal rows are at distance 0, equal distances are ties."""
    return (x * (1 / STEP)).round_().mul_(STEP).clamp_(min=0)


def places_and_salience(rows: torch.Tensor, owner: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`place` and `salience` of `Points`; equal features have equal points. A row counts as often as it represents a unit."""
    count = torch.bincount(owner[owner >= 0], minlength=len(rows)).float()
    shares = (count / count.sum()).split(AT_ONCE)
    project = rows.shape[1] > 4 * DIMENSIONS and len(rows) > UNPROJECTED  # otherwise projection saves nothing
    to = to_device(_projection(rows.shape[1]), rows.device) if project else None

    def pieces() -> Iterator[torch.Tensor]:  # float32, a few rows at a time to save memory
        return (some.float() for some in rows.split(AT_ONCE))

    first = rows[0].float()  # sums of differences are exact where all rows are equal
    mean = first + sum(share @ (piece - first) for share, piece in zip(shares, pieces(), strict=True))
    variance = sum(share @ (piece - mean).square_() for share, piece in zip(shares, pieces(), strict=True))
    scale = (variance + STILL * variance.mean() + (ROUNDING * mean).square_()).clamp_(min=1e-30).rsqrt_()
    standard = ((piece - mean).mul_(scale) for piece in pieces())
    made = [(piece if to is None else piece @ to, piece.square().sum(1)) for piece in standard]
    place, salience = (torch.cat(pieces) for pieces in zip(*made, strict=True))
    largest = (salience * (count > 0)).max().clamp(min=STILL * rows.shape[1])
    salience = rounded(salience / largest) * (count > 0)
    return place / largest.sqrt(), salience


@lru_cache(maxsize=8)
def _projection(width: int) -> torch.Tensor:
    """float32 `[width, DIMENSIONS]`: orthogonal columns in random directions that keep squared lengths to about an eighth."""
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(normal).Q * math.sqrt(width / DIMENSIONS)


def farthest_points(
    points: Points, grid: Grid, keep: int, *, within: float = 0.0, least: int = 1, floor: float = 0.0
) -> torch.Tensor:
    """int64 `[K]`, ascending: `keep` units of one video, or as many as it takes until every unit is near a selected one.

    The first is the most salient unit. Ties go to the lower index. Once no remaining unit differs from the selected ones (a black
    video, for example), the others are spread evenly over time and over each frame pair.

    Args:
        within: stop before `keep` once no unit is farther than this from a selected one, and `least` are selected; 0 for never.
        floor: share of its even part of `keep` that each frame pair gets first, before units are selected among all.

    Raises ValueError: `keep` is not from 1 to the number of points.
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


def _of_each_pair(points: Points, grid: Grid, keep: int, floor: float) -> list[int]:
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


def _filled(points: Points, grid: Grid, selected: torch.Tensor, least: int) -> torch.Tensor:
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
        near, apart = nearest[members].cpu().numpy().copy(), rounded(apart).cpu().numpy()
        index, fresh = members.cpu().numpy(), []
        while len(selected) < keep:
            best = int(near.argmax())  # the first of equals
            if near[best] <= (within if len(selected) >= least else 0):
                break
            if near[best] < bound or (near[best] == bound and index[best] > before):
                break  # a farther candidate outside comes first in the next pool
            fresh.append(int(index[best]))
            selected.append(fresh[-1])
            np.minimum(near, apart[best], out=near)
            near[best] = -1
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


def _even(units: torch.Tensor, grid: Grid, keep: int) -> torch.Tensor:
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
    first = torch.full((height * width,), len(n), dtype=torch.int64, device="cpu")
    return first.scatter_reduce(0, visits, ascending(len(n), "cpu"), "amin").argsort(stable=True).argsort()
