"""Torch operators for farthest-point selection and reuse on each device type.

Each operator has a numpy or PyTorch implementation for the CPU, Triton kernels for CUDA (kernels.py), and an implementation with as
few PyTorch operations as possible for other devices. Only the CPU implementations read values back to the host. Distances are
rounded to whole steps, so devices agree even if they sum in different orders, and the distance between equal rows is exactly 0.

Farthest-point selection consists of four operators: compute row coordinates, select the farthest points in each tube, find the
nearest selected point for each point, and average the clusters. A point has a row and a time. The distance between a selected point
i and a point j, in steps, is

    d(i, j) = half[row_i] + half[row_j] - place[row_i] . place[row_j] + weight[row_j] * |time_i - time_j|
"""

from collections.abc import Iterator

import numpy as np
import torch

from evoprune.backend.devices import with_fallback

MAX_DISTANCES = 1 << 23  # number of distances to hold in memory at a time on a CPU
MAX_DISTANCES_ON_DEVICE = 1 << 26
FEW_TUBES = 4  # a CPU processes up to this many tubes one by one
# With at most this many rows, a CPU multiplies all pairs of rows once and looks up the products for its points.
FEW_ROWS = 512
# Number of rows to convert to float32 at a time.
AT_ONCE = 1024
AT_ONCE_ON_DEVICE = 16384
# Fraction of the mean variance to add to each channel's variance, which reduces the influence of nearly constant channels.
VARIANCE_FLOOR = 1e-3
ROUNDING = 1 / 256  # deviations below this fraction of a channel's mean may be rounding errors, so they are damped

# Use the low-level registration API, because `torch.library.custom_op` imports torch's compiler, which takes seconds.
LIBRARY = torch.library.Library("evoprune", "DEF")
LIBRARY.define("standard_places(Tensor rows, Tensor unit_to_row, Tensor? projection, int steps) -> (Tensor, Tensor)")
LIBRARY.define(
    "tube_radii(Tensor place, Tensor half, Tensor weight, Tensor first, Tensor row, Tensor time, Tensor tubes, int keep) -> Tensor"
)
LIBRARY.define(
    "nearest_selected(Tensor place, Tensor half, Tensor weight, Tensor row, Tensor time, Tensor selected) -> Tensor"
)
LIBRARY.define("mean_rows(Tensor rows, Tensor into, Tensor row, Tensor weight, int count) -> Tensor")
standard_places = torch.ops.evoprune.standard_places
tube_radii = torch.ops.evoprune.tube_radii
nearest_selected = torch.ops.evoprune.nearest_selected
mean_rows = torch.ops.evoprune.mean_rows


