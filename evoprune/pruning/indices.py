"""Counting and choosing rows without asking the device how many there are.

`bincount`, `nonzero` and masks as indices make the host wait for a GPU, because the shape of what they give depends on values. Here
shapes are given by the caller, who knows them from the plan.
"""

import torch


def tally(index: torch.Tensor, bins: int) -> torch.Tensor:
    """int64 `[bins]`: how often each number occurs in `index` (int64 `[n]`)."""
    return index.new_zeros(bins).scatter_add_(0, index, torch.ones_like(index))


def true_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count]`: where `mask` (bool `[n]`) is true, ascending; the first if there are more, zeros at the end if fewer."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, torch.arange(len(mask)))[:count]


def runs(start: torch.Tensor, length: torch.Tensor, longest: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of neighbouring rows side by side.

    Args:
        start, length: int64 `[B]`; a run may be empty.
        longest: at least the greatest length.
        rows: how many there are; no index reaches it.

    Returns:
        Rows, int64 `[B, longest]`, and which of them are valid, bool; padding repeats a run's last row.
    """
    step = torch.arange(longest)
    last = (length - 1).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(step, last)).clamp(max=rows - 1), step < length[:, None]
