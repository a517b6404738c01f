"""The operator of greedy selections by cosine: rows one after another, each as unlike those before it as possible.

One kernel of Triton on CUDA, PyTorch elsewhere: a few operations a row, of which no value is read.
"""

import torch

from evoprune.backend.fallback import with_fallback

BLOCK = 512  # rows of a matrix of all pairs that are held at a time
MOST_ROWS = 1 << 15  # of which the kernel has all cosines, as 16-bit numbers: 2 GiB

_LIBRARY = torch.library.Library("evoprune", "FRAGMENT")
_LIBRARY.define(
    "greedy_cosine(Tensor unit, Tensor? weight, Tensor? bonus, float factor, int keep, bool from_nearest) -> Tensor"
)
greedy_cosine = torch.ops.evoprune.greedy_cosine


def snap(score: torch.Tensor) -> torch.Tensor:
    """Rounds scores to multiples of 1/16384: cosines of equal rows, which differ in the last bits, become ties."""
    return (score * 16384).round() / 16384


def _greedy_cosine(
    unit: torch.Tensor,
    weight: torch.Tensor | None,
    bonus: torch.Tensor | None,
    factor: float,
    keep: int,
    from_nearest: bool,
) -> torch.Tensor:
    """int64 `[keep]`, ascending: rows of `unit` (float32 `[N, D]`, of length one), one after another that of the highest score.

    The score of a row is of `near`, its greatest cosine to the selected ones. Cosines are rounded; ties go to the lower index.

    Args:
        weight: float `[N]`, at least 0: the score is (1 - near) * weight, rounded; None for 1.
        bonus: float32 `[N]`: the score is bonus - factor * near, rounded; `weight` is then None.
        from_nearest: whether `near` begins as the cosine to the nearest other row; else it begins at 0.
    """
    near = nearest_cosine(unit) if from_nearest and keep else unit.new_zeros(len(unit))
    selected = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for step in range(keep):
        if bonus is not None:
            score = snap(bonus - factor * near)
        else:
            score = 1 - near.clamp(min=-1)
            score = score if weight is None else snap(score * weight)
        latest = score.masked_fill(selected, -torch.inf).argmax()[None]
        selected.index_fill_(0, latest, True)  # an index in brackets would synchronise a GPU
        cosine = snap(unit @ unit.index_select(0, latest)[0])
        near = torch.maximum(near, cosine) if step else cosine
    return selected.logical_not().argsort(stable=True)[:keep].clone()


def nearest_cosine(unit: torch.Tensor) -> torch.Tensor:
    """float32 `[N]`: the cosine of each row of `unit` (`[N, D]`, of length one) to the most similar other row, -inf if none."""
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
    from evoprune.backend import greedy_kernels  # Triton takes a while to import

    return greedy_kernels.greedy_cosine(unit, weight, bonus, factor, keep, from_nearest)


_LIBRARY.impl("greedy_cosine", _greedy_cosine, "CompositeExplicitAutograd")
_LIBRARY.impl("greedy_cosine", _greedy_cosine_cuda, "CUDA")
