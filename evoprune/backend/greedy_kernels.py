"""The operator of backend/greedy.py as a kernel of Triton: one program selects all rows, with the cosines of all pairs at hand."""

import torch
import triton
import triton.language as tl

HELD = 1 << 26  # cosines that are held in float32 at a time


@triton.jit
def _snap(x):
    even = (x * 16384 + 12582912.0) - 12582912.0  # 1.5 * 2**23: rounds to even, as torch does
    return even / 16384


@triton.jit
def _greedy(
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


def greedy_cosine(unit, weight, bonus, factor, keep, from_nearest):
    rows = len(unit)
    cosines = torch.empty(rows, rows, dtype=torch.int16, device=unit.device)
    nearest = unit.new_zeros(rows)
    at_once = max(1, HELD // rows)
    for start in range(0, rows, at_once):
        some = slice(start, start + at_once)
        steps = (unit[some] @ unit.T).mul_(16384).round_()
        cosines[some] = steps
        if from_nearest:
            steps.diagonal(start).fill_(-torch.inf)
            nearest[some] = steps.amax(1) / 16384
    value = bonus if bonus is not None else nearest if weight is None else weight
    order, block = torch.empty(keep, dtype=torch.int64, device=unit.device), triton.next_power_of_2(rows)
    _greedy[1,](
        cosines, nearest, value.float().contiguous(), order, rows, keep, factor,
        weighted=weight is not None, with_bonus=bonus is not None, block=block, num_warps=max(1, min(32, block // 128)),
    )  # fmt: skip
    return order.sort().values
