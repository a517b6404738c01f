"""The selection algorithm: farthest-point sampling over features and time within tubes, followed by clustering around selected
units.

A video is divided into *tubes*, each of which consists of neighboring units in several consecutive frame pairs. Inside a tube,
units are picked one by one, and the next unit is always the one farthest from all units picked so far. Its distance to the nearest
of them is its *radius*. Finally, the K units with the largest radii in the whole video are selected. The radii do not depend on K,
and tensor shapes never depend on values. backend/operators.py has an implementation for each type of device. The distance between
two units combines their features and times:

    d(i, j) = |p_i - p_j|^2 / 2 + alpha / 2 * salience_j^2 * |t_i - t_j|

Unit i is already picked and unit j is a candidate. p is the unit's normalized feature: the mean over all units of the clip is
subtracted, every channel is divided by its standard deviation, and all features are divided by the length of the longest one
(results/geometry.md). t runs from 0 to 1 over the clip. salience_j = |p_j|^2, so time differences matter more for objects that
stand out.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from evoprune.backend import nearest_selected, standard_places, to_device, tube_radii
from evoprune.methods.plans import Grid, spread
from evoprune.methods.types import arange_on

ALPHA = 1.5
DIMENSIONS = 128  # number of dimensions of projected features
UNPROJECTED = 512  # features are projected only if there are more rows than this
# Distances are rounded to 1 / STEPS, so that equal rows have distance 0 and equal distances are exact ties.
STEPS = 16384
TUBE_UNITS = 256  # approximate number of units in a tube; a tube spans at most `TUBE_PAIRS` frame pairs
TUBE_PAIRS = 16
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Points:
    """The N units of a video as points in feature space and time, represented by E rows. Distances are integer numbers of steps."""

    grid: Grid
    row: torch.Tensor  # int64 [N], the row that represents each unit, or -1
    time: torch.Tensor  # float32 [N], from 0 to 1
    # float32 [E, d], with a length of at most about sqrt(STEPS); if projected, distances are approximate.
    place: torch.Tensor
    half: torch.Tensor  # float32 [E], half the squared length of `place`
    salience: torch.Tensor  # float32 [E], from 0 to 1; all 0 if all features are equal
    weight: torch.Tensor  # float32 [E], the weight of time: alpha / 2 * salience^2, in steps


def points_of(rows: torch.Tensor, unit_to_row: torch.Tensor, grid: Grid, alpha: float) -> Points:
    """Convert the rows of one video to points for `farthest_points`.

    In the mean and the standard deviations, each row is weighted by the number of units that it represents.

    Args:
        rows: `[E, D]`, the features of the encoded units.
        unit_to_row: int64 `[N]`, the row that represents each unit, or -1.
        alpha: The weight of time in distances.
    """
    projection = None
    if rows.shape[1] > 4 * DIMENSIONS and len(rows) > UNPROJECTED:  # otherwise, projection would save nothing
        projection = to_device(_projection(rows.shape[1]), rows.device)
    place, salience = standard_places(rows, unit_to_row, projection, STEPS)
    place = place * math.sqrt(STEPS)
    time, _, _ = grid_tables(grid, str(unit_to_row.device))
    return Points(grid, unit_to_row, time, place, place.square().sum(1) / 2, salience, STEPS * alpha / 2 * salience**2)


@lru_cache(maxsize=8)
def _projection(width: int) -> torch.Tensor:
    """Return a random projection matrix with orthogonal columns: float32 `[width, DIMENSIONS]`.

    The projection preserves squared lengths to within about an eighth.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    normal = torch.randn(width, DIMENSIONS, generator=generator, dtype=torch.float32, device="cpu")
    return torch.linalg.qr(normal).Q * math.sqrt(width / DIMENSIONS)


