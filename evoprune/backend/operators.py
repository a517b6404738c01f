"""Operators with an implementation per kind of device, for selection, greedy selection by cosine, and reuse.

Each operator has one contract and several implementations: numpy or PyTorch on a CPU, Triton kernels on CUDA (kernels.py), and a
few PyTorch operations elsewhere. Implementations for devices other than the CPU read no values. Distances are whole numbers of
steps, so that devices with different summation orders agree, and equal rows are at distance 0.

The operators for selection compute places of rows, farthest points inside tubes, the nearest selected point for every point, and
means of clusters. A point j has a row and a time. Its distance to a selected point i is, in steps,

    d(i, j) = half[row_i] + half[row_j] - place[row_i] . place[row_j] + weight[row_j] * |time_i - time_j|
"""

from collections.abc import Iterator

import numpy as np
import torch

from evoprune.backend.devices import with_fallback

MAX_DISTANCES = 1 << 23  # number of distances that a CPU holds at a time
MAX_DISTANCES_ON_DEVICE = 1 << 26
FEW_TUBES = 4  # up to this number, a CPU processes tubes one by one
FEW_ROWS = 512  # up to this number, a CPU computes the products between rows once, for all points
# number of rows that have float32 copies at a time
AT_ONCE = 1024
AT_ONCE_ON_DEVICE = 16384
VARIANCE_FLOOR = 1e-3  # share of the mean variance, added to every channel, so that nearly constant channels count less
ROUNDING = 1 / 256  # share of a channel's mean; deviations this small may be rounding errors, so they count little

# Operators are registered with the low-level API, because `torch.library.custom_op` imports torch's compiler, which takes seconds.
_LIBRARY = torch.library.Library("evoprune", "DEF")
_LIBRARY.define("standard_places(Tensor rows, Tensor unit_to_row, Tensor? projection, int steps) -> (Tensor, Tensor)")
_LIBRARY.define(
    "tube_radii(Tensor place, Tensor half, Tensor weight, Tensor first, Tensor row, Tensor time, Tensor tubes, int keep) -> Tensor"
)
_LIBRARY.define(
    "nearest_selected(Tensor place, Tensor half, Tensor weight, Tensor row, Tensor time, Tensor selected) -> Tensor"
)
_LIBRARY.define("mean_rows(Tensor rows, Tensor into, Tensor row, Tensor weight, int count) -> Tensor")
standard_places = torch.ops.evoprune.standard_places
tube_radii = torch.ops.evoprune.tube_radii
nearest_selected = torch.ops.evoprune.nearest_selected
mean_rows = torch.ops.evoprune.mean_rows


