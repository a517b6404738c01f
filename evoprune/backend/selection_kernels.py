"""The operators of backend/selection.py as kernels of Triton."""

import torch
import triton
import triton.language as tl

SIDE = 64  # points, and selected ones, of a block of distances
ROWS, CHANNELS = 32, 64  # of a block of features


@triton.jit
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


@triton.jit
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
def _distances(
    place, half, weight, row_i, row_j, time_i, time_j, valid_i, valid_j,
    d: tl.constexpr, piece: tl.constexpr,
):  # fmt: skip
    """Rounded distances `[i, j]` of selected points i and candidates j."""
    side_i: tl.constexpr = row_i.shape[0]
    side_j: tl.constexpr = row_j.shape[0]
    product = tl.zeros((side_i, side_j), tl.float32)
    for start in range(0, d, piece):
        k = start + tl.arange(0, piece)
        a = tl.load(place + row_i[:, None] * d + k[None, :], mask=valid_i[:, None] & (k < d)[None, :], other=0.0)
        b = tl.load(place + row_j[:, None] * d + k[None, :], mask=valid_j[:, None] & (k < d)[None, :], other=0.0)
        product += tl.dot(a, tl.trans(b), input_precision="ieee")
    half_i = tl.load(half + row_i, mask=valid_i, other=0.0)
    half_j = tl.load(half + row_j, mask=valid_j, other=0.0)
    weight_j = tl.load(weight + row_j, mask=valid_j, other=0.0)
    apart = half_i[:, None] + half_j[None, :] - product + weight_j[None, :] * tl.abs(time_i[:, None] - time_j[None, :])
    even = (apart + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to even, as torch does
    return tl.maximum(tl.where(apart < 4194304.0, even, apart), 0.0)


@triton.jit
def _tube_distances(
    place, half, weight, row, time, tubes, out, points, length,
    d: tl.constexpr, piece: tl.constexpr, side: tl.constexpr,
):  # fmt: skip
    tube = tl.program_id(0).to(tl.int64)
    i, j = tl.program_id(1) * side + tl.arange(0, side), tl.program_id(2) * side + tl.arange(0, side)
    point_i = tl.load(tubes + tube * length + i, mask=i < length, other=points)
    point_j = tl.load(tubes + tube * length + j, mask=j < length, other=points)
    row_i = tl.load(row + point_i, mask=point_i < points, other=-1)
    row_j = tl.load(row + point_j, mask=point_j < points, other=-1)
    time_i = tl.load(time + point_i, mask=point_i < points, other=0.0)
    time_j = tl.load(time + point_j, mask=point_j < points, other=0.0)
    apart = _distances(place, half, weight, row_i, row_j, time_i, time_j, row_i >= 0, row_j >= 0, d, piece)
    at = out + tube * length * length + i[:, None] * length + j[None, :]
    tl.store(at, apart, mask=(i < length)[:, None] & (j < length)[None, :])


@triton.jit
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


@triton.jit
def _nearest(
    place, half, weight, row, time, selected, out, points, count,
    d: tl.constexpr, piece: tl.constexpr, side: tl.constexpr,
):  # fmt: skip
    point = tl.program_id(0) * side + tl.arange(0, side)
    mine = tl.load(row + point, mask=point < points, other=-1)
    when = tl.load(time + point, mask=point < points, other=0.0)
    least = tl.full((side,), float("inf"), tl.float32)
    found = tl.zeros((side,), tl.int64)
    for start in range(0, count, side):
        k = start + tl.arange(0, side)
        other = tl.load(selected + k, mask=k < count, other=0)
        row_k = tl.load(row + other, mask=k < count, other=-1)
        time_k = tl.load(time + other, mask=k < count, other=0.0)
        apart = _distances(place, half, weight, row_k, mine, time_k, when, k < count, mine >= 0, d, piece)
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


def _piece(d: int) -> int:
    """How many features of two points are multiplied at a time."""
    return max(16, min(64, triton.next_power_of_2(d)))


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
    (count, length), d = tubes.shape, place.shape[1]
    apart = place.new_empty(count, length, length)
    blocks = triton.cdiv(length, SIDE)
    _tube_distances[count, blocks, blocks](
        place, half, weight, row, time, tubes, apart, len(row), length, d=d, piece=_piece(d), side=SIDE
    )
    radii, block = torch.empty_like(row, dtype=torch.float32), triton.next_power_of_2(length)
    _greedy[count,](
        apart, first, row, tubes, radii, len(row), length, block=block, num_warps=max(1, min(8, block // 128))
    )
    return radii


def nearest_selected(place, half, weight, row, time, selected):
    found, d = torch.empty_like(row), place.shape[1]
    grid, selected = (triton.cdiv(len(row), SIDE),), selected.contiguous()
    _nearest[grid](
        place, half, weight, row, time, selected, found, len(row), len(selected), d=d, piece=_piece(d), side=SIDE
    )
    numbers = torch.arange(len(selected), dtype=torch.int64, device=row.device)
    return found.index_copy_(0, selected, numbers)


def mean_rows(rows, into, row, weight, count):
    rows, width = rows.contiguous(), rows.shape[1]
    sorted_, order = into.sort(stable=True)
    ends = torch.searchsorted(sorted_, torch.arange(count + 1, dtype=torch.int64, device=into.device))
    means, block = rows.new_empty(count, width), min(1024, triton.next_power_of_2(width))
    grid = count, triton.cdiv(width, block)
    _means[grid](rows, order, row, weight, ends, means, width=width, block=block)
    return means
