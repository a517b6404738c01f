"""Merge rows after some layers, inside windows or frame pairs, as a method's merger decides."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from evoprune.backend import read_or, to_device
from evoprune.errors import call
from evoprune.methods import Candidates, Merger, TowerShape, arange_on, nonzero_fixed
from evoprune.model import without_autocast
from evoprune.vision.hooks import Hook
from evoprune.vision.layout import Scope, runs
from evoprune.vision.rows import Rows, merge_rows


class Merging(Hook):
    """Merge rows after some layers.

    Args:
        merger: decides which rows merge.
        left: the number of rows left per frame pair, keyed by the number of finished layers after which rows merge.
        tower: properties of the tower.
        as_planned: list that each merge extends by a 0-d bool tensor, True if as many rows are left as planned.
    """

    def __init__(
        self, merger: Merger, left: Mapping[int, tuple[int, ...]], tower: TowerShape, as_planned: list[torch.Tensor]
    ):
        self._merger = merger
        self._rows_left = left
        self._tower = tower
        self._as_planned = as_planned

    def needs(self, done: int) -> frozenset[str]:
        return self._merger.needs if done in self._rows_left else frozenset()

    def __call__(self, done: int, rows: Rows, seen: dict[str, torch.Tensor]) -> Rows:
        if done not in self._rows_left:
            return rows
        scope = self._tower.scope(done - 1)
        features = self._compared_features(rows, seen)
        rows, as_planned = merge_in_rounds(
            rows, scope, self._rows_left[done], self._merger, features, seen.get("attention")
        )
        self._as_planned.append(as_planned)
        return rows

    def _compared_features(self, rows: Rows, seen: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the features that the merger compares, float32 `[R, D]`."""
        needs = self._merger.needs
        if "hidden" not in needs:
            for keys in ("keys_rotary", "keys"):
                if keys in needs:
                    return seen[keys]
        return rows.values.flatten(1).float()


def merge_in_rounds(
    rows: Rows,
    scope: Scope,
    target: tuple[int, ...],
    merger: Merger,
    features: torch.Tensor,
    attention: torch.Tensor | None,
) -> tuple[Rows, torch.Tensor]:
    """Merge rows inside groups of `scope`, in rounds, until every frame pair has its target number of rows.

    If values are not read from the device, the rounds cannot end early. In that case, there are as many rounds as the worst case
    needs, and merged rows stay at the end as padding until the last round.

    Args:
        target: number of rows per frame pair.
        features: float32 `[R, D]`, the features that the merger compares. A merged row gets the size-weighted mean.
        attention: float32 `[R]`, the attention that each row received in the layer. A merged row gets the sum.

    Returns:
        The rows; and a 0-d bool tensor, which is True if as many rows are left as planned.

    Raises:
        RuntimeError: the merger removed no row in a round, or too many rows in total. Raised only if values are read.
    """
    longest = rows.longest(scope)
    goal = to_device(torch.tensor(target, dtype=torch.int64, device="cpu"), rows.unit.device)
    wanted = share_rows(rows.lengths(scope).view(len(target), -1), goal, longest).flatten()
    rounds = read_or(lambda: len(rows) - sum(target), rows.unit, most_rounds(rows, scope, target, merger))
    for left_rounds in reversed(range(rounds)):
        lengths = rows.lengths(scope)
        start = lengths.cumsum(0) - lengths
        remove = lengths - wanted
        # If values are read, only the groups that still lose rows take part.
        if (losing := read_or(lambda: (remove > 0).nonzero().flatten(), remove, None)) is not None:  # noqa: B023
            remove, start, lengths = remove[losing], start[losing], lengths[losing]
        if not len(remove):
            break
        into = _partners(rows, start, lengths, longest, remove, merger, features, attention)
        stays = into == arange_on(len(into), into.device)
        moves = read_or(lambda: int((~stays).sum()), into, len(rows) - sum(target))  # noqa: B023
        if not moves:
            raise RuntimeError(f"method {merger.name} merged no rows in a {scope} that must lose some")
        left = len(rows) - moves
        if left_rounds:
            left = read_or(lambda: left, into, len(rows))  # noqa: B023
        if attention is not None:
            attention = torch.zeros_like(attention).index_add_(0, into, attention)[nonzero_fixed(stays, left)]
        features = merge_rows(features, rows.size, into, left, moves)
        counts = None
        if left == sum(target):
            counts = target
        rows = rows.merge(into, scope, left, moves, counts, merger.size_bias)
    as_planned = (rows.lengths(scope) == wanted).all()
    if read_or(lambda: not as_planned, as_planned, False):
        raise RuntimeError(f"method {merger.name} left {len(rows)} rows instead of {sum(target)}")
    # If a merger removed too many rows, padding is left. Keep it inside the last frame pair until `as_planned` is read.
    return replace(rows, unit=rows.unit.clamp(max=len(rows.unit_to_row) - 1)), as_planned


