"""Triton kernels for the operators in operators.py, for decoder layers, and for the vision tower's attention.

Triton is installed along with CUDA builds of PyTorch. Because importing Triton takes a while, this module is imported only on
devices that run kernels. Each kernel computes the same result as the plain PyTorch fallback next to its caller, even in Triton's
interpreter.
"""

import struct

import torch
import triton
import triton.language as tl

from evoprune.backend import devices
from evoprune.backend.attention import Attention
from evoprune.backend.devices import on_its_device


def give_up(problem: Exception) -> None:
    """Stop using fused kernels in decoder layers and issue a warning.

    If `problem` is an out-of-memory error, re-raise it instead.
    """
    devices.give_up("layers", "layers compute without fused kernels", problem)


# Farthest-point selection. The matrix products between these kernels run in cuBLAS.

SIDE = 64  # side length of a distance block, in points
# Number of rows in a feature block.
ROWS = 32
CHANNELS = 64
# Arguments whose values vary between videos. They are excluded from specialization; otherwise, Triton would compile a separate
# kernel for values divisible by 16.
SIZES = ["points", "length", "count", "begin"]


def _given(x: torch.Tensor | None, instead: torch.Tensor) -> torch.Tensor:
    """Return `x`, or the placeholder `instead` if `x` is None, because kernel arguments must be tensors."""
    return instead if x is None else x