def _standard_places(
    rows: torch.Tensor, unit_to_row: torch.Tensor, projection: torch.Tensor | None, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the coordinates of rows, which are standardized rows, and the squared norms of these coordinates.

    Args:
        rows: `[E, D]`.
        unit_to_row: int64 `[N]`, each unit's row, or -1 for units without a row. The mean and standard deviation weight each row by
            its number of units.
        projection: float32 `[D, d]`, a matrix that projects the standardized rows to `d` dimensions, or None.
        steps: The number of steps per unit length.

    Returns:
        The coordinates, float32 `[E, d]`, and their squared norms, float32 `[E]`. The coordinates are computed by subtracting the
        mean row, dividing each channel by its standard deviation, and dividing everything by the largest row norm. The squared
        norms are rounded to steps and are 0 for rows without a unit. If all rows are equal, both results are 0.
    """
    count = unit_counts(unit_to_row, len(rows))
    at_once = AT_ONCE_ON_DEVICE if rows.device.type != "cpu" else AT_ONCE
    shares = (count / count.sum()).split(at_once)

    def pieces() -> Iterator[torch.Tensor]:  # converted to float32 a few rows at a time to save memory
        return (part.float() for part in rows.split(at_once))

    first = rows[0].float()  # subtracted before summing, so the sums are exact if all rows are equal
    mean = first + sum(share @ (piece - first) for share, piece in zip(shares, pieces(), strict=True))
    variance = sum(share @ (piece - mean).square_() for share, piece in zip(shares, pieces(), strict=True))
    scale = (variance + VARIANCE_FLOOR * variance.mean() + (ROUNDING * mean).square_()).clamp_(min=1e-30).rsqrt_()
    places = []
    saliences = []
    for piece in pieces():
        standard = (piece - mean).mul_(scale)
        saliences.append(standard.square().sum(1))
        if projection is not None:
            standard = standard @ projection
        places.append(standard)
    place = torch.cat(places)
    salience = torch.cat(saliences)
    largest = (salience * (count > 0)).max().clamp(min=VARIANCE_FLOOR * rows.shape[1])
    return place / largest.sqrt(), rounded(salience / largest, steps) * (count > 0)


def unit_counts(unit_to_row: torch.Tensor, rows: int) -> torch.Tensor:
    """Return the number of units per row, float32 `[rows]`.

    Args:
        unit_to_row: int64 `[N]`, each unit's row, or -1 for a unit without a row.
        rows: The number of rows.
    """
    count = torch.zeros(rows + 1, dtype=torch.float32, device=unit_to_row.device)
    return count.scatter_(0, unit_to_row + 1, 1, reduce="add")[1:]


def rounded(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Round numbers to multiples of `1 / steps`, and clamp negative numbers to 0."""
    return (x * steps).round_().div_(steps).clamp_(min=0)


def _tube_radii(
    place: torch.Tensor,
    half: torch.Tensor,
    weight: torch.Tensor,
    first: torch.Tensor,
    row: torch.Tensor,
    time: torch.Tensor,
    tubes: torch.Tensor,
    keep: int,
) -> torch.Tensor:
    """Greedily select points in each tube, and return each point's radius in whole steps, float32 `[N]`.

    In each tube, selection starts with the point with the largest `first`. Each step then selects the point farthest from all
    previously selected points, and this distance becomes its radius. The first point's radius is its `first`, or one step more than
    the second radius if that is larger. Radii therefore decrease in selection order, so the K largest radii overall belong to the
    first points selected in their tubes. Ties go to the point with the lowest index. Points without a row have a radius of -1.

    Args:
        place: float32 `[E, d]`, each row's coordinates.
        half, weight, first: float32 `[E]`, per-row values in steps. `half` and `weight` are described in the module docstring.
        row: int64 `[N]`, each point's row, or -1 for a point without a row.
        time: float32 `[N]`, each point's time.
        tubes: int64 `[B, L]`, the points in each tube, ascending, padded with N.
        keep: The number of largest radii that the caller needs. The CPU stops once it has found them, so smaller radii may be
            returned as 0.
    """
    index, rows, valid = _members(row, tubes)
    distances = _distances(place, half, weight, rows, time[index])
    near = torch.where(valid, first[rows], -1.0)
    at = torch.arange(len(tubes), dtype=torch.int64, device=row.device)
    place_in = torch.arange(tubes.shape[1], dtype=torch.int64, device=row.device)
    start = near.argmax(1, keepdim=True)
    is_start = place_in == start
    radii = torch.where(is_start, near.clamp(min=0), 0.0)
    near = torch.where(valid & ~is_start, distances[at, start[:, 0]], -1.0)
    second = near.amax(1, keepdim=True)
    radii = torch.where(is_start & (second > 0), torch.maximum(radii, second + 1), radii)
    for _ in range(1, tubes.shape[1]):
        radius, best = near.max(1, keepdim=True)
        is_best = place_in == best
        radii = torch.where(is_best, torch.maximum(radii, radius), radii)
        near = torch.where(is_best, -1.0, torch.minimum(near, distances[at, best[:, 0]]))
    by_point = row.new_full((len(row) + 1,), -1, dtype=torch.float32)
    return by_point.scatter_(0, tubes.flatten(), torch.where(valid, radii, -1.0).flatten())[:-1].clone()


def _members(row: torch.Tensor, tubes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the points in each tube and their rows, int64 `[B, L]`, and a mask, False for padding and points without a row.

    Padding is returned as point 0 and row 0.
    """
    inside = tubes < len(row)
    index = torch.where(inside, tubes, 0)
    rows = row[index]
    return index, rows.clamp(min=0), inside & (rows >= 0)


def _distances(
    place: torch.Tensor, half: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """Return the rounded distances between all pairs of points in each tube, float32 `[B, selected, candidate]`.

    `rows` and `time` contain each point's row (int64) and time (float32), `[B, L]`.
    """
    if rows.device.type == "cpu" and len(place) <= FEW_ROWS:
        product = (place @ place.T)[rows[:, :, None], rows[:, None, :]]
    else:
        there = place[rows]
        product = there @ there.transpose(1, 2)
    distances = (time[:, :, None] - time[:, None, :]).abs_().mul_(weight[rows][:, None, :])
    of = half[rows]
    return distances.sub_(product).add_(of[:, None, :]).add_(of[:, :, None]).round_().clamp_(min=0)


def _tube_radii_cpu(place, half, weight, first, row, time, tubes, keep):
    by_point = torch.full((len(row) + 1,), -1, dtype=torch.float32, device="cpu")
    for batch in tubes.split(max(1, MAX_DISTANCES // tubes.shape[1] ** 2)):
        index, rows, valid = _members(row, batch)
        distances = _distances(place, half, weight, rows, time[index])
        radii = _greedy(distances.numpy(), torch.where(valid, first[rows], -1).numpy(), keep)
        by_point[batch] = torch.where(valid, torch.from_numpy(radii), -1)
    return by_point[:-1].clone()


def _greedy(distances: np.ndarray, first: np.ndarray, keep: int) -> np.ndarray:
    """Return the radii of the points, float32 `[B, L]`, given distances `[B, L, L]` and `first` (`[B, L]`, -1 for padding)."""
    if len(first) > FEW_TUBES:
        return _greedy_together(distances, first, keep)
    return np.stack([_greedy_in_tube(*tube, keep) for tube in zip(distances, first, strict=True)])


def _greedy_in_tube(distances: np.ndarray, first: np.ndarray, keep: int) -> np.ndarray:
    radii = np.zeros_like(first)
    best = int(first.argmax())
    radii[best] = start = max(first[best], 0)
    near = np.where(first < 0, np.float32(-1), distances[best])
    near[best] = -1
    if (second := near.max()) > 0:
        radii[best] = start = max(start, second + 1)
    latest = start
    for selected in range(1, len(near)):
        best = int(near.argmax())
        radius = near[best]
        if not radius > 0 or (
            selected >= keep and radius < latest
        ):  # an equal radius could still win a tie because of its index
            break  # also reached if a distance is NaN, because argmax returns NaN first
        radii[best] = latest = radius
        np.minimum(near, distances[best], out=near)
        near[best] = -1
    return radii


def _greedy_together(distances: np.ndarray, first: np.ndarray, keep: int) -> np.ndarray:
    """Return the same radii as `_greedy`, but process all tubes in parallel, selecting one point per tube at each step."""
    at = np.arange(len(first))
    near = first
    best = near.argmax(1)
    radii = np.zeros_like(first)
    radii[at, best] = near[at, best].clip(0)
    near = np.where(first < 0, np.float32(-1), distances[at, best])
    near[at, best] = -1
    second = near.max(1)
    radii[at, best] = np.where(second > 0, np.maximum(radii[at, best], second + 1), radii[at, best])
    for step in range(1, first.shape[1]):
        best = near.argmax(1)
        radius = near[at, best]
        farthest = radius.max()
        if farthest <= 0 or (step % 8 == 0 and np.count_nonzero(radii > farthest) >= keep):
            break
        radii[at, best] = np.maximum(radii[at, best], radius)
        np.minimum(near, distances[at, best], out=near)
        near[at, best] = -1
    return radii


def _nearest_selected(
    place: torch.Tensor,
    half: torch.Tensor,
    weight: torch.Tensor,
    row: torch.Tensor,
    time: torch.Tensor,
    selected: torch.Tensor,
) -> torch.Tensor:
    """Find the nearest selected point for each point.

    A selected point is always assigned to itself. Ties go to the selected point with the lowest index.

    Args:
        selected: int64 `[K]`, the selected points. For the other arguments, see `_tube_radii`.

    Returns:
        int64 `[N]`, indices into `selected`, or -1 for points without a row.
    """
    of = row[selected]
    rows = row.clamp(min=0)
    there = place[of]
    half_of = half[of]
    when = time[selected]
    nearest = []
    for batch in torch.arange(len(row), dtype=torch.int64, device=row.device).split(
        MAX_DISTANCES_ON_DEVICE // len(selected)
    ):
        own = rows[batch]
        distances = torch.addmm(half_of, place[own], there.T, alpha=-1).add_(half[own][:, None])
        distances.add_((time[batch][:, None] - when).abs_().mul_(weight[own][:, None]))
        nearest.append(distances.round_().clamp_(min=0).argmin(1))
    return _with_selected(torch.cat(nearest), row, selected)


def _with_selected(nearest: torch.Tensor, row: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
    numbers = torch.arange(len(selected), dtype=torch.int64, device=row.device)
    return torch.where(row < 0, -1, nearest).index_copy_(0, selected, numbers)


def _nearest_selected_cpu(place, half, weight, row, time, selected):
    # With reuse, many points share a row, so each product is computed once per row, in batches that fit in the CPU cache.
    rows, back = row[selected].unique(return_inverse=True)
    there = place[rows]
    half_of = half[rows]
    when = time[selected]
    nearest = torch.empty_like(row)
    points = (row >= 0).nonzero()[:, 0]
    for batch in points.split(max(1, (MAX_DISTANCES >> 3) // len(selected))):
        own, of = row[batch].unique(return_inverse=True)
        distances = torch.addmm(half_of, place[own], there.T, alpha=-1).add_(half[own][:, None])[of[:, None], back]
        distances.add_((time[batch][:, None] - when).abs_().mul_(weight[row[batch]][:, None]))
        nearest[batch] = distances.round_().clamp_(min=0).argmin(1)
    return _with_selected(nearest, row, selected)


def _mean_rows(
    rows: torch.Tensor, into: torch.Tensor, row: torch.Tensor, weight: torch.Tensor, count: int
) -> torch.Tensor:
    """Compute weighted means of rows, `[count, D]`. Sums are accumulated in float32, and the means have the dtype of `rows`.

    Args:
        rows: `[E, D]`.
        into, row: int64 `[m]` each. Row `row[k]` contributes to mean `into[k]`.
        weight: float32 `[m]`, the weights of these contributions. The weights of each mean must have a positive sum.
        count: The number of means.
    """
    total = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    size = total.new_zeros(count).index_add_(0, into, weight)
    most = MAX_DISTANCES_ON_DEVICE if rows.device.type != "cpu" else MAX_DISTANCES
    at_once = max(1, most // rows.shape[1])
    for batch in torch.arange(len(into), dtype=torch.int64, device=rows.device).split(at_once):
        total.index_add_(0, into[batch], rows[row[batch]].float() * weight[batch][:, None])
    return (total / size[:, None]).to(rows.dtype)


def _mean_rows_cpu(rows, into, row, weight, count):
    # With reuse, a row can contribute to the same mean many times. Add it only once, using the sum of its weights.
    both, back = (into * len(rows) + row).unique(return_inverse=True)
    weight = weight.new_zeros(len(both)).index_add_(0, back, weight)
    return _mean_rows(rows, both // len(rows), both % len(rows), weight, count)


@with_fallback("the distance of units", _standard_places)
def _standard_places_cuda(rows, unit_to_row, projection, steps):
    from evoprune.backend import kernels  # importing Triton takes a while

    count = unit_counts(unit_to_row, len(rows))
    return kernels.standard_places(rows, count, projection, steps, VARIANCE_FLOOR, ROUNDING)


@with_fallback("the selection of units", _tube_radii)
def _tube_radii_cuda(*args):
    from evoprune.backend import kernels

    return kernels.tube_radii(*args)


@with_fallback("the selection of clusters", _nearest_selected)
def _nearest_selected_cuda(*args):
    from evoprune.backend import kernels

    return kernels.nearest_selected(*args)


@with_fallback("the means of clusters", _mean_rows)
def _mean_rows_cuda(*args):
    from evoprune.backend import kernels

    return kernels.mean_rows(*args)


for _name, _plain, _cpu, _cuda in (
    ("standard_places", _standard_places, _standard_places, _standard_places_cuda),
    ("tube_radii", _tube_radii, _tube_radii_cpu, _tube_radii_cuda),
    ("nearest_selected", _nearest_selected, _nearest_selected_cpu, _nearest_selected_cuda),
    ("mean_rows", _mean_rows, _mean_rows_cpu, _mean_rows_cuda),
):
    LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    LIBRARY.impl(_name, _cpu, "CPU")
    LIBRARY.impl(_name, _cuda, "CUDA")


def snap(score: torch.Tensor) -> torch.Tensor:
    """Round scores to multiples of 1/16384, so the cosines of equal rows are tied even if their last bits differ."""
    return (score * 16384).round() / 16384


# Reuse. For each unit, the operator finds the last frame pair that was encoded at the same position (see vision/patches.py).

# Number of blocks (7x7 or 8x8 pixels) in a unit across both frames, and number of color channels.
BLOCKS = 2 * 4**2
CHANNELS = 3
# Maximum brightness drift, as a factor in either direction, since the references were encoded.
BRIGHTNESS = 1.2

LIBRARY.define(
    "reuse_scan(Tensor means, Tensor held, Tensor pair, bool known, int seen, float threshold) -> (Tensor, Tensor, Tensor)"
)
reuse_scan = torch.ops.evoprune.reuse_scan


def _reuse_scan(
    means: torch.Tensor, held: torch.Tensor, pair: torch.Tensor, known: bool, seen: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For each unit, find the frame pair whose encoded row at the same position can be reused.

    Args:
        means: float32 `[T, units, 96]`, the block means of the next T frame pairs.
        held: float32 `[units, 96]`, the block means of the last encoded unit at each position. Ignored if `known` is False.
        pair: int64 `[units]`, the index of the frame pair last encoded at each position.
        known: Whether `held` and `pair` have been set by earlier frame pairs.
        seen: The number of earlier frame pairs.
        threshold: The minimum difference, in levels out of 255, at which a unit is treated as changed.

    Returns:
        Each unit's frame pair index, int64 `[T, units]`, and the updated values of `held` and `pair`.
    """
    source = torch.empty(means.shape[:2], dtype=torch.int64, device=means.device)
    for t, now in enumerate(means):
        if not known:
            held = now
            changed = torch.ones_like(pair, dtype=torch.bool)
            known = True
        else:
            gain = brightness(now, held)
            changed = differences(now, held * gain) >= threshold
            # If most of the frame has changed, for example because of a cut or camera motion, the measured brightness is
            # meaningless.
            cut = 2 * changed.sum() > len(changed)
            if cut.device.type != "cpu" or cut:
                gain = torch.where(cut, 1.0, gain)
                changed = torch.where(cut, differences(now, held) >= threshold, changed)
            held = torch.where(changed[:, None], now / gain, held)
        pair = torch.where(changed, seen + t, pair)
        source[t] = pair
    return source, held.clone(), pair.clone()


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the largest block color difference in each unit, float32 `[units]`.

    A block's color difference is the Euclidean distance between its mean colors in `means` and `reference`, float32 `[units, 96]`
    each.
    """
    difference = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return difference.square_().sum(2).amax(1).sqrt_()


def brightness(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return each color channel's brightness relative to `reference`, float32 `[96]` (3 values, repeated per block).

    Each value is a median over all units, weighted by brightness. A median ignores changes in less than half of the frame, and the
    weights suppress noise in dark regions.
    """
    now, then = (x.view(len(x), BLOCKS, CHANNELS).mean(1) for x in (means, reference))
    ratio, order = (now / then.clamp(min=1e-3)).sort(0)
    weight = then.gather(0, order).cumsum(0)
    middle = (weight < weight[-1] / 2).sum(0, keepdim=True)
    return ratio.gather(0, middle)[0].clamp(1 / BRIGHTNESS, BRIGHTNESS).repeat(BLOCKS)


@with_fallback("reuse", _reuse_scan)
def _reuse_scan_cuda(*args):
    from evoprune.backend import kernels

    return kernels.reuse_scan(*args, BLOCKS, CHANNELS, BRIGHTNESS)


LIBRARY.impl("reuse_scan", _reuse_scan, "CompositeExplicitAutograd")
LIBRARY.impl("reuse_scan", _reuse_scan_cuda, "CUDA")
