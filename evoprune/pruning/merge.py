"""Merging rows in pairs: bipartite matching inside groups, and the size-weighted mean (ToMe, arXiv 2210.09461, section 3)."""

import torch

from evoprune.pruning.indices import true_indices


def alternate(valid: torch.Tensor) -> torch.Tensor:
    """Which rows may merge into others this round: every second row of each group; bool `[B, n]`. Valid rows come first."""
    return (torch.arange(valid.shape[1], dtype=torch.int64, device=valid.device) % 2 == 1) & valid


def best_partners(
    score: torch.Tensor, source: torch.Tensor, destination: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each source would go.

    Args:
        score: `[B, m, n]`, of m rows with all of their group.
        source: bool `[B, m]`, destination: bool `[B, n]`.

    Returns:
        `[B, m]`, the highest score of each row with a destination, -inf where it is no source; and int64 `[B, m]`, with which. Ties
        go to the lower index.
    """
    allowed = source[:, :, None] & destination[:, None, :]
    return tuple(score.masked_fill(~allowed, -torch.inf).max(2))


def match(
    best: torch.Tensor, partner: torch.Tensor, source: torch.Tensor, last: torch.Tensor, remove: torch.Tensor
) -> torch.Tensor:
    """Merges the best `remove` pairs of each group.

    Args:
        best, partner: `[B, n]`, from `best_partners`, of all rows.
        source: bool `[B, n]`.
        last: bool `[B, n]`, critical rows: absorbed only after all other sources.
        remove: int64 `[B]`; more than there are sources means all of them.

    Returns:
        int64 `[B, n]`: where each row goes, itself if it stays. Ties go to the lower index.
    """
    b, n = source.shape
    # Among sources, by score; critical ones after all others, rows that are no source never. `max` and the stable sort both
    # give ties to the lower index.
    order = best.argsort(dim=1, descending=True, stable=True)
    late = (last & source).gather(1, order).to(torch.int8) + 2 * (~source).gather(1, order).to(torch.int8)
    order = order.gather(1, late.argsort(dim=1, stable=True))
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(n).expand(b, n))
    goes = source & (rank < torch.minimum(remove, source.sum(1))[:, None])
    return torch.where(goes, partner, torch.arange(n))


def merge_rows(
    x: torch.Tensor, size: torch.Tensor, into: torch.Tensor, rows: int | None = None, moves: int | None = None
) -> torch.Tensor:
    """The size-weighted mean of what goes into each row that stays.

    Args:
        x: `[R, ...]`, any float dtype; summed in float32.
        size: int64 `[R]`, units that each row stands for.
        into: int64 `[R]`.
        rows: of the result; default: those that stay, which waits for the device. If it is more, the rest has no meaning.
        moves: at most how many rows go into others; default `R - rows`.

    Returns:
        `[rows, ...]`, dtype of `x`; rows that nothing went into are passed on untouched.
    """
    goes = into != torch.arange(len(into))
    stays = ~goes
    rows = int(stays.sum()) if rows is None else rows
    moves = len(into) - rows if moves is None else moves
    kept, moved = true_indices(stays, rows), true_indices(goes, moves)
    out, before = x[kept], size[kept]
    to = (stays.cumsum(0) - 1).clamp(max=rows - 1)[into[moved]]
    added = torch.where(
        torch.arange(moves) < goes.sum(), size[moved], 0
    )  # entries of `moved` that are padding weigh nothing
    after = before.index_add(0, to, added)
    # Where several rows go into one, one of their places holds the sum: whichever comes last, they all start from the same.
    place = torch.empty_like(before).scatter_(0, to, torch.arange(moves))[to]
    grown = (after > before)[to]  # else it must pass through exactly
    one = (-1, *[1] * (x.ndim - 1))
    total = out[to].float().mul_(torch.where(grown, before[to], 1).view(one))
    total.index_add_(0, place, x[moved].float().mul_(added.view(one)))
    out[to] = total.div_(torch.where(grown, after[to], 1).view(one)).to(x.dtype)[place]
    return out
