"""Merging rows in pairs: bipartite matching inside groups, and the size-weighted mean (ToMe, arXiv 2210.09461, section 3)."""

import torch

from evoprune.pruning.indices import true_indices

SPLITS = ("alternate", "checkerboard")
SURVIVORS = ("destination", "attended")


def split_sources(
    place: torch.Tensor, moment: torch.Tensor, valid: torch.Tensor, width: int, split: str
) -> torch.Tensor:
    """Which rows may be absorbed this round; the others are where they can go.

    Args:
        place: int64 `[B, n]`, raster place of each row in its grid. moment: int64 `[B, n]`, its grid in the block.
        valid: bool `[B, n]`, valid rows first.
        width: units a grid row.
        split: `alternate`: every second row of the group; `checkerboard`: every second place of the grid, the others in every
            second grid, so that a place can meet itself in the next one; where one colour alone is left, `alternate`.

    Returns:
        bool `[B, n]`.
    """
    odd = torch.arange(place.shape[1]) % 2 == 1
    source = odd & valid
    if split == "checkerboard":
        dark = ((place // width + place % width + moment) % 2 == 1) & valid
        both = dark.any(1) & (~dark & valid).any(1)
        source = torch.where(both[:, None], dark, source)
    return source


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


def survive_attended(into: torch.Tensor, attention: torch.Tensor) -> torch.Tensor:
    """Turns merges round so that of all rows that become one, the most attended stays in place (ties: lower index).

    Args:
        into: int64 `[B, n]`.
        attention: `[B, n]`.
    """
    n = into.shape[1]
    index = torch.arange(n).expand_as(into)
    top = torch.full_like(attention, -torch.inf).scatter_reduce(1, into, attention, "amax")
    wins = attention == top.gather(1, into)
    winner = torch.full_like(into, n).scatter_reduce(1, into, torch.where(wins, index, n), "amin")
    return winner.gather(1, into)


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