def farthest_points(
    points: Points, keep: int, *, within: float = 0.0, least: int = 1, floor: float = 0.0
) -> torch.Tensor:
    """Select `keep` units of one video, or fewer if `within` is set.

    Among units with equal radii, the selection is spread evenly over time and over the frame. In an all-black video, for example,
    all units are equal, so the entire selection is spread evenly.

    Args:
        within: If not 0, stop early once every unit is within this distance of a selected unit and at least `least` units are
            selected. This requires reading the radii back to the host, which synchronizes the GPU.
        least: The minimum number of units to select if `within` is set.
        floor: The fraction of an equal share of `keep` that every frame pair receives before units compete across the video.

    Returns:
        int64 `[K]`, the selected units, ascending.

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
    if floor:  # a frame pair's guaranteed units may rank below the clip's first `keep` units
        needed = units
    radii = tube_radii(points.place, points.half, points.weight, first, points.row, points.time, tubes, needed)
    if within:
        keep = max(min(least, keep), min(keep, int((radii > within * STEPS).sum())))
    order = torch.add(turn, radii.long(), alpha=units)
    if floor:
        order = _first_of_each_pair(order, points.grid, keep, floor)
    return order.topk(keep).indices.sort().values


def assign_clusters(points: Points, kept: torch.Tensor) -> torch.Tensor:
    """Assign each unit to the cluster of its nearest selected unit.

    Args:
        points: The N units of the video, from `points_of`.
        kept: int64 `[K]`, the selected units, from `farthest_points`.

    Returns:
        int64 `[N]`, the index in `kept` of the nearest selected unit. Selected units map to themselves, and units without a row to
        -1. Ties go to the lower index.
    """
    return nearest_selected(points.place, points.half, points.weight, points.row, points.time, kept)


def _first_of_each_pair(order: torch.Tensor, grid: Grid, keep: int, floor: float) -> torch.Tensor:
    """Move each frame pair's highest-ranked units ahead of all other units, so that each frame pair keeps some units.

    Args:
        order: int64 `[N]`, each unit's rank. Units with higher values are selected first.
        floor: The number of units to move in each frame pair, as a fraction of an equal share of `keep`.

    Returns:
        int64 `[N]`, the new ranks.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    counts = torch.tensor([math.floor(floor * part) for part in spread(keep, pairs)], dtype=torch.int64, device="cpu")
    rank = order.view(pairs, places).argsort(1, descending=True).argsort(1)
    before = (rank < to_device(counts, order.device)[:, None]).flatten() & (order >= 0)
    return torch.where(before, order + (1 << 60), order)


@lru_cache(maxsize=32)
def grid_tables(grid: Grid, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the sampling algorithm's lookup tables, which depend only on the grid, not on the features.

    Returns:
        Times, float32 `[N]`: each unit's timestamp, from 0 to 1. Turns, int64 `[N]`: a distinct number from 0 to N - 1 for each
        unit. Among units with equal radii, the unit with the highest turn is selected first. Tubes, int64 `[B, L]`: the units in
        each of B tubes, ascending, padded with N.
    """
    pairs = grid[0]
    places = grid[1] * grid[2]
    time = (torch.arange(pairs, dtype=torch.float32, device="cpu") / max(1, pairs - 1)).repeat_interleave(places)
    # Every round takes one position per frame pair. A frame pair's positions are ordered so that any contiguous part of the order
    # covers the frame evenly. Different frame pairs start at distant points in this order.
    far_apart = torch.arange(pairs, dtype=torch.float64, device="cpu") * GOLDEN % 1
    begin = (far_apart * places).long()
    rounds = (_scattered(grid[1], grid[2]) - begin[:, None]) % places
    turn = pairs * places - 1 - (rounds * pairs + far_apart.argsort().argsort()[:, None]).flatten()
    return tuple(to_device(x, torch.device(device)) for x in (time, turn, _tubes(grid)))


def _tubes(grid: Grid) -> torch.Tensor:
    """Divide the units of a video into tubes: int64 `[B, L]`, the units in each tube, ascending, padded with N.

    All tubes of a video contain approximately the same number of units. In a short clip, tubes span fewer frame pairs and therefore
    cover a larger area of the frame.
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
    """Rank a frame's positions by when a low-discrepancy sequence (Roberts's R2) first visits them: int64 `[height * width]`."""
    n = torch.arange(1, 8 * height * width + 1, dtype=torch.float64, device="cpu")
    step = 1.324717957244746
    visits = (n / step % 1 * height).long() * width + (n / step**2 % 1 * width).long()
    first = torch.full((height * width,), len(n), dtype=torch.int64, device="cpu")
    return first.scatter_reduce(0, visits, arange_on(len(n), "cpu"), "amin").argsort(stable=True).argsort()
