"""The selection algorithm: farthest-point sampling over features and time inside tubes, and the clusters around selected units.

A video is cut into *tubes*. A tube consists of neighboring units in several consecutive frame pairs. Inside a tube, units are
selected one by one: the next unit is always the one farthest from all units selected before. Its distance from them is its
*radius*. Finally, the K units with the largest radii in the whole video are selected. The radii do not depend on K, and no tensor
shape depends on values. backend/operators.py has an implementation for each kind of device. The distance between two units
combines features and time:

    d(i, j) = |p_i - p_j|^2 / 2 + alpha / 2 * salience_j^2 * |t_i - t_j|

Unit i is selected and unit j is a candidate. p is the unit's normalized feature: the mean over all units of the clip is
subtracted, every channel is divided by its standard deviation, and all features are divided by the length of the longest one
(results/geometry.md). t runs from 0 to 1 over the clip. salience_j = |p_j|^2, so an object that stands out more counts as newer
when it appears at another time.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from evoprune.backend import nearest_selected, standard_places, to_device, tube_radii
from evoprune.methods.plans import Grid, spread
from evoprune.methods.types import arange_on

ALPHA = 1.5
DIMENSIONS = 128  # the number of dimensions of projected features
UNPROJECTED = 512  # features are projected only if there are more rows than this
STEPS = 16384  # distances are rounded to 1 / STEPS, so that equal rows have distance 0 and equal distances are ties
TUBE_UNITS = 256  # the approximate number of units in a tube, which spans at most `TUBE_PAIRS` frame pairs
TUBE_PAIRS = 16
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Points:
    """The N units of a video as points, represented by E rows. Distances between points are whole numbers of steps."""

    grid: Grid
    row: torch.Tensor  # int64 [N], the row that represents each unit, or -1
    time: torch.Tensor  # float32 [N], from 0 to 1
    place: torch.Tensor  # float32 [E, d], at most about sqrt(STEPS) long; if projected, distances are approximate
    half: torch.Tensor  # float32 [E], half the squared length of `place`
    salience: torch.Tensor  # float32 [E], from 0 to 1; all 0 if all features are equal
    weight: torch.Tensor  # float32 [E], the weight of time: alpha / 2 * salience^2, in steps


def points_of(rows: torch.Tensor, unit_to_row: torch.Tensor, grid: Grid, alpha: float) -> Points:
    """Return the points of one video.

    Each row counts once for every unit that it represents.

    Args:
        rows, unit_to_row, grid: See `Tokens`.
        alpha: The weight of time in distances.
    """
    projection = None
    if rows.shape[1] > 4 * DIMENSIONS and len(rows) > UNPROJECTED:  # otherwise a projection would save nothing
        projection = to_device(_projection(rows.shape[1]), rows.device)
    place, salience = standard_places(rows, unit_to_row, projection, STEPS)
    place = place * math.sqrt(STEPS)
    time, _, _ = grid_tables(grid, str(unit_to_row.device))
    return Points(grid, unit_to_row, time, place, place.square().sum(1) / 2, salience, STEPS * alpha / 2 * salience**2)


@lru_cache(maxsize=8)
def _projection(width: int) -> torch.Tensor:
    """Return a random projection: float32 `[width, DIMENSIONS]` with orthogonal columns.

    The projection preserves squared lengths to within about an eighth.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(normal).Q * math.sqrt(width / DIMENSIONS)


def farthest_points(
    points: Points, keep: int, *, within: float = 0.0, least: int = 1, floor: float = 0.0
) -> torch.Tensor:
    """Select `keep` units of one video, or fewer if `within` is set. Returns int64 `[K]`, ascending.

    If radii are equal, the selected units are spread evenly over time and over the frame. In a black video, where all units are
    equal, this applies to the whole selection.

    Args:
        within: Stop before `keep` once at least `least` units are selected and no unit is farther than this from a selected unit. 0
            disables this. Otherwise the radii are read back, which synchronizes the GPU.
        least: The minimum number of units for `within`.
        floor: The fraction of its equal share of `keep` that every frame pair gets before units compete across the video.

    Raises:
        ValueError: If `keep` is not between 1 and the number of units.
    """
    units = len(points.row)
    if not 1 <= keep <= units:
        raise ValueError(f"cannot select {keep} of {units} units")
    if keep == units and not within:
        return arange_on(units, points.row.device)
    _, turn, tubes = grid_tables(points.grid, str(points.row.device))
    first = (points.salience * (STEPS / 2)).round_()
    needed = keep
    if floor:  # units that a frame pair is guaranteed may rank below the first `keep` units of the clip
        needed = units
    radii = tube_radii(points.place, points.half, points.weight, first, points.row, points.time, tubes, needed)
    if within:
        keep = max(min(least, keep), min(keep, int((radii > within * STEPS).sum())))
    order = torch.add(turn, radii.long(), alpha=units)
    if floor:
        order = _first_of_each_pair(order, points.grid, keep, floor)
    return order.topk(keep).indices.sort().values


