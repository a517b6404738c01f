"""Rows merged inside windows or blocks down to counts that were planned, by what a method says of which go together."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from evoprune.methods.base import Candidates, Method
from evoprune.pruning.indices import runs, tally, true_indices
from evoprune.pruning.merge import merge_rows
from evoprune.pruning.shares import share_rows
from evoprune.vision import devices
from evoprune.vision.layout import Scope, TokenLayout, merged_layout


def reduce_rows(
    x: torch.Tensor,
    layout: TokenLayout,
    scope: Scope,
    target: Sequence[int],
    features: torch.Tensor,
    attention: torch.Tensor | None,
    method: Method,
) -> tuple[torch.Tensor, TokenLayout, torch.Tensor | None]:
    """Merges rows inside windows or blocks until each block has its target, in as many rounds as the method needs.

    Where shapes are static nobody looks whether a round is the last one that is needed: there are as many as it can take, and
    until the last one rows that went are kept at the end as padding.

    Args:
        x: `[R, 4, hidden]`.
        target: rows to be left in each block; windows are for blocks of a single grid.
        features: float32 `[R, D]`, attention: float32 `[R]` or None: what the method compares. A merged row has the mean of the
            features and the sum of the attention of what went into it.

    Returns:
        Rows and layout; and, where shapes are static, whether some group did not lose what it had to (bool, no dimension).

    Raises:
        RuntimeError: the method merged nothing though it was asked to, or too much; where shapes are not static.
    """
    static, moves = devices.static_shapes(x.device), layout.rows - sum(target)
    total, longest = layout.group_count(scope), layout.longest(scope)
    length = tally(layout.group_of(layout.home, scope), total)
    goal = devices.uploaded(torch.tensor(target, device="cpu"), x.device)
    wanted = share_rows(length.view(len(target), -1), goal, longest).flatten()
    rounds = most_rounds(layout, scope, target, method) if static else moves
    for after in reversed(range(rounds)):
        length = tally(layout.group_of(layout.home, scope), total + 1)[:total]  # padding is a group more
        start, remove = length.cumsum(0) - length, length - wanted
        if not static:
            busy = (remove > 0).nonzero().flatten()
            if not len(busy):
                break
            start, length, remove = start[busy], length[busy], remove[busy]
            longest = int(length.max())
        row, valid = runs(start, length, longest, layout.rows)
        candidates = Candidates(
            features[row],
            None if attention is None else attention[row],
            layout.place[row],
            layout.home[row] // layout.geometry.units % layout.block,
            layout.size[row],
            valid,
            layout.geometry.width,
        )
        local = method.match(candidates, remove)
        into = torch.arange(layout.rows + 1)  # the last entry takes what padding says
        into.scatter_(0, torch.where(valid, row, layout.rows).flatten(), row.gather(1, local).flatten())
        into = into[:-1]
        stays = into == torch.arange(layout.rows)
        left = layout.rows if after else sum(target)
        if not static:
            left = int(stays.sum())
            moves = layout.rows - left
            if not moves:
                raise RuntimeError(f"method {method.name} merged nothing in a {scope} that must lose rows")
        size = layout.size
        x, features = merge_rows(x, size, into, left, moves), merge_rows(features, size, into, left, moves)
        if attention is not None:
            attention = torch.zeros_like(attention).index_add_(0, into, attention)[true_indices(stays, left)]
        counts = tuple(target) if left == sum(target) else None
        layout = merged_layout(layout, into, scope, left, counts)
    if not static:
        if layout.rows != sum(target):
            raise RuntimeError(f"method {method.name} left {layout.rows} rows where {sum(target)} were planned")
        return x, layout, None
    failed = (tally(layout.group_of(layout.home, scope), total + 1)[:total] != wanted).any()
    # If it has merged too much there is still padding. Until that can be said, at the end, it must not lead out of the last grid.
    return x, replace(layout, home=layout.home.clamp(max=len(layout.owner) - 1)), failed


def most_rounds(layout: TokenLayout, scope: Scope, target: Sequence[int], method: Method) -> int:
    """After how many rounds every group has lost what it must, whatever the rows are."""
    worst = 0
    for rows, left in set(zip(layout.per_block, target, strict=True)):
        if scope == "block":
            worst = max(worst, method.rounds(rows, left))
        else:  # how many rows a window has and loses, only the device knows
            longest = min(rows, layout.geometry.largest_window)
            cases = ((n, max(1, n - (rows - left))) for n in range(1, longest + 1))
            worst = max([worst, *(method.rounds(n, fewest) for n, fewest in cases)])
    return worst
