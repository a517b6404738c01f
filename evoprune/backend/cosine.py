"""Torch operator for greedy selection by cosine similarity: each step selects the row least similar to those selected before."""

import torch

from evoprune.backend.devices import with_fallback
from evoprune.backend.operators import LIBRARY, snap

BLOCK = 512  # number of rows of the pairwise cosine matrix to hold in memory at a time
MOST_ROWS = 1 << 15  # maximum for the kernel, which stores all cosines as 16-bit numbers (2 GiB at this number of rows)

LIBRARY.define(
    "greedy_cosine(Tensor unit, Tensor? weight, Tensor? bonus, float factor, int keep, bool from_nearest) -> Tensor"
)
greedy_cosine = torch.ops.evoprune.greedy_cosine


def _greedy_cosine(
    unit: torch.Tensor,
    weight: torch.Tensor | None,
    bonus: torch.Tensor | None,
    factor: float,
    keep: int,
    from_nearest: bool,
) -> torch.Tensor:
    """Greedily select the rows with the highest scores, one at a time. Returns their indices, int64 `[keep]`, ascending.

    A row's score depends on `near`, the largest cosine between this row and any selected row. Cosines are rounded. Ties go to the
    row with the lowest index.

    Args:
        unit: float32 `[N, D]`, rows of unit length.
        weight: float `[N]`, nonnegative. The score is (1 - near) * weight, rounded. None means a weight of 1.
        bonus: float32 `[N]` or None. With a bonus, the score is bonus - factor * near, rounded, and `weight` must be None.
        factor: The factor for `near` in scores with a bonus.
        keep: The number of rows to select.
        from_nearest: Whether `near` is initialized to the cosine with the most similar other row. If False, `near` starts at 0.
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
        selected.index_fill_(0, latest, True)  # `selected[latest] = True` would synchronize the GPU
        cosine = snap(unit @ unit.index_select(0, latest)[0])
        near = torch.maximum(near, cosine) if step else cosine
    return selected.logical_not().argsort(stable=True)[:keep].clone()


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """Return each row's cosine similarity to its most similar other row, float32 `[N]`, or -inf if there is only one row.

    The rows of `unit`, `[N, D]`, must have unit length.
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
    from evoprune.backend import kernels  # importing Triton takes a while

    return kernels.greedy_cosine(unit, weight, bonus, factor, keep, from_nearest)


LIBRARY.impl("greedy_cosine", _greedy_cosine, "CompositeExplicitAutograd")
LIBRARY.impl("greedy_cosine", _greedy_cosine_cuda, "CUDA")