def _standard_places(
    rows: torch.Tensor, unit_to_row: torch.Tensor, projection: torch.Tensor | None, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standardized places of rows, and their squared lengths.

    Args:
        rows: `[E, D]`.
        unit_to_row: int64 `[N]`, the row per unit, or -1. A row counts once per unit in the mean and the deviation.
        projection: float32 `[D, d]`, applied to the places, or None.
        steps: number of steps in a length of 1.

    Returns:
        Float32 `[E, d]`: rows minus their mean, divided by the standard deviation per channel and by the length of the longest row.
        And float32 `[E]`: squared lengths, rounded to steps; 0 for a row without a unit. If all rows are equal, both are 0.
    """
    count = unit_counts(unit_to_row, len(rows))
    at_once = AT_ONCE_ON_DEVICE if rows.device.type != "cpu" else AT_ONCE
    shares = (count / count.sum()).split(at_once)

    def pieces() -> Iterator[torch.Tensor]:  # float32, a few rows at a time to save memory
        return (part.float() for part in rows.split(at_once))

    first = rows[0].float()  # subtracted first, so that sums are exact if all rows are equal
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
    """Return the number of units per row, float32 `[rows]`. `unit_to_row` is int64 `[N]`, with -1 for no row."""
    count = torch.zeros(rows + 1, dtype=torch.float32, device=unit_to_row.device)
    return count.scatter_(0, unit_to_row + 1, 1, reduce="add")[1:]


def rounded(x: torch.Tensor, steps: int) -> torch.Tensor:
    """Round numbers to whole steps."""
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
    """Return the radius of each point in whole steps, float32 `[N]`; -1 for a point without a row.

    In each tube, points are selected one after another, always the point farthest from the selected ones. That distance is its
    radius. The point with the largest `first` is selected first. Its radius is `first`, or one step more than the second radius if
    that is larger. So radii decrease in the order of selection, and the K points with the largest radii overall are, in each tube,
    the first ones selected. Ties go to the lower index.

    Args:
        place: float32 `[E, d]`, by row.
        half, weight, first: float32 `[E]`, by row, in steps.
        row: int64 `[N]`, the row per point, or -1.
        time: float32 `[N]`, the time per point.
        tubes: int64 `[B, L]`, the points per tube, ascending; N is padding.
        keep: only the `keep` largest radii are needed. The CPU stops early, and the other radii may be 0.
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
    """Return the points and rows of tube members, int64 `[B, L]`, with 0 for padding, and a bool mask that is true for members."""
    inside = tubes < len(row)
    index = torch.where(inside, tubes, 0)
    rows = row[index]
    return index, rows.clamp(min=0), inside & (rows >= 0)


def _distances(
    place: torch.Tensor, half: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor, time: torch.Tensor
) -> torch.Tensor:
    """Return rounded distances between points, float32 `[B, selected, candidate]`, from their `rows` (int64 `[B, L]`) and times."""
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
    """Return the radii, float32 `[B, L]`, from distances `[B, L, L]` and `first` (`[B, L]`, -1 for padding)."""
    if len(first) > FEW_TUBES:
        return _greedy_together(distances, first, keep)
    return np.stack([_greedy_in_tube(*tube, keep) for tube in zip(distances, first, strict=True)])


def _greedy_in_tube(distances: np.ndarray, first: np.ndarray, keep: int) -> np.ndarray:
    """Return the radii in one tube, `[L]`."""
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
        if not radius > 0 or (selected >= keep and radius < latest):  # equal radii may still win ties by their index
            break  # NaN also stops the loop, because argmax finds it first
        radii[best] = latest = radius
        np.minimum(near, distances[best], out=near)
        near[best] = -1
    return radii


def _greedy_together(distances: np.ndarray, first: np.ndarray, keep: int) -> np.ndarray:
    """Return the same as `_greedy`, advancing all tubes one step at a time."""
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
    """Return int64 `[N]`: for each point, the index in `selected` of the nearest selected point, or -1 for a point without a row.

    A selected point is its own nearest. Ties go to the lower index. See `_tube_radii` for the other arguments.

    Args:
        selected: int64 `[K]`, points.
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
    # With reuse, many points share a row, so products are computed once per row, in pieces that stay in the cache.
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
    """Return weighted means of rows, `[count, D]`, summed in float32 and returned in the dtype of `rows`.

    Args:
        rows: `[E, D]`.
        into, row: int64 `[m]`, a mean and a row that joins it.
        weight: float32 `[m]`, the weight of the row; for every mean the sum is above 0.
        count: number of means.
    """
    total = torch.zeros(count, rows.shape[1], dtype=torch.float32, device=rows.device)
    size = total.new_zeros(count).index_add_(0, into, weight)
    most = MAX_DISTANCES_ON_DEVICE if rows.device.type != "cpu" else MAX_DISTANCES
    at_once = max(1, most // rows.shape[1])
    for batch in torch.arange(len(into), dtype=torch.int64, device=rows.device).split(at_once):
        total.index_add_(0, into[batch], rows[row[batch]].float() * weight[batch][:, None])
    return (total / size[:, None]).to(rows.dtype)


def _mean_rows_cpu(rows, into, row, weight, count):
    # With reuse, a row joins the same mean many times. Add it once, with the sum of its weights.
    both, back = (into * len(rows) + row).unique(return_inverse=True)
    weight = weight.new_zeros(len(both)).index_add_(0, back, weight)
    return _mean_rows(rows, both // len(rows), both % len(rows), weight, count)


@with_fallback("the distance of units", _standard_places)
def _standard_places_cuda(rows, unit_to_row, projection, steps):
    from evoprune.backend import kernels  # Triton takes a while to import

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
    _LIBRARY.impl(_name, _plain, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _cpu, "CPU")
    _LIBRARY.impl(_name, _cuda, "CUDA")


# Greedy selections by cosine: rows are selected one after another, each as different from the selected ones as possible.

BLOCK = 512  # number of rows of the pairwise matrix held at a time
MOST_ROWS = 1 << 15  # the kernel handles at most this many rows; it holds all cosines as 16-bit numbers, up to 2 GiB

_LIBRARY.define(
    "greedy_cosine(Tensor unit, Tensor? weight, Tensor? bonus, float factor, int keep, bool from_nearest) -> Tensor"
)
greedy_cosine = torch.ops.evoprune.greedy_cosine


def snap(score: torch.Tensor) -> torch.Tensor:
    """Round scores to multiples of 1/16384, so that cosines of equal rows, which differ in the last bits, become ties."""
    return (score * 16384).round() / 16384


def _greedy_cosine(
    unit: torch.Tensor,
    weight: torch.Tensor | None,
    bonus: torch.Tensor | None,
    factor: float,
    keep: int,
    from_nearest: bool,
) -> torch.Tensor:
    """Return the selected rows of `unit`, int64 `[keep]`, ascending. In each step, the row with the highest score is selected.

    The score of a row depends on `near`, its largest cosine to the selected rows. Cosines are rounded. Ties go to the lower index.

    Args:
        unit: float32 `[N, D]`, rows of length one.
        weight: float `[N]`, at least 0. The score is (1 - near) * weight, rounded. None means 1.
        bonus: float32 `[N]`, or None. The score is bonus - factor * near, rounded; `weight` must be None.
        factor: used with `bonus`.
        keep: number of rows to select.
        from_nearest: whether `near` starts as the cosine to the nearest other row, instead of 0.
    """
    near = unit.new_zeros(len(unit))
    if from_nearest and keep:
        near = nearest_cosine(unit)
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(keep):
        if bonus is not None:
            score = snap(bonus - factor * near)
        else:
            score = 1 - near.clamp(min=-1)
            if weight is not None:
                score = snap(score * weight)
        latest = score.masked_fill(selected, -torch.inf).argmax()[None]
        selected.index_fill_(0, latest, True)  # selected[latest] would synchronize a GPU
        cosine = snap(unit @ unit.index_select(0, latest)[0])
        near = torch.maximum(near, cosine) if step else cosine
    return selected.logical_not().argsort(stable=True)[:keep].clone()


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """Return the cosine between each row of `unit` (`[N, D]`, of length one) and its most similar other row, float32 `[N]`.

    The cosine is -inf if there is only one row.
    """
    best = []
    for start in range(0, len(unit), BLOCK):
        cosine = snap(unit[start : start + BLOCK] @ unit.T)
        cosine.diagonal(start).fill_(-torch.inf)
        best.append(cosine.amax(1))
    return torch.cat(best)


@with_fallback("the selection by cosine", _greedy_cosine)
def _greedy_cosine_cuda(unit, weight, bonus, factor, keep, from_nearest):
    if not 0 < keep <= len(unit) <= MOST_ROWS:
        return _greedy_cosine(unit, weight, bonus, factor, keep, from_nearest)
    from evoprune.backend import kernels  # Triton takes a while to import

    return kernels.greedy_cosine(unit, weight, bonus, factor, keep, from_nearest)


_LIBRARY.impl("greedy_cosine", _greedy_cosine, "CompositeExplicitAutograd")
_LIBRARY.impl("greedy_cosine", _greedy_cosine_cuda, "CUDA")


# Reuse: find the frame pair that was last encoded at the place of a unit (see vision/preprocess.py).

# number of blocks (7x7 or 8x8 pixels) of a unit in both frames, and number of colors
BLOCKS = 2 * 4**2
CHANNELS = 3
# Largest drift of brightness since the references were encoded, as a factor up or down.
BRIGHTNESS = 1.2

_LIBRARY.define(
    "reuse_scan(Tensor means, Tensor held, Tensor pair, bool known, int seen, float threshold) -> (Tensor, Tensor, Tensor)"
)
reuse_scan = torch.ops.evoprune.reuse_scan


def _reuse_scan(
    means: torch.Tensor, held: torch.Tensor, pair: torch.Tensor, known: bool, seen: int, threshold: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the frame pair whose row represents each unit, int64 `[T, units]`, and `held` and `pair` after these frame pairs.

    Args:
        means: float32 `[T, units, 96]`, block means of the next frame pairs.
        held: float32 `[units, 96]`, block means at each place when it was last encoded; ignored if not `known`.
        pair: int64 `[units]`, when each place was last encoded, as the index of a frame pair.
        known: whether `held` and `pair` have values.
        seen: number of earlier frame pairs.
        threshold: smallest difference of a changed unit, in levels of 255.
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
            # If most of the picture has changed (a cut, or a moving camera), the measured brightness means nothing.
            cut = 2 * changed.sum() > len(changed)
            if cut.device.type != "cpu" or cut:
                gain = torch.where(cut, 1.0, gain)
                changed = torch.where(cut, differences(now, held) >= threshold, changed)
            held = torch.where(changed[:, None], now / gain, held)
        pair = torch.where(changed, seen + t, pair)
        source[t] = pair
    return source, held.clone(), pair.clone()


def differences(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the largest block difference per unit, float32 `[units]`, from float32 `[units, 96]`. It is Euclidean over colors."""
    difference = (means - reference).view(len(means), BLOCKS, CHANNELS)
    return difference.square_().sum(2).amax(1).sqrt_()


def brightness(means: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return how much brighter the picture is than its references, float32 `[96]`: a factor per color, repeated for all blocks.

    The median over units, weighted by brightness, ignores changes in less than half of the picture, and noise in dark regions.
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


_LIBRARY.impl("reuse_scan", _reuse_scan, "CompositeExplicitAutograd")
_LIBRARY.impl("reuse_scan", _reuse_scan_cuda, "CUDA")