@triton.jit(do_not_specialize=["length"])
def _moments(rows, count, mean, variance, length, width, block_rows: tl.constexpr, block: tl.constexpr):
    """Compute the mean and variance of a channel block over all rows, weighting each row by its `count`."""
    c = tl.program_id(0) * block + tl.arange(0, block)
    inside = c < width
    first = tl.load(rows + c, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros((block,), tl.float32)
    size = 0.0
    for start in range(0, length, block_rows):
        r = start + tl.arange(0, block_rows)
        n = tl.load(count + r, mask=r < length, other=0.0)
        at = rows + r.to(tl.int64)[:, None] * width + c[None, :]
        x = tl.load(at, mask=(r < length)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(n[:, None] * (x - first[None, :]), 0)
        size += tl.sum(n, 0)
    middle = first + total / size
    total = tl.zeros((block,), tl.float32)
    for start in range(0, length, block_rows):
        r = start + tl.arange(0, block_rows)
        n = tl.load(count + r, mask=r < length, other=0.0)
        at = rows + r.to(tl.int64)[:, None] * width + c[None, :]
        x = tl.load(at, mask=(r < length)[:, None] & inside[None, :], other=0.0).to(tl.float32)
        total += tl.sum(n[:, None] * (x - middle[None, :]) * (x - middle[None, :]), 0)
    tl.store(mean + c, middle, mask=inside)
    tl.store(variance + c, total / size, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _standardise(
    rows, mean, variance, average, place, squares, length, still, rounding,
    width: tl.constexpr, block_rows: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Standardize a block of rows and compute the squared norms of the results.

    Standardizing a channel means subtracting its mean and dividing by its standard deviation.
    """
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    floor = still * tl.load(average)
    total = tl.zeros((block_rows,), tl.float32)
    for start in range(0, width, block):
        c = start + tl.arange(0, block)
        middle = tl.load(mean + c, mask=c < width, other=0.0)
        off = rounding * middle
        scale = tl.rsqrt(tl.maximum(tl.load(variance + c, mask=c < width, other=1.0) + floor + off * off, 1e-30))
        at = r.to(tl.int64)[:, None] * width + c[None, :]
        mask = (r < length)[:, None] & (c < width)[None, :]
        x = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, (x - middle[None, :]) * scale[None, :], 0.0)
        total += tl.sum(x * x, 1)
        tl.store(place + at, x, mask=mask)
    tl.store(squares + r, total, mask=r < length)


@triton.jit
def _distances(product, half, weight, row_i, row_j, time_i, time_j, valid_i, valid_j):
    """Return the rounded distances `[i, j]` between selected points i and candidates j, given the dot products of coordinates."""
    half_i = tl.load(half + row_i, mask=valid_i, other=0.0)
    half_j = tl.load(half + row_j, mask=valid_j, other=0.0)
    weight_j = tl.load(weight + row_j, mask=valid_j, other=0.0)
    apart = half_i[:, None] + half_j[None, :] - product + weight_j[None, :] * tl.abs(time_i[:, None] - time_j[None, :])
    even = (apart + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to even, as torch does
    return tl.maximum(tl.where(apart < 4194304.0, even, apart), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _tube_distances(product, half, weight, row, time, tubes, points, length, side: tl.constexpr):
    """Convert the dot products between all points in a tube to distances, in place."""
    tube = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * side + tl.arange(0, side)
    j = tl.program_id(2) * side + tl.arange(0, side)
    point_i = tl.load(tubes + tube * length + i, mask=i < length, other=points)
    point_j = tl.load(tubes + tube * length + j, mask=j < length, other=points)
    row_i = tl.load(row + point_i, mask=point_i < points, other=-1)
    row_j = tl.load(row + point_j, mask=point_j < points, other=-1)
    time_i = tl.load(time + point_i, mask=point_i < points, other=0.0)
    time_j = tl.load(time + point_j, mask=point_j < points, other=0.0)
    at = product + tube * length * length + i[:, None] * length + j[None, :]
    inside = (i < length)[:, None] & (j < length)[None, :]
    products = tl.load(at, mask=inside, other=0.0)
    tl.store(at, _distances(products, half, weight, row_i, row_j, time_i, time_j, row_i >= 0, row_j >= 0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _greedy(apart, first, row, tubes, out, points, length, block: tl.constexpr):
    """Greedily select points in a tube by distance, and write their radii."""
    tube = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    point = tl.load(tubes + tube * length + i, mask=i < length, other=points)
    own_row = tl.load(row + point, mask=point < points, other=-1)
    valid = own_row >= 0
    near = tl.load(first + own_row, mask=valid, other=-1.0)
    apart += tube * length * length
    radius, start = tl.max(near, 0, return_indices=True)
    radii = tl.where(i == start, tl.maximum(radius, 0.0), 0.0)
    near = tl.where(valid & (i != start), tl.load(apart + start * length + i, mask=i < length, other=-1.0), -1.0)
    second = tl.max(near, 0)
    radii = tl.where(i == start, tl.maximum(radii, tl.where(second > 0, second + 1, 0.0)), radii)
    for _ in range(1, block):
        radius, best = tl.max(near, 0, return_indices=True)
        radii = tl.where(i == best, tl.maximum(radii, radius), radii)
        to_best = tl.load(apart + best * length + i, mask=i < length, other=-1.0)
        near = tl.where(i == best, -1.0, tl.minimum(near, to_best))
    tl.store(out + point, tl.where(valid, radii, -1.0), mask=point < points)


@triton.jit(do_not_specialize=SIZES)
def _nearest(product, half, weight, row, time, selected, out, begin, points, count, side: tl.constexpr):
    """Find the nearest selected point for each point from `begin` to `points`, given the dot products `[point, selected]`."""
    number = tl.program_id(0) * side + tl.arange(0, side)
    point = begin + number
    own_row = tl.load(row + point, mask=point < points, other=-1)
    when = tl.load(time + point, mask=point < points, other=0.0)
    min_distance = tl.full((side,), float("inf"), tl.float32)
    nearest_index = tl.zeros((side,), tl.int64)
    for start in range(0, count, side):
        k = start + tl.arange(0, side)
        point_k = tl.load(selected + k, mask=k < count, other=0)
        row_k = tl.load(row + point_k, mask=k < count, other=-1)
        time_k = tl.load(time + point_k, mask=k < count, other=0.0)
        at = product + number.to(tl.int64)[:, None] * count + k[None, :]
        of = tl.trans(tl.load(at, mask=(point < points)[:, None] & (k < count)[None, :], other=0.0))
        apart = _distances(of, half, weight, row_k, own_row, time_k, when, k < count, own_row >= 0)
        apart = tl.where((k < count)[:, None], apart, float("inf"))
        nearest, which = tl.min(apart, 0, return_indices=True)
        nearest_index = tl.where(nearest < min_distance, which + start, nearest_index)
        min_distance = tl.minimum(nearest, min_distance)
    tl.store(out + point, tl.where(own_row >= 0, nearest_index, -1), mask=point < points)


@triton.jit
def _means(rows, order, row, weight, ends, out, width: tl.constexpr, block: tl.constexpr):
    """Compute a column block of one weighted mean. Rows are added in ascending order so that the sum is reproducible."""
    mean = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    total = tl.zeros((block,), tl.float32)
    size = 0.0
    for i in range(tl.load(ends + mean), tl.load(ends + mean + 1)):
        member = tl.load(order + i)
        w = tl.load(weight + member)
        total += w * tl.load(rows + tl.load(row + member) * width + at, mask=at < width, other=0.0).to(tl.float32)
        size += w
    tl.store(out + mean * width + at, (total / size).to(out.dtype.element_ty), mask=at < width)


@on_its_device
def standard_places(rows, count, projection, steps, still, rounding):
    rows = rows.contiguous()
    length, width = rows.shape
    mean, variance = (torch.empty(width, dtype=torch.float32, device=rows.device) for _ in range(2))
    _moments[triton.cdiv(width, CHANNELS),](rows, count, mean, variance, length, width, block_rows=ROWS, block=CHANNELS)
    place = torch.empty_like(rows, dtype=torch.float32)
    squares = torch.empty_like(count)
    _standardise[triton.cdiv(length, ROWS),](
        rows, mean, variance, variance.mean(), place, squares, length, still, rounding,
        width=width, block_rows=ROWS, block=CHANNELS,
    )  # fmt: skip
    if projection is not None:
        place = place @ projection
    squares = torch.where(count > 0, squares, 0)
    largest = squares.max().clamp(min=still * width)
    return place / largest.sqrt(), (squares / largest * steps).round_().div_(steps)


@on_its_device
def tube_radii(place, half, weight, first, row, time, tubes, keep):
    count, length = tubes.shape
    points = len(row)
    there = place[row[tubes.clamp(max=points - 1)].clamp(min=0)]
    apart = torch.bmm(there, there.transpose(1, 2))
    blocks = triton.cdiv(length, SIDE)
    _tube_distances[count, blocks, blocks](apart, half, weight, row, time, tubes, points, length, side=SIDE)
    # Nearly all grids share one block size, because each block size requires compiling another kernel.
    radii = torch.empty_like(row, dtype=torch.float32)
    block = max(256, triton.next_power_of_2(length))
    _greedy[count,](apart, first, row, tubes, radii, points, length, block=block, num_warps=4)
    return radii


@on_its_device
def nearest_selected(place, half, weight, row, time, selected, held=1 << 26):
    nearest = torch.empty_like(row)
    selected = selected.contiguous()
    points = len(row)
    count = len(selected)
    there = place[row[selected]].T
    rows = row.clamp(min=0)
    step = max(1, held // count)  # number of points whose products are held in memory at a time
    for begin in range(0, points, step):
        end = min(begin + step, points)
        product = place[rows[begin:end]] @ there
        grid = (triton.cdiv(end - begin, SIDE),)
        _nearest[grid](product, half, weight, row, time, selected, nearest, begin, end, count, side=SIDE)
    return nearest.index_copy_(0, selected, torch.arange(count, dtype=torch.int64, device=row.device))


@on_its_device
def mean_rows(rows, into, row, weight, count):
    rows = rows.contiguous()
    width = rows.shape[1]
    sorted_, order = into.sort(stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(count + 1, dtype=torch.int64, device=into.device))
    means = rows.new_empty(count, width)
    block = min(1024, triton.next_power_of_2(width))
    grid = count, triton.cdiv(width, block)
    _means[grid](rows, order, row, weight, ends, means, width=width, block=block)
    return means


# Greedy selection by cosine similarity. A single program selects all rows, using a precomputed pairwise cosine matrix.

COSINES_HELD = 1 << 26  # number of float32 cosines to hold in memory at a time


@triton.jit
def _snap(x):
    even = (x * 16384 + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to even, as torch does
    return even / 16384


@triton.jit
def _greedy_cosine(
    cosines, nearest, value, order, rows, keep, factor,
    weighted: tl.constexpr, with_bonus: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    i = tl.arange(0, block)
    inside = i < rows
    near = tl.load(nearest + i, mask=inside, other=0.0)
    value_of = tl.load(value + i, mask=inside, other=0.0)
    gone = tl.where(inside, 0, 1)
    for step in range(0, keep):
        if with_bonus:
            score = _snap(value_of - factor * near)
        else:
            score = 1 - tl.maximum(near, -1.0)
            if weighted:
                score = _snap(score * value_of)
        _, best = tl.max(tl.where(gone > 0, float("-inf"), score), 0, return_indices=True)
        tl.store(order + step, best)
        gone = tl.where(i == best, 1, gone)
        cosine = tl.load(cosines + best.to(tl.int64) * rows + i, mask=inside, other=0).to(tl.float32) / 16384
        near = tl.where(step > 0, tl.maximum(near, cosine), cosine)


@on_its_device
def greedy_cosine(unit, weight, bonus, factor, keep, from_nearest):
    rows = len(unit)
    cosines = torch.empty(rows, rows, dtype=torch.int16, device=unit.device)
    nearest = unit.new_zeros(rows)
    at_once = max(1, COSINES_HELD // rows)
    for start in range(0, rows, at_once):
        part = slice(start, start + at_once)
        steps = (unit[part] @ unit.T).mul_(16384).round_()
        cosines[part] = steps
        if from_nearest:
            steps.diagonal(start).fill_(-torch.inf)
            nearest[part] = steps.amax(1) / 16384
    value = _given(bonus, _given(weight, nearest))
    order = torch.empty(keep, dtype=torch.int64, device=unit.device)
    block = triton.next_power_of_2(rows)
    _greedy_cosine[1,](
        cosines, nearest, value.float().contiguous(), order, rows, keep, factor,
        weighted=weight is not None, with_bonus=bonus is not None, block=block, num_warps=max(1, min(32, block // 128)),
    )  # fmt: skip
    return order.sort().values


# Reuse. A single program loops over all frame pairs.


def _bits(x: float) -> int:
    """Return a positive float32's bit pattern as an integer. These integers sort in the same order as the floats."""
    return struct.unpack("<i", struct.pack("<f", x))[0]


@triton.jit
def _gain(now, then, inside, low: tl.constexpr, high: tl.constexpr, halvings: tl.constexpr):
    """Return the weighted median of the ratios `now / then`, with `then` as the weights.

    The median is found by bisection between `low` and `high`, both given as float bit patterns.
    """
    ratio = tl.where(inside, now / tl.maximum(then, 1e-3), float("inf"))
    bits = ratio.to(tl.int32, bitcast=True)
    min_bits = tl.min(bits, 0)
    half = tl.sum(then, 0) / 2
    a = tl.min(bits, 0) * 0 + low
    b = tl.min(bits, 0) * 0 + high
    for _ in range(halvings):
        middle = (a + b) // 2
        weight = tl.sum(tl.where(bits <= middle, then, 0.0), 0)
        enough = tl.where(weight >= half, 1, 0) * tl.where(min_bits <= middle, 1, 0)
        b = tl.where(enough > 0, middle, b)
        a = tl.where(enough > 0, a, middle + 1)
    return b.to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["pairs", "units", "seen", "known", "threshold"])
def _scan(
    means, now_mean, held, held_mean, pair, source, pairs, units, seen, known, threshold,
    low: tl.constexpr, high: tl.constexpr, halvings: tl.constexpr, blocks: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    u = tl.arange(0, block)
    inside = u < units
    latest = tl.load(pair + u, mask=inside, other=0)
    then_0 = tl.load(held_mean + u, mask=inside, other=0.0)
    then_1 = tl.load(held_mean + units + u, mask=inside, other=0.0)
    then_2 = tl.load(held_mean + 2 * units + u, mask=inside, other=0.0)
    for t in range(0, pairs):
        at = now_mean + t * 3 * units + u
        now_0 = tl.load(at, mask=inside, other=0.0)
        now_1 = tl.load(at + units, mask=inside, other=0.0)
        now_2 = tl.load(at + 2 * units, mask=inside, other=0.0)
        gain_0 = _gain(now_0, then_0, inside, low, high, halvings)
        gain_1 = _gain(now_1, then_1, inside, low, high, halvings)
        gain_2 = _gain(now_2, then_2, inside, low, high, halvings)
        here = means + t * 3 * blocks * units + u
        adjusted = tl.zeros((block,), tl.float32)
        plain = tl.zeros((block,), tl.float32)
        for b in range(blocks):
            n_0 = tl.load(here + (3 * b) * units, mask=inside, other=0.0)
            n_1 = tl.load(here + (3 * b + 1) * units, mask=inside, other=0.0)
            n_2 = tl.load(here + (3 * b + 2) * units, mask=inside, other=0.0)
            h_0 = tl.load(held + u + (3 * b) * units, mask=inside, other=0.0)
            h_1 = tl.load(held + u + (3 * b + 1) * units, mask=inside, other=0.0)
            h_2 = tl.load(held + u + (3 * b + 2) * units, mask=inside, other=0.0)
            d_0 = n_0 - h_0 * gain_0
            d_1 = n_1 - h_1 * gain_1
            d_2 = n_2 - h_2 * gain_2
            adjusted = tl.maximum(adjusted, d_0 * d_0 + d_1 * d_1 + d_2 * d_2)
            d_0 = n_0 - h_0
            d_1 = n_1 - h_1
            d_2 = n_2 - h_2
            plain = tl.maximum(plain, d_0 * d_0 + d_1 * d_1 + d_2 * d_2)
        changed = tl.where(tl.sqrt(adjusted) >= threshold, 1, 0)
        cut = tl.where(2 * tl.sum(tl.where(inside, changed, 0), 0) > units, 1, 0)
        begins = tl.where(t + known == 0, 1, 0)
        changed = tl.where(cut > 0, tl.where(tl.sqrt(plain) >= threshold, 1, 0), changed)
        changed = tl.where(begins > 0, 1, changed)
        whole = cut + begins
        gain_0 = tl.where(whole > 0, 1.0, gain_0)
        gain_1 = tl.where(whole > 0, 1.0, gain_1)
        gain_2 = tl.where(whole > 0, 1.0, gain_2)
        goes = inside & (changed > 0)
        for b in range(blocks):
            tl.store(
                held + u + (3 * b) * units, tl.load(here + (3 * b) * units, mask=goes, other=0.0) / gain_0, mask=goes
            )
            tl.store(
                held + u + (3 * b + 1) * units,
                tl.load(here + (3 * b + 1) * units, mask=goes, other=0.0) / gain_1,
                mask=goes,
            )
            tl.store(
                held + u + (3 * b + 2) * units,
                tl.load(here + (3 * b + 2) * units, mask=goes, other=0.0) / gain_2,
                mask=goes,
            )
        tl.debug_barrier()
        then_0 = tl.where(changed > 0, now_0 / gain_0, then_0)
        then_1 = tl.where(changed > 0, now_1 / gain_1, then_1)
        then_2 = tl.where(changed > 0, now_2 / gain_2, then_2)
        latest = tl.where(changed > 0, seen + t, latest)
        tl.store(source + t * units + u, latest, mask=inside)
    tl.store(pair + u, latest, mask=inside)


@on_its_device
def reuse_scan(means, held, pair, known, seen, threshold, blocks, channels, most):
    """Run the `reuse_scan` operator (see backend/operators.py) as a single Triton kernel.

    Args:
        most: The maximum brightness drift, as a factor. For the other arguments, see the operator.
    """
    count, units, _ = means.shape
    low = _bits(1 / most)
    high = _bits(most)
    by_channel = (-1, units, blocks, channels)
    of_pairs = means.view(by_channel).mean(2).transpose(1, 2).contiguous()
    of_held = held.view(by_channel).mean(2).transpose(1, 2).contiguous()
    # The kernel writes into these tensors.
    held = held.T.clone(memory_format=torch.contiguous_format)
    pair = pair.clone()
    source = torch.empty(means.shape[:2], dtype=torch.int64, device=means.device)
    block = max(512, triton.next_power_of_2(units))
    _scan[1,](
        means.transpose(1, 2).contiguous(), of_pairs, held, of_held, pair, source, count, units, seen, int(known), threshold,
        low=low, high=high, halvings=(high - low).bit_length(), blocks=blocks, block=block, num_warps=max(1, min(16, block // 64)),
    )  # fmt: skip
    return source, held.T.contiguous(), pair


# Decoder layers. The kernels round intermediate results at the same points as transformers.


@triton.jit
def _add_norm(x, plus, weight, total, out, eps, wide, adds: tl.constexpr, rounds: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * wide
    at = tl.arange(0, block)
    here = at < wide
    value = tl.load(x + row + at, mask=here, other=0.0)
    if adds:
        value = (value.to(tl.float32) + tl.load(plus + row + at, mask=here, other=0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + row + at, value, mask=here)
    exact = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(exact * exact, 0) / wide + eps)
    normed = exact * scale
    if rounds:
        normed = normed.to(value.dtype).to(tl.float32)
    tl.store(out + row + at, normed * tl.load(weight + at, mask=here, other=0.0).to(tl.float32), mask=here)


@triton.jit
def _silu_times(x, out, wide, block: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    here = at < wide
    gate = tl.load(x + 2 * row * wide + at, mask=here, other=0.0)
    exact = gate.to(tl.float32)
    gate = (exact / (1.0 + tl.exp(-exact))).to(gate.dtype).to(tl.float32)
    up = tl.load(x + (2 * row + 1) * wide + at, mask=here, other=0.0).to(tl.float32)
    tl.store(out + row * wide + at, gate * up, mask=here)


@triton.jit
def _rotate_put(
    x, cos, sin, query_norm, key_norm, out, keys, values, column, head_stride, column_stride, eps,
    more: tl.constexpr, dim: tl.constexpr, block: tl.constexpr, heads: tl.constexpr, kv_heads: tl.constexpr,
    norms: tl.constexpr, placed: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, block)
    here = at < dim
    across = (at + dim // 2) % dim
    read = x + (row * (heads + 2 * kv_heads) + head) * dim
    value = tl.load(read + at, mask=here, other=0.0)
    to = row
    if placed:
        to += tl.load(column)
    if head < heads + kv_heads:
        twin = tl.load(read + across, mask=here, other=0.0)
        if norms:
            weight = query_norm
            if head >= heads:
                weight = key_norm
            exact = value.to(tl.float32)
            scale = tl.rsqrt(tl.sum(exact * exact, 0) / dim + eps)
            gain = tl.load(weight + at, mask=here, other=0.0).to(tl.float32)
            twin_gain = tl.load(weight + across, mask=here, other=0.0).to(tl.float32)
            value = ((exact * scale).to(value.dtype).to(tl.float32) * gain).to(value.dtype)
            twin = ((twin.to(tl.float32) * scale).to(twin.dtype).to(tl.float32) * twin_gain).to(twin.dtype)
        turned = value.to(tl.float32) * tl.load(cos + row * dim + at, mask=here, other=0.0).to(tl.float32)
        beside = twin.to(tl.float32) * tl.load(sin + row * dim + at, mask=here, other=0.0).to(tl.float32)
        value = (turned.to(value.dtype).to(tl.float32) + beside.to(value.dtype).to(tl.float32)).to(value.dtype)
    if head < heads:
        value = tl.where(here, value, tl.full((block,), 1.0, value.dtype))
        tl.store(out + (row * heads + head) * (dim + more) + at, value, mask=at < dim + more)
    elif head < heads + kv_heads:
        tl.store(keys + (head - heads) * head_stride + to * column_stride + at, value, mask=here)
    else:
        tl.store(values + (head - heads - kv_heads) * head_stride + to * column_stride + at, value, mask=here)


@on_its_device
def add_norm(
    x: torch.Tensor, plus: torch.Tensor | None, weight: torch.Tensor, eps: float, rounds: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add a residual to `x` and apply an RMS norm. Returns `x + plus` (or just `x` if `plus` is None) and the normalized sum.

    Args:
        x, plus: `[rows, wide]`, contiguous. The results are contiguous as well.
        weight: The scale of the norm, `[wide]`.
        eps: The epsilon of the norm.
        rounds: Whether to round before multiplying by `weight`. If False, only the result is rounded.
    """
    wide = x.shape[1]
    out = torch.empty_like(x)
    total = x if plus is None else torch.empty_like(x)
    block = triton.next_power_of_2(wide)
    num_warps = 8 if block > 1024 else 4
    _add_norm[(len(x),)](
        x, _given(plus, x), weight, total, out, eps, wide,
        adds=plus is not None, rounds=rounds, block=block, num_warps=num_warps,
    )  # fmt: skip
    return total, out


@on_its_device
def silu_times(x: torch.Tensor) -> torch.Tensor:
    """Apply SiLU to the first half of each row and multiply the result by the second half.

    Args:
        x: `[rows, 2 * wide]`.

    Returns:
        `[rows, wide]`.
    """
    rows = len(x)
    wide = x.shape[1] // 2
    out = x.new_empty(rows, wide)
    _silu_times[(rows, triton.cdiv(wide, 1024))](x, out, wide, block=1024)
    return out


@on_its_device
def rotate_put(
    x: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    norms: tuple[torch.Tensor, torch.Tensor] | None,
    eps: float,
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    column: torch.Tensor | None,
    more: int,
) -> torch.Tensor:
    """Apply norms and rotary embeddings to queries and keys, and write the keys and values to the KV cache.

    Args:
        x: The queries, keys, and values before norms and rotary embeddings, `[L, (heads + 2 * kv_heads) * head_dim]`.
        places: The cosines and sines, as returned by `rotation` in language/decoder.py.
        norms: The weights of the query norm and the key norm, or None if the model has no such norms.
        eps: The epsilon of the norms.
        heads: The number of query heads.
        keys, values: The KV cache to write to, `[kv_heads, n, head_dim or more]`, with equal strides.
        column: int64 `[1]`, the first KV cache column to write to. None means column 0.
        more: The number of features, all set to 1, to append to each query head.

    Returns:
        The queries, `[1, L, heads, head_dim + more]`.
    """
    rows = len(x)
    kv_heads = len(keys)
    dim = x.shape[1] // (heads + 2 * kv_heads)
    out = x.new_empty(1, rows, heads, dim + more)
    _rotate_put[(rows, heads + 2 * kv_heads)](
        x, *places, *(norms or (x, x)), out, keys, values, _given(column, x), *keys.stride()[:2], eps,
        more=more, dim=dim, block=triton.next_power_of_2(dim + more), heads=heads, kv_heads=kv_heads,
        norms=norms is not None, placed=column is not None, num_warps=1,
    )  # fmt: skip
    return out


# The steps between the tower's QKV product and its attention: apply rotary embeddings and sort the keys by attention group.


@triton.jit(do_not_specialize=["rows"])
def _rotate_into_groups(
    qkv, cos, sin, place, keys, weight, q, k, v, rows,
    heads: tl.constexpr, dim: tl.constexpr, more: tl.constexpr, root: tl.constexpr, least: tl.constexpr, half: tl.constexpr,
    gathers: tl.constexpr,
):  # fmt: skip
    """Write one unit's queries, or its keys and values, for all heads and all four patches.

    The first `rows` programs write queries; all other programs write keys and values.
    """
    at = tl.program_id(0).to(tl.int64)
    asks = at < rows
    to = tl.where(asks, at, at - rows)
    source = to
    if gathers:
        source = tl.load(keys + to, mask=at >= rows, other=0)
        source = tl.where(asks, to, source)
    number = tl.arange(0, 4 * heads)
    patch = number // heads
    head = number % heads
    h = tl.arange(0, half)
    inside = (h < dim // 2)[None, :]
    turn = (tl.load(place + source) * 4 + patch)[:, None] * dim + h[None, :]
    c = tl.load(cos + turn, mask=inside, other=0.0)
    s = tl.load(sin + turn + dim // 2, mask=inside, other=0.0)
    which = tl.where(asks, 0, 1)
    wide: tl.constexpr = heads * dim
    read = (((source * 4 + patch) * 3 + which) * wide + head * dim)[:, None] + h[None, :]
    a = tl.load(qkv + read, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(qkv + read + dim // 2, mask=inside, other=0.0).to(tl.float32)
    write = ((to * 4 * heads + number) * (dim + more))[:, None] + h[None, :]
    kind = q.dtype.element_ty
    if asks:
        tl.store(q + write, (a * c - b * s).to(kind), mask=inside)
        tl.store(q + write + dim // 2, (b * c + a * s).to(kind), mask=inside)
    else:
        tl.store(k + write, (a * c - b * s).to(kind), mask=inside)
        tl.store(k + write + dim // 2, (b * c + a * s).to(kind), mask=inside)
    if gathers:
        both = inside & (h * 0 + at >= rows)[None, :]
        tl.store(v + write, tl.load(qkv + read + wide, mask=both, other=0.0), mask=both)
        last = tl.load(qkv + read + wide + dim // 2, mask=both, other=0.0)
        tl.store(v + write + dim // 2, last, mask=both)
    if more > 0:
        e = tl.arange(0, more)
        extra = ((to * 4 * heads + number) * (dim + more) + dim)[:, None] + e[None, :]
        if asks:
            tl.store(q + extra, tl.where(e < 2, 1.0, 0.0)[None, :].to(kind) + tl.zeros((4 * heads, more), kind))
        else:
            value = tl.load(weight + to)
            value = tl.where(value > 0, tl.log(tl.maximum(value, 1).to(tl.float32)), least) * root
            high = value.to(kind)
            low = (value - high.to(tl.float32)).to(kind)
            bias = tl.where(e == 0, high, tl.where(e == 1, low, 0.0))
            tl.store(k + extra, bias[None, :].to(kind) + tl.zeros((4 * heads, more), kind))
            tl.store(v + extra, tl.zeros((4 * heads, more), kind))


@on_its_device
def rotate_into_groups(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    place: torch.Tensor,
    heads: int,
    keys: torch.Tensor | None,
    weight: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Apply rotary embeddings to the vision tower's queries and keys, and sort the keys and values by attention group.

    Args:
        qkv: The queries, keys, and values, `[R, 4, 3 * heads * d]`.
        cos, sin: The rotary embedding, float32 `[places, 4, d]`, with the first half of the sines negated.
        place: int64 `[R]`, each row's position in its frame pair.
        heads: The number of heads.
        keys: int64 `[K]`, the rows that serve as keys. None uses all rows as keys, in their original order.
        weight: int64 `[K]` or None. The logarithm of each key's weight is added to its attention scores through extra features (see
            `vision.attention.with_bias`).

    Returns:
        The queries, `[R * 4, heads, d']`, and the keys and values, `[K * 4, heads, d']` each. Here, d' is d plus the number of
        extra features.
    """
    rows = len(qkv)
    dim = qkv.shape[2] // (3 * heads)
    more = 0 if weight is None else 8
    gathers = keys is not None or more > 0
    total = rows if keys is None else len(keys)
    q = qkv.new_empty(rows * 4, heads, dim + more)
    k = qkv.new_empty(total * 4, heads, dim + more)
    v = torch.empty_like(k) if gathers else qkv.view(rows * 4, 3, heads, dim)[:, 2]
    if gathers and keys is None:
        keys = torch.arange(rows, dtype=torch.int64, device=qkv.device)
    _rotate_into_groups[rows + total,](
        qkv, cos, sin, place, _given(keys, place), _given(weight, place), q, k, v, rows,
        heads=heads, dim=dim, more=more, root=dim**0.5, least=-Attention.NEVER, half=triton.next_power_of_2(dim // 2),
        gathers=gathers,
    )  # fmt: skip
    return q, k, v
