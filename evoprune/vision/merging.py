"""Merges rows within windows or frame pairs between vision tower layers.

The pruning method's merger decides which rows merge.
"""

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
    """A hook that merges rows after certain vision tower layers.

    Args:
        merger: The pruning method's merger, which decides which rows merge.
        left: Maps the number of layers before a merge to the number of rows that the merge leaves in each frame pair.
        tower: The properties of the vision tower.
        as_planned: A list to which each merge appends a 0-d bool tensor: True if every group has its planned number of rows.
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
    """Merge rows within windows or frame pairs, in rounds, until every frame pair has its target number of rows.

    On the CPU, the loop stops as soon as enough rows have been merged. On other devices, it can't stop early without reading values
    back, so it always runs the worst-case number of rounds. Until the last round, the row table keeps its length and is filled with
    padding.

    Args:
        scope: The groups within which rows merge.
        target: The number of rows to leave in each frame pair.
        features: float32 `[R, D]`, the features compared by the merger. The features of merged rows are averaged, weighted by
            cluster size.
        attention: float32 `[R]`, the attention received by each row in the layer, or None if the merger doesn't use it. The
            attention of merged rows is summed.

    Returns:
        The remaining rows, and a 0-d bool tensor that is True if each group has its planned number of rows.

    Raises:
        RuntimeError: If the merger removes no rows in a round, or too many rows in total. Only raised on the CPU.
    """
    longest = rows.longest(scope)
    goal = to_device(torch.tensor(target, dtype=torch.int64, device="cpu"), rows.unit.device)
    wanted = share_rows(rows.lengths(scope).view(len(target), -1), goal, longest).flatten()
    rounds = read_or(lambda: len(rows) - sum(target), rows.unit, most_rounds(rows, scope, target, merger))
    for left_rounds in reversed(range(rounds)):
        lengths = rows.lengths(scope)
        start = lengths.cumsum(0) - lengths
        remove = lengths - wanted
        # On the CPU, skip groups that already have few enough rows.
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
    # If the merger removed too many rows, some padding is left. Its units are out of range, so clamp them. The error is raised
    # later, when `as_planned` is read.
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
    """Match rows for merging. Returns the row into which each row merges, int64 `[R]`. Rows that are kept map to themselves.

    Args:
        start, length, remove: int64 `[B]`, each group's first row, row count, and number of rows to remove.
        longest: An upper bound on `length`.
        merger, features, attention: See `merge_in_rounds`.
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
    with without_autocast():  # the merger may write to `candidates`, which are not used afterwards
        local = call(merger.package, merger.match, candidates, remove)
    into = arange_on(len(rows) + 1, row.device)  # the last entry is a dummy target for padding
    return into.scatter_(0, place, row.gather(1, local).flatten())[:-1]


def most_rounds(rows: Rows, scope: Scope, target: Sequence[int], merger: Merger) -> int:
    """Return an upper bound on the number of merge rounds, regardless of the video's content."""
    worst = 0
    for count, left in set(zip(rows.per_pair, target, strict=True)):
        if scope == "pair":
            worst = max(worst, merger.rounds(count, left))
        else:  # only the device knows the number of rows per window, so assume the worst case
            longest = min(count, rows.geometry.largest_window)
            cases = ((n, max(1, n - (count - left))) for n in range(1, longest + 1))
            worst = max([worst, *(merger.rounds(n, fewest) for n, fewest in cases)])
    return worst


def share_rows(sizes: torch.Tensor, total: torch.Tensor, longest: int) -> torch.Tensor:
    """Distribute the rows to keep among groups in proportion to their sizes, using the largest remainder method.

    Each nonempty group keeps at least one row. Ties go to the group with the lower index.

    Args:
        sizes: int64 `[B, G]`, the number of rows in each group.
        total: int64 `[B]`, the total number of rows to keep. It must be at least the number of nonempty groups and at most the sum
            of their sizes.
        longest: An upper bound on `sizes`.

    Returns:
        int64 `[B, G]`, the number of rows that each group keeps.
    """
    size = sizes.sum(1, keepdim=True)
    total = total[:, None]
    counts = torch.where(sizes > 0, (total * sizes // size.clamp(min=1)).clamp(min=1), 0)
    missing = total - counts.sum(1, keepdim=True)
    excess = counts * size - total * sizes
    # If rounding down left some rows unassigned, the groups furthest below their exact share each get one more row. One row per
    # group is enough because rounding down took less than one row from each group. It is also always possible because each group
    # that was rounded down has more rows than it keeps.
    more = _first(counts < sizes, excess.argsort(dim=1, stable=True), missing)
    # If too many rows are assigned, because each group keeps at least one, the groups give back rows in turns. In each full turn,
    # every group with more than one row gives one back, so after p turns a group has given back min(p, spare) rows. After `turns`
    # full turns, the groups furthest above their exact share each give back one more row.
    spare = (counts - 1).clamp(min=0)
    give = -missing
    given = torch.minimum(arange_on(longest, sizes.device)[:, None], spare[:, None]).sum(2)  # [B, longest]
    turns = ((given <= give).sum(1, keepdim=True) - 1).clamp(min=0)
    rest = give - given.gather(1, turns)
    less = _first(spare > turns, excess.argsort(dim=1, descending=True, stable=True), rest)
    return counts + more.long() - torch.minimum(turns, spare) - less.long()


def _first(able: torch.Tensor, order: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Select the first `count` (`[B, 1]`) of the `able` groups, in the order given by `order` (`[B, G]`).

    Returns bool `[B, G]`, True for selected groups. If `count` is negative, no groups are selected.
    """
    queue = able.gather(1, order)
    selected = queue & (queue.cumsum(1) <= count)
    return torch.zeros_like(able).scatter_(1, order, selected)
