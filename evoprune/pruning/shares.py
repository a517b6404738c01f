"""Divides the rows that frame pairs keep among their groups, on counts that only the device knows."""

import torch

from evoprune.pruning.indices import ascending


def share_rows(sizes: torch.Tensor, total: torch.Tensor, longest: int) -> torch.Tensor:
    """How many rows each group keeps: `total` in proportion to `sizes`, by largest remainder, at least one per group with rows.

    Args:
        sizes: int64 `[B, G]`, rows of each group; zeros stay zero.
        total: int64 `[B]`, between the number of groups with rows and the sum of sizes.
        longest: an upper bound of the sizes.

    Returns:
        int64 `[B, G]`, at most `sizes`; ties by index. The sum differs from `total` if `total` is out of range.
    """
    whole, total = sizes.sum(1, keepdim=True), total[:, None]
    counts = torch.where(sizes > 0, (total * sizes // whole.clamp(min=1)).clamp(min=1), 0)
    missing = total - counts.sum(1, keepdim=True)
    excess = counts * whole - total * sizes
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
