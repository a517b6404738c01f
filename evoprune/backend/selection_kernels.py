"""The operators of backend/selection.py as kernels of Triton, around products of cuBLAS."""

import torch
import triton
import triton.language as tl

SIDE = 64  # points, and selected ones, of a block of distances
ROWS, CHANNELS = 32, 64  # of a block of features
# Sizes change from video to video: kernels are not compiled again for those that 16 divides.
SIZES = ["points", "length", "count", "begin"]


@triton.jit(do_not_specialize=["length"])
def _moments(rows, count, mean, variance, length, width, block_rows: tl.constexpr, block: tl.constexpr):
    """Mean and variance of some channels over the rows, each as often as it counts."""
    c = tl.program_id(0) * block + tl.arange(0, block)
    inside = c < width
    first = tl.load(rows + c, mask=inside, other=0.0).to(tl.float32)
    total, size = tl.zeros((block,), tl.float32), 0.0
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
    """Rows less their mean, over the deviation of each channel; and the squared length of each."""
    r = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    least, total = still * tl.load(average), tl.zeros((block_rows,), tl.float32)
    for start in range(0, width, block):
        c = start + tl.arange(0, block)
        middle = tl.load(mean + c, mask=c < width, other=0.0)
        off = rounding * middle
        scale = tl.rsqrt(tl.maximum(tl.load(variance + c, mask=c < width, other=1.0) + least + off * off, 1e-30))
        at, mask = r.to(tl.int64)[:, None] * width + c[None, :], (r < length)[:, None] & (c < width)[None, :]
        x = tl.load(rows + at, mask=mask, other=0.0).to(tl.float32)
        x = tl.where(mask, (x - middle[None, :]) * scale[None, :], 0.0)
        total += tl.sum(x * x, 1)
        tl.store(place + at, x, mask=mask)
    tl.store(squares + r, total, mask=r < length)


