"""Counting and indexing of rows in shapes that the caller knows from the plan.

`bincount`, `nonzero` and masks as indices synchronise a GPU, because the shape of their result depends on values.
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
    """Runs of neighbouring rows as a padded batch: int64 `[B, longest]`, and bool, which are valid. Padding repeats the last row.

    `start`, `length`: int64 `[B]`, of each run, which may be empty; `longest`: an upper bound; `rows`: all indices are below it.
    """
    step = ascending(longest, start.device)
    last = (length - 1).clamp(min=0)[:, None]
    return (start[:, None] + torch.minimum(step, last)).clamp(max=rows - 1), step < length[:, None]


def share_rows(sizes: torch.Tensor, total: torch.Tensor, longest: int) -> torch.Tensor:
    """int64 `[B, G]`: how many rows each group keeps, by largest remainder, at least one per group with rows; ties by index.

    `sizes`: int64 `[B, G]`, at most `longest`. `total`: int64 `[B]`, from the number of groups with rows to the sum of sizes.
    """
    size, total = sizes.sum(1, keepdim=True), total[:, None]
    counts = torch.where(sizes > 0, (total * sizes // size.clamp(min=1)).clamp(min=1), 0)
    missing = total - counts.sum(1, keepdim=True)
    excess = counts * size - total * sizes
    # Too few: the groups that are furthest below their exact share get one row more. One each is enough, because rounding down took
    # less than one row from each group, and the groups that lost something have more rows than they keep.
    more = _first(counts < sizes, excess.argsort(dim=1, stable=True), missing)
    # Too many, because every group keeps at least one row: the groups furthest above their exact share give one row in each turn,
    # down to one row. After p turns a group has given min(p, spare) rows. There are `turns` whole turns; some groups give one more.
    spare, give = (counts - 1).clamp(min=0), -missing
    given = torch.minimum(ascending(longest, sizes.device)[:, None], spare[:, None]).sum(2)  # [B, longest]
    turns = ((given <= give).sum(1, keepdim=True) - 1).clamp(min=0)
    rest = give - given.gather(1, turns)
    less = _first(spare > turns, excess.argsort(dim=1, descending=True, stable=True), rest)
    return counts + more.long() - torch.minimum(turns, spare) - less.long()


def _first(able: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool `[B, G]`: the first `count` (`[B, 1]`) groups in `order` (`[B, G]`) that are `able`; none if `count` is negative."""
    queue = able.gather(1, order)
    selected = queue & (queue.cumsum(1) <= count)
    return torch.zeros_like(able).scatter_(1, order, selected)