def _partners(
    rows: Rows,
    start: torch.Tensor,
    length: torch.Tensor,
    longest: int,
    remove: torch.Tensor,
    merger: Merger,
    features: torch.Tensor,
    attention: torch.Tensor | None,
) -> torch.Tensor:
    """Return the index of the row that each row merges into, int64 `[R]`. A row that stays has its own index.

    Args:
        start, length, remove: int64 `[B]`, each group's first row, its number of rows, and the number of rows to remove from it.
        longest: upper bound of `length`.
        merger, features, attention: see `merge_in_rounds`.
    """
    longest = read_or(lambda: int(length.max()), length, longest)
    row, valid = runs(start, length, longest, len(rows))
    if attention is not None:
        attention = attention[row]
    candidates = Candidates(
        features=features[row],
        attention=attention,
        place=rows.place[row],
        size=rows.size[row],
        valid=valid,
        width=rows.geometry.width,
    )
    place = torch.where(valid, row, len(rows)).flatten()
    with without_autocast():  # the merger may write into `candidates`, which are not used afterwards
        local = call(merger.package, merger.match, candidates, remove)
    into = arange_on(len(rows) + 1, row.device)  # the last entry receives the values of padding
    return into.scatter_(0, place, row.gather(1, local).flatten())[:-1]


def most_rounds(rows: Rows, scope: Scope, target: Sequence[int], merger: Merger) -> int:
    """Return a number of rounds that is sufficient for any content."""
    worst = 0
    for count, left in set(zip(rows.per_pair, target, strict=True)):
        if scope == "pair":
            worst = max(worst, merger.rounds(count, left))
        else:  # the numbers of rows per window are known only on the device, so take the worst case
            longest = min(count, rows.geometry.largest_window)
            cases = ((n, max(1, n - (count - left))) for n in range(1, longest + 1))
            worst = max([worst, *(merger.rounds(n, fewest) for n, fewest in cases)])
    return worst


def share_rows(sizes: torch.Tensor, total: torch.Tensor, longest: int) -> torch.Tensor:
    """Distribute the rows to keep over groups in proportion to their sizes, by the largest remainder method.

    A group with rows keeps at least one. Ties are resolved by index.

    Args:
        sizes: int64 `[B, G]`, the number of rows in each group, at most `longest`.
        total: int64 `[B]`, rows to keep, at least the number of groups with rows and at most the sum of their sizes.

    Returns:
        int64 `[B, G]`, the number of rows that each group keeps.
    """
    size = sizes.sum(1, keepdim=True)
    total = total[:, None]
    counts = torch.where(sizes > 0, (total * sizes // size.clamp(min=1)).clamp(min=1), 0)
    missing = total - counts.sum(1, keepdim=True)
    excess = counts * size - total * sizes
    # If too few rows are kept, the groups that are furthest below their exact share get one more row. One row per group is enough,
    # because rounding down took less than one row from a group, and the groups that lost something have more rows than they keep.
    more = _first(counts < sizes, excess.argsort(dim=1, stable=True), missing)
    # If too many rows are kept, because every group keeps at least one, groups give rows back in turns. In a full turn, every group
    # that has more than one row gives one, so that a group has given min(p, spare) rows after p turns. After `turns` full turns,
    # the groups furthest above their exact share give one more row.
    spare = (counts - 1).clamp(min=0)
    give = -missing
    given = torch.minimum(arange_on(longest, sizes.device)[:, None], spare[:, None]).sum(2)  # [B, longest]
    turns = ((given <= give).sum(1, keepdim=True) - 1).clamp(min=0)
    rest = give - given.gather(1, turns)
    less = _first(spare > turns, excess.argsort(dim=1, descending=True, stable=True), rest)
    return counts + more.long() - torch.minimum(turns, spare) - less.long()


def _first(able: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Select the first `count` (`[B, 1]`) of the `able` groups in `order` (`[B, G]`), or none if `count` is negative.

    Returns:
        A mask of the selected groups, bool `[B, G]`.
    """
    queue = able.gather(1, order)
    selected = queue & (queue.cumsum(1) <= count)
    return torch.zeros_like(able).scatter_(1, order, selected)
