"""Counting and indexing of rows in shapes that the caller gives.

`bincount`, `nonzero` and masks as indices make the program wait for a GPU, because the shape of their result depends on
values. Here the caller knows the shapes from the plan.
"""

import torch


def ascending(count: int, device: torch.device | str) -> torch.Tensor:
    """int64 `[count]`: 0, 1, 2 and so on."""
    return torch.arange(count, dtype=torch.int64, device=device)


def tally(index: torch.Tensor, bins: int) -> torch.Tensor:
    """int64 `[bins]`: how often each number occurs in `index` (int64 `[n]`)."""
    return index.new_zeros(bins).scatter_add_(0, index, torch.ones_like(index))


def true_indices(mask: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[count]`: the first `count` indices where `mask` (bool `[n]`) is true, ascending; filled up with zeros."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, ascending(len(mask), mask.device))[:count]


def runs(start: torch.Tensor, length: torch.Tensor, longest: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs of neighbouring rows as a padded batch of indices.

    Args:
        start, length: int64 `[B]`, the first row and the number of rows of each run; a run may be empty.
        longest: an upper bound of the lengths.
        rows: the number of rows; all indices are below it.

    Returns:
        int64 `[B, longest]`, rows; and bool `[B, longest]`, which of them are valid. Padding repeats the last row of a run.
    """
    step = ascending(longest, start.device)
    last = (length - 1).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(step, last)).clamp(max=rows - 1), step < length[:, None]