@triton.jit
def _distances(product, half, weight, row_i, row_j, time_i, time_j, valid_i, valid_j):
    """Rounded distances `[i, j]` of selected points i and candidates j, from the product of their places."""
    half_i = tl.load(half + row_i, mask=valid_i, other=0.0)
    half_j = tl.load(half + row_j, mask=valid_j, other=0.0)
    weight_j = tl.load(weight + row_j, mask=valid_j, other=0.0)
    apart = half_i[:, None] + half_j[None, :] - product + weight_j[None, :] * tl.abs(time_i[:, None] - time_j[None, :])
    even = (apart + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to even, as torch does
    return tl.maximum(tl.where(apart < 4194304.0, even, apart), 0.0)


@triton.jit(do_not_specialize=SIZES)
def _tube_distances(product, half, weight, row, time, tubes, points, length, side: tl.constexpr):
    """Puts the distances of one tube in the place of its products."""
    tube = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * side + tl.arange(0, side), tl.program_id(2) * side + tl.arange(0, side)
    point_i = tl.load(tubes + tube * length + i, mask=i < length, other=points)
    point_j = tl.load(tubes + tube * length + j, mask=j < length, other=points)
    row_i = tl.load(row + point_i, mask=point_i < points, other=-1)
    row_j = tl.load(row + point_j, mask=point_j < points, other=-1)
    time_i = tl.load(time + point_i, mask=point_i < points, other=0.0)
    time_j = tl.load(time + point_j, mask=point_j < points, other=0.0)
    at = product + tube * length * length + i[:, None] * length + j[None, :]
    inside = (i < length)[:, None] & (j < length)[None, :]
    found = tl.load(at, mask=inside, other=0.0)
    tl.store(at, _distances(found, half, weight, row_i, row_j, time_i, time_j, row_i >= 0, row_j >= 0), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def _greedy(apart, first, row, tubes, out, points, length, block: tl.constexpr):
    """The radii of one tube."""
    tube = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, block)
    point = tl.load(tubes + tube * length + i, mask=i < length, other=points)
    mine = tl.load(row + point, mask=point < points, other=-1)
    valid = mine >= 0
    near = tl.load(first + mine, mask=valid, other=-1.0)
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
    """Which selected point is nearest to each of some points, from `begin` to `points`; `product`: `[point, selected]`."""
    number = tl.program_id(0) * side + tl.arange(0, side)
    point = begin + number
    mine = tl.load(row + point, mask=point < points, other=-1)
    when = tl.load(time + point, mask=point < points, other=0.0)
    least = tl.full((side,), float("inf"), tl.float32)
    found = tl.zeros((side,), tl.int64)
    for start in range(0, count, side):
        k = start + tl.arange(0, side)
        other = tl.load(selected + k, mask=k < count, other=0)
        row_k = tl.load(row + other, mask=k < count, other=-1)
        time_k = tl.load(time + other, mask=k < count, other=0.0)
        at = product + number.to(tl.int64)[:, None] * count + k[None, :]
        of = tl.trans(tl.load(at, mask=(point < points)[:, None] & (k < count)[None, :], other=0.0))
        apart = _distances(of, half, weight, row_k, mine, time_k, when, k < count, mine >= 0)
        apart = tl.where((k < count)[:, None], apart, float("inf"))
        nearest, which = tl.min(apart, 0, return_indices=True)
        found = tl.where(nearest < least, which + start, found)
        least = tl.minimum(nearest, least)
    tl.store(out + point, tl.where(mine >= 0, found, -1), mask=point < points)


@triton.jit
def _means(rows, order, row, weight, ends, out, width: tl.constexpr, block: tl.constexpr):
    """Columns of one mean, whose rows are added in the order of their index, so that the sum is always the same."""
    mean = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * block + tl.arange(0, block)
    total, size = tl.zeros((block,), tl.float32), 0.0
    for i in range(tl.load(ends + mean), tl.load(ends + mean + 1)):
        member = tl.load(order + i)
        w = tl.load(weight + member)
        total += w * tl.load(rows + tl.load(row + member) * width + at, mask=at < width, other=0.0).to(tl.float32)
        size += w
    tl.store(out + mean * width + at, (total / size).to(out.dtype.element_ty), mask=at < width)


def standard_places(rows, count, projection, steps, still, rounding):
    rows, (length, width) = rows.contiguous(), rows.shape
    mean, variance = (torch.empty(width, dtype=torch.float32, device=rows.device) for _ in range(2))
    _moments[triton.cdiv(width, CHANNELS),](rows, count, mean, variance, length, width, block_rows=ROWS, block=CHANNELS)
    place, squares = torch.empty_like(rows, dtype=torch.float32), torch.empty_like(count)
    _standardise[triton.cdiv(length, ROWS),](
        rows, mean, variance, variance.mean(), place, squares, length, still, rounding,
        width=width, block_rows=ROWS, block=CHANNELS,
    )  # fmt: skip
    place = place if projection is None else place @ projection
    squares = torch.where(count > 0, squares, 0)
    largest = squares.max().clamp(min=still * width)
    return place / largest.sqrt(), (squares / largest * steps).round_().div_(steps)


def tube_radii(place, half, weight, first, row, time, tubes, keep):
    (count, length), points = tubes.shape, len(row)
    there = place[row[tubes.clamp(max=points - 1)].clamp(min=0)]
    apart = torch.bmm(there, there.transpose(1, 2))
    blocks = triton.cdiv(length, SIDE)
    _tube_distances[count, blocks, blocks](apart, half, weight, row, time, tubes, points, length, side=SIDE)
    # One size of a block for nearly all grids: a kernel is compiled for each.
    radii, block = torch.empty_like(row, dtype=torch.float32), max(256, triton.next_power_of_2(length))
    _greedy[count,](apart, first, row, tubes, radii, points, length, block=block, num_warps=4)
    return radii


def nearest_selected(place, half, weight, row, time, selected, held=1 << 26):
    found, selected, (points, count) = torch.empty_like(row), selected.contiguous(), (len(row), len(selected))
    there, rows = place[row[selected]].T, row.clamp(min=0)
    step = max(1, held // count)  # products are held for so many points at a time
    for begin in range(0, points, step):
        end = min(begin + step, points)
        product, grid = place[rows[begin:end]] @ there, (triton.cdiv(end - begin, SIDE),)
        _nearest[grid](product, half, weight, row, time, selected, found, begin, end, count, side=SIDE)
    return found.index_copy_(0, selected, torch.arange(count, dtype=torch.int64, device=row.device))


def mean_rows(rows, into, row, weight, count):
    rows, width = rows.contiguous(), rows.shape[1]
    sorted_, order = into.sort(stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(count + 1, dtype=torch.int64, device=into.device))
    means, block = rows.new_empty(count, width), min(1024, triton.next_power_of_2(width))
    grid = count, triton.cdiv(width, block)
    _means[grid](rows, order, row, weight, ends, means, width=width, block=block)
    return means