def assign_clusters(points: Points, kept: torch.Tensor) -> torch.Tensor:
    """Return int64 `[N]`: the index in `kept` (from `farthest_points`) of the selected unit nearest to each unit.

    A unit without a row gets -1. A selected unit gets its own index. Ties go to the lower index.
    """
    return nearest_selected(points.place, points.half, points.weight, points.row, points.time, kept)


def _first_of_each_pair(order: torch.Tensor, grid: Grid, keep: int, floor: float) -> torch.Tensor:
    """Return `order` with each frame pair's highest-ranked units moved ahead of all other units.

    The number of units moved is `floor` times the frame pair's equal share of `keep`. `order` is int64 `[N]`, and higher values
    come first.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    counts = torch.tensor([math.floor(floor * part) for part in spread(keep, pairs)], dtype=torch.int64, device="cpu")
    rank = order.view(pairs, places).argsort(1, descending=True).argsort(1)
    before = (rank < to_device(counts, order.device)[:, None]).flatten() & (order >= 0)
    return torch.where(before, order + (1 << 60), order)


@lru_cache(maxsize=32)
def grid_tables(grid: Grid, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the tables that depend only on the grid: times, turns and tubes.

    Returns:
        float32 `[N]`, each unit's time, from 0 to 1.
        int64 `[N]`, each unit's turn, which breaks ties between equal radii. Turns are distinct numbers from 0 to N - 1, and
        the unit with the highest turn is selected first.
        int64 `[B, L]`, the units in each tube, ascending, padded with N.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    time = (torch.arange(pairs, dtype=torch.float32, device="cpu") / max(1, pairs - 1)).repeat_interleave(places)
    # Every round takes one place per frame pair. A frame pair's places are ordered so that any contiguous part of the order
    # covers the frame evenly. Frame pairs start at positions in this order that are far apart.
    far_apart = torch.arange(pairs, dtype=torch.float64, device="cpu") * GOLDEN % 1
    begin = (far_apart * places).long()
    rounds = (_scattered(grid[1], grid[2]) - begin[:, None]) % places
    turn = pairs * places - 1 - (rounds * pairs + far_apart.argsort().argsort()[:, None]).flatten()
    return tuple(to_device(x, torch.device(device)) for x in (time, turn, _tubes(grid)))


def _tubes(grid: Grid) -> torch.Tensor:
    """Return int64 `[B, L]`: the units in each tube, ascending, padded with N.

    Tubes have about the same length along each side of the grid. In a short clip, tubes cover a larger part of the frame.
    """
    count = -(-grid[0] // TUBE_PAIRS)
    pairs = -(-grid[0] // count)
    side = max(1, math.isqrt(TUBE_UNITS // pairs))
    cuts = [count, -(-grid[1] // side), -(-grid[2] // side)]
    of = [torch.arange(n, dtype=torch.int64, device="cpu") * cut // n for n, cut in zip(grid, cuts, strict=True)]
    tube = ((of[0][:, None] * cuts[1] + of[1])[:, :, None] * cuts[2] + of[2]).flatten()
    size = torch.bincount(tube)
    order = tube.argsort(stable=True)
    rank = arange_on(len(tube), "cpu") - (size.cumsum(0) - size).repeat_interleave(size)
    tubes = torch.full((len(size), int(size.max())), len(tube), dtype=torch.int64, device="cpu")
    tubes[tube[order], rank] = order
    return tubes


def _scattered(height: int, width: int) -> torch.Tensor:
    """Return int64 `[height * width]`: the rank at which a low-discrepancy sequence (Roberts's R2) first visits each place."""
    n = torch.arange(1, 8 * height * width + 1, dtype=torch.float64, device="cpu")
    step = 1.324717957244746
    visits = (n / step % 1 * height).long() * width + (n / step**2 % 1 * width).long()
    first = torch.full((height * width,), len(n), dtype=torch.int64, device="cpu")
    return first.scatter_reduce(0, visits, arange_on(len(n), "cpu"), "amin").argsort(stable=True).argsort()
