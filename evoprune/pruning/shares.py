"""`schedule.share_by_size` for many grids at once, on counts that only the device knows."""

import torch


def share_rows(sizes: torch.Tensor, total: torch.Tensor, longest: int) -> torch.Tensor:
    """How many of its rows each group keeps, as `share_by_size` has it.

    Args:
        sizes: int64 `[B, G]`, rows of each group.
        total: int64 `[B]`, between the number of groups with rows and the sum of sizes.
        longest: at least the greatest size.

    Returns:
        int64 `[B, G]`; its sum is not `total` if that is out of range.
    """
    whole, total = sizes.sum(1, keepdim=True), total[:, None]
    counts = torch.where(sizes > 0, (total * sizes // whole.clamp(min=1)).clamp(min=1), 0)
    missing = total - counts.sum(1, keepdim=True)
    excess = counts * whole - total * sizes
    # Too few: who got least gets one more. One each is enough: what rounding down took is less than one from each group, and those
    # from which it took something have rows to spare.
    more = _first(counts < sizes, excess.argsort(dim=1, stable=True), missing)
    # Too many, where a floor of one gave more than was due: who got most gives first, one row in each turn, down to one row.
    # After p turns a group has given min(p, spare) rows; `turns` is how many whole turns there are, the rest is one more for some.
    spare, give = (counts - 1).clamp(min=0), -missing
    given = torch.minimum(torch.arange(longest)[:, None], spare[:, None]).sum(2)  # [B, longest]
    turns = ((given <= give).sum(1, keepdim=True) - 1).clamp(min=0)
    rest = give - given.gather(1, turns)
    less = _first(spare > turns, excess.argsort(dim=1, descending=True, stable=True), rest)
    return counts + more.long() - torch.minimum(turns, spare) - less.long()


def _first(able: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """bool `[B, G]`: the first `count` `[B, 1]` groups in `order` `[B, G]` that are `able`; none if `count` is negative."""
    queue = able.gather(1, order)
    chosen = queue & (queue.cumsum(1) <= count)
    return torch.zeros_like(able).scatter_(1, order, chosen)
