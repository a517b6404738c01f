"""Merging rows two by two: bipartite matching inside groups, and the size-weighted mean (ToMe, arXiv 2210.09461, section 3)."""

import torch

from evoprune.pruning.indices import ascending, true_indices


def alternate(valid: torch.Tensor, first: int = 1) -> torch.Tensor:
    """The sources of a round, bool `[B, n]`: every second row of each group, from row `first` (0 or 1), may merge into another."""
    return (ascending(valid.shape[1], valid.device) % 2 == first) & valid


def best_partners(
    score: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The highest `score` (`[B, m, n]`) of each source (bool `[B, m]`) with a destination (bool `[B, n]`).

    Returns:
        `[B, m]`, -inf for other rows; and int64 `[B, m]`, the index of that destination. Ties go to the lower index.
    """
    allowed = source[:, :, None] & destination[:, None, :]
    return tuple(score.masked_fill(~allowed, -torch.inf).max(2))


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """int64 `[B, n]`: the row that each row merges into, its own index if it stays. Sources of highest score merge first.

    Args:
        best, partner: `[B, n]`, from `best_partners`, of all rows.
        source: bool `[B, n]`.
        last: bool `[B, n]`, critical rows: they merge only after all other sources.
        remove: int64 `[B]`, how many sources merge; all of them if there are fewer.
    """
    b, n = source.shape
    # The order: sources by score, then critical sources, then all other rows. The stable sorts give ties to the lower index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, ascending(n, source.device).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, ascending(n, source.device))


def merge_rows(
    x: torch.Tensor, size: torch.Tensor, into: torch.Tensor, rows: int | None = None, moves: int | None = None
) -> torch.Tensor:
    """The size-weighted mean of each row that stays and the rows that merge into it.

    Args:
        x: `[R, ...]`, any float dtype; sums are computed in float32.
        size: int64 `[R]`, cluster size of each row.
        into: int64 `[R]`, the row that each row merges into, its own index if it stays.
        rows: number of rows in the result. Default: the rows that stay, whose count synchronises. If it is more, the last rows are
            padding without meaning.
        moves: upper bound of the rows that merge; default `R - rows`.

    Returns:
        `[rows, ...]`, in the dtype of `x`; a row that no other merges into is unchanged.
    """
    goes = into != ascending(len(into), into.device)
    stays = ~goes
    rows = int(stays.sum()) if rows is None else rows
    moves = len(into) - rows if moves is None else moves
    kept, moved = true_indices(stays, rows), true_indices(goes, moves)
    out, before = x[kept], size[kept]
    to = (stays.cumsum(0) - 1).clamp(max=rows - 1)[into[moved]]
    # Padding in `moved` weighs nothing.
    added = torch.where(ascending(moves, into.device) < goes.sum(), size[moved], 0)
    after = before.index_add(0, to, added)
    # If several rows merge into one, one of their slots in `total` holds the sum. Any of them will do: all start from the same row.
    place = torch.empty_like(before).scatter_(0, to, ascending(moves, into.device))[to]
    grown = (after > before)[to]  # other rows must stay exactly as they are
    one = (-1, *[1] * (x.ndim - 1))
    total = out[to].float().mul_(torch.where(grown, before[to], 1).view(one))
    total.index_add_(0, place, x[moved].float().mul_(added.view(one)))
    out[to] = total.div_(torch.where(grown, after[to], 1).view(one)).to(x.dtype)[place]
    return out
