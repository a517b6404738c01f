"""The selection: farthest points over features and time inside tubes, and the clusters around them.

A video is cut into *tubes*: neighboring units of some frame pairs. In a tube, units are selected one after another, each the
farthest from those selected before. That distance is the unit's radius. The K units with the largest radii are selected. The
radii do not depend on K, and no shape depends on values; backend/operators.py has an implementation for each kind of device. The
distance between two units combines features and time:

    d(i, j) = |p_i - p_j|^2 / 2 + alpha / 2 * salience_j^2 * |t_i - t_j|

Unit i is selected and unit j is a candidate. p is a unit's feature minus the mean over all units of the clip, with every
channel divided by its standard deviation, and all divided by the length of the longest (results/geometry.md). t runs from 0 to 1
over the clip. salience_j = |p_j|^2: the more a thing stands out, the more it counts as new at another time.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from evoprune.backend import nearest_selected, standard_places, to_device, tube_radii
from evoprune.methods.plans import Grid, spread
from evoprune.methods.types import arange_on

ALPHA = 1.5
DIMENSIONS = 128  # dimensions of the projected features
UNPROJECTED = 512  # up to this number of rows, features are not projected
STEPS = 16384  # distances are rounded to 1 / STEPS, so that equal rows have distance 0 and equal distances are ties
TUBE_UNITS = 256  # approximate number of units in a tube, which spans at most `TUBE_PAIRS` frame pairs
TUBE_PAIRS = 16
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Points:
    """The N units of a video as points, represented by E rows. Distances between them are in whole steps."""

    grid: Grid
    row: torch.Tensor  # int64 [N], the row that represents a unit, or -1
    time: torch.Tensor  # float32 [N], from 0 to 1
    place: torch.Tensor  # float32 [E, d], at most about sqrt(STEPS) long; distances are approximate if projected
    half: torch.Tensor  # float32 [E], half the squared length of `place`
    salience: torch.Tensor  # float32 [E], from 0 to 1; all 0 if all features are equal
    weight: torch.Tensor  # float32 [E], weight of time: alpha / 2 * salience^2, in steps


def points_of(rows: torch.Tensor, unit_to_row: torch.Tensor, grid: Grid, alpha: float) -> Points:
    """Return the points of one video.

    A row counts once for every unit that it represents.

    Args:
        rows, unit_to_row, grid: As in `Tokens`.
        alpha: The weight of time.
    """
    projection = None
    if rows.shape[1] > 4 * DIMENSIONS and len(rows) > UNPROJECTED:  # otherwise projection saves nothing
        projection = to_device(_projection(rows.shape[1]), rows.device)
    place, salience = standard_places(rows, unit_to_row, projection, STEPS)
    place = place * math.sqrt(STEPS)
    time, _, _ = grid_tables(grid, str(unit_to_row.device))
    return Points(grid, unit_to_row, time, place, place.square().sum(1) / 2, salience, STEPS * alpha / 2 * salience**2)


@lru_cache(maxsize=8)
def _projection(width: int) -> torch.Tensor:
    """Return float32 `[width, DIMENSIONS]`: random orthogonal columns that preserve squared lengths to within about an eighth."""
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(normal).Q * math.sqrt(width / DIMENSIONS)


def farthest_points(
    points: Points, keep: int, *, within: float = 0.0, least: int = 1, floor: float = 0.0
) -> torch.Tensor:
    """Return int64 `[K]`, ascending: `keep` units of one video, or as many as it takes until every unit is near a selected one.

    Among units of equal radius, those spread evenly over time and over the frame come first. In a video without differences, such
    as a black one, they are the whole selection.

    Args:
        within: Stop before `keep` once no unit is farther than this from a selected one and `least` are selected; 0 for never. This
            reads the radii, which waits for a GPU.
        floor: Share of its even part of `keep` that every frame pair gets first, before units compete across the video.

    Raises:
        ValueError: `keep` is not between 1 and the number of units.
    """
    units = len(points.row)
    if not 1 <= keep <= units:
        raise ValueError(f"cannot select {keep} of {units} units")
    if keep == units and not within:
        return arange_on(units, points.row.device)
    _, turn, tubes = grid_tables(points.grid, str(points.row.device))
    first = (points.salience * (STEPS / 2)).round_()
    needed = keep
    if floor:  # a frame pair's share may lie beyond the first `keep` units of the clip
        needed = units
    radii = tube_radii(points.place, points.half, points.weight, first, points.row, points.time, tubes, needed)
    if within:
        keep = max(min(least, keep), min(keep, int((radii > within * STEPS).sum())))
    order = torch.add(turn, radii.long(), alpha=units)
    if floor:
        order = _first_of_each_pair(order, points.grid, keep, floor)
    return order.topk(keep).indices.sort().values


def assign_clusters(points: Points, kept: torch.Tensor) -> torch.Tensor:
    """Return int64 `[N]`: for every unit the index in `kept` (from `farthest_points`) of the nearest selected unit.

    A unit without a row gets -1. A selected unit gets itself. Ties go to the lower index.
    """
    return nearest_selected(points.place, points.half, points.weight, points.row, points.time, kept)


def _first_of_each_pair(order: torch.Tensor, grid: Grid, keep: int, floor: float) -> torch.Tensor:
    """Return `order` with a frame pair's first units moved before all others.

    The number of units moved is `floor` times the frame pair's even part of `keep`. `order` is int64 `[N]`, higher first.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    counts = torch.tensor([math.floor(floor * part) for part in spread(keep, pairs)], dtype=torch.int64, device="cpu")
    rank = order.view(pairs, places).argsort(1, descending=True).argsort(1)
    before = (rank < to_device(counts, order.device)[:, None]).flatten() & (order >= 0)
    return torch.where(before, order + (1 << 60), order)


@lru_cache(maxsize=32)
def grid_tables(grid: Grid, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tables that depend only on the grid: times, turns and tubes.

    Returns:
        float32 `[N]`, the time of a unit, from 0 to 1.
        int64 `[N]`, its turn among units of equal radius: a different number from 0 to N - 1 for every unit, higher first.
        int64 `[B, L]`, the units in every tube, ascending, padded with N.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    time = (torch.arange(pairs, dtype=torch.float32, device="cpu") / max(1, pairs - 1)).repeat_interleave(places)
    # Every round takes one place per frame pair. A pair's places are ordered so that any stretch of the order covers the
    # frame evenly, and pairs start far apart in this order.
    far_apart = torch.arange(pairs, dtype=torch.float64, device="cpu") * GOLDEN % 1
    begin = (far_apart * places).long()
    rounds = (_scattered(grid[1], grid[2]) - begin[:, None]) % places
    turn = pairs * places - 1 - (rounds * pairs + far_apart.argsort().argsort()[:, None]).flatten()
    return tuple(to_device(x, torch.device(device)) for x in (time, turn, _tubes(grid)))


def _tubes(grid: Grid) -> torch.Tensor:
    """Return int64 `[B, L]`: the units in every tube, ascending, padded with N.

    Tubes have about the same length along a side of the grid. If the clip is short, they are wider.
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
    """Return int64 `[height * width]`: the order in which a low-discrepancy sequence (Roberts's R2) first visits the places."""
    n = torch.arange(1, 8 * height * width + 1, dtype=torch.float64, device="cpu")
    step = 1.324717957244746
    visits = (n / step % 1 * height).long() * width + (n / step**2 % 1 * width).long()
    first = torch.full((height * width,), len(n), dtype=torch.int64, device="cpu")
    return first.scatter_reduce(0, visits, arange_on(len(n), "cpu"), "amin").argsort(stable=True).argsort()
