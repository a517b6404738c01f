"""The row table of a video, which the encoder processes from patch embeddings to tokens.

A *row* is a unit computed by the encoder. It has the position of one unit (`unit`) but may represent many units (`unit_to_row`).
Rows are in window order (layout.py) until the last layer has run, and are then sorted by unit. Each layer replaces `values`. Only
`take` and `merge` reduce the number of rows, and only `by_unit` changes their order.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
import torch.nn.functional as F

from evoprune.backend import read_or
from evoprune.methods import Selection, arange_on, nonzero_fixed
from evoprune.vision.layout import Geometry, Scope, bincount_fixed, group_table, order_tables

Reach = Literal["place", "window", "pair", "clip"]
WIDTH = {reach: width for width, reach in enumerate(("place", "window", "pair", "clip"))}


class Aside(Protocol):
    """Rows set aside by a hook, which are added back after the last layer."""

    # int64, the rows computed by layers. All other rows are used only as keys and values. None if layers compute all rows.
    active: torch.Tensor | None

    def whole(self, rows: "Rows") -> "Rows":
        """Return `rows` together with the rows that were set aside."""


@dataclass(eq=False)
class Rows:
    """A table of R rows that represent the N units of a video."""

    values: torch.Tensor  # `[R, 4, hidden]`, or `[R, D]` after the patch merger
    unit: torch.Tensor  # int64 `[R]`, the unit that determines each row's position
    # int64 `[N]`, the row that represents each unit, or -1 if the unit was dropped. If a video is encoded in segments, R + p refers
    # to the previous segment's row at position p, which exists only as keys and values (live/segments.py).
    unit_to_row: torch.Tensor
    geometry: Geometry  # the geometry of a frame pair
    deepstack: torch.Tensor  # `[R, n, D]`, the DeepStack features of the n inner layers run so far
    given: dict[str, torch.Tensor] = field(default_factory=dict)  # `[R, ...]`, the data for a selector, by name
    # How far a unit may be from its row: at the same position, in the same window or frame pair, or anywhere in the clip. A group
    # at least this large contains the rows of all its units.
    reach: Reach = "place"
    # Whether attention weights each key by the number of units it represents in the group, by adding the log of this number to the
    # key's logits (ToMe, arXiv 2210.09461, section 3).
    size_bias: bool = False
    counts: tuple[int, ...] | None = None  # number of rows per frame pair; None if known only on the device
    complete: bool = False  # whether every unit is known to have a row
    aside: Aside | None = None  # if not None, `deepstack` and `given` may already include the rows set aside

    def __len__(self) -> int:
        return len(self.unit)

    @property
    def pairs(self) -> int:
        """The number of frame pairs in the video (T)."""
        return len(self.unit_to_row) // self.geometry.units

    @property
    def active(self) -> torch.Tensor | None:
        """The indices (int64) of the rows computed by layers, or None if layers compute all rows. See `Aside`."""
        return None if self.aside is None else self.aside.active

    @property
    def computed(self) -> int:
        """Number of rows computed by layers, not counting rows used only as keys and values."""
        if self.active is None:
            return len(self)
        return len(self.active)

    @cached_property
    def size(self) -> torch.Tensor:
        """Each row's cluster size (the number of units it represents), int64 `[R]`."""
        sizes = torch.zeros(len(self) + 1, dtype=torch.int64, device=self.unit_to_row.device)
        row = torch.where(self.unit_to_row >= 0, self.unit_to_row, len(self)).clamp(max=len(self))
        return sizes.scatter_add_(0, row, torch.ones_like(row))[:-1]

    @property
    def weight(self) -> torch.Tensor | None:
        """Each row's weight as an attention key, int64 `[R]`, in groups that do not mix (see `mixes`). None if all are equal."""
        return self.size if self.size_bias else None

    @cached_property
    def place(self) -> torch.Tensor:
        """Each row's raster index inside its frame pair, int64 `[R]`."""
        return self.unit % self.geometry.units

    @cached_property
    def pair_of_row(self) -> torch.Tensor:
        """Each row's frame pair, int64 `[R + P]`, or -1 for the P rows of the previous segment."""
        return F.pad(self.unit // self.geometry.units, (0, self.geometry.units), value=-1)

    @cached_property
    def per_pair(self) -> tuple[int, ...]:
        """Number of rows in each frame pair. If `counts` is None, reading this synchronizes with the GPU."""
        return self.counts or tuple(self.lengths("pair").tolist())

    @cached_property
    def unit_order(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The permutation that sorts the rows by unit, int64 `[R]`, and the `unit_to_row` of the sorted rows, int64 `[N]`.

        `take` sets both in advance, which avoids a sort.
        """
        order = self.unit.argsort()
        return order, _append_none(order.argsort())[self.unit_to_row]

    # Groups of rows: windows or frame pairs.

    def group_count(self, scope: Scope) -> int:
        """Return the number of windows or frame pairs in the whole video."""
        return self.pairs * self.geometry.groups(scope)

    def group(self, scope: Scope) -> torch.Tensor:
        """Return each row's group (window or frame pair), int64 `[R]`. Groups are numbered across the whole video."""
        return group_table(self.geometry, self.pairs, scope)[self.unit]

    def lengths(self, scope: Scope) -> torch.Tensor:
        """Return the number of rows in each window or frame pair, int64 `[G]`, not counting padding."""
        total = self.group_count(scope)
        return bincount_fixed(self.group(scope), total + 1)[:total]

    def longest(self, scope: Scope) -> int:
        """Return an upper bound on the number of rows in a window or frame pair, without synchronizing the device."""
        if self.counts:
            rows = max(self.counts)
        else:
            rows = read_or(lambda: max(self.per_pair), self.unit, len(self))
        return min(rows, self.geometry.largest(scope))

    def mixes(self, scope: Scope) -> bool:
        """Return True if rows may represent units outside their own window or frame pair."""
        return WIDTH[self.reach] > WIDTH[scope]

    # Methods that reduce or reorder the rows.

    def take(
        self, selection: Selection, unit_to_token: torch.Tensor, reach: Reach = "clip", complete: bool = False
    ) -> "Rows":
        """Return a new table with the rows of the selected units.

        Args:
            unit_to_token: int64 `[N]`, each unit's index into `selection.kept`, which specifies the unit that represents it, or -1
                to drop the unit.
            reach: The reach of the new rows.
            complete: Whether the selection keeps or represents every unit. The new rows are `complete` only if the old rows are
                complete too.
        """
        _, rank = order_tables(self.geometry, self.pairs)
        at = rank[selection.kept]
        place = torch.zeros_like(rank).scatter_(0, at, 1).cumsum(0)[at] - 1  # the new row of each kept unit
        unit_to_row = _append_none(place)[unit_to_token]
        joins = selection.unit_to_token
        if joins is not None:
            joins = unit_to_row
        means = selection.means
        if means is not None:
            means = place[means[0]], *means[1:]
        unit = torch.empty_like(place).scatter_(0, place, selection.kept)
        ordered = replace(selection, kept=unit, unit_to_token=joins, means=means)
        made = replace(
            self,
            values=self.mean(self.values, ordered),
            deepstack=self.mean(self.deepstack, ordered),
            given={name: self.mean(value, ordered) for name, value in self.given.items()},
            unit=unit,
            unit_to_row=unit_to_row,
            reach=reach,
            size_bias=reach != "place",
            counts=None,
            complete=complete and self.complete,
        )
        made.unit_order = place, unit_to_token
        return made

    def mean(self, x: torch.Tensor, selection: Selection) -> torch.Tensor:
        """Compute the values of the selected units, `[K, ...]`, from the rows' values `x` (`[R, ...]`)."""
        shape = len(selection.kept), *x.shape[1:]
        if not x.numel():
            return x.new_empty(shape)
        return selection.features(x.flatten(1), self.unit_to_row).view(shape)

    def merge(
        self,
        into: torch.Tensor,
        scope: Scope,
        left: int,
        moves: int,
        counts: tuple[int, ...] | None = None,
        size_bias: bool = True,
    ) -> "Rows":
        """Merge rows within windows or frame pairs. Merged rows become means weighted by cluster size.

        Args:
            into: int64 `[R]`, the row into which each row merges. Rows that are kept map to themselves.
            scope: The groups within which rows merge.
            left: The number of rows in the result. If fewer rows are kept, the result ends with padding. Padding rows don't
                correspond to any unit; their `unit` is set to N, so they form a separate group.
            moves: An upper bound on the number of rows that merge into another row.
            counts: The number of rows per frame pair, if known.
            size_bias: See `Rows`.
        """

        def merged(x: torch.Tensor) -> torch.Tensor:
            if x.numel():
                return merge_rows(x, self.size, into, left, moves)
            return x if len(x) == left else x[:left]

        stays = into == arange_on(len(into), into.device)
        number = (stays.cumsum(0) - 1).clamp(max=left - 1)
        alive = arange_on(left, into.device) < stays.sum()
        return replace(
            self,
            values=merged(self.values),
            deepstack=merged(self.deepstack),
            given={name: merged(value) for name, value in self.given.items()},
            unit=torch.where(alive, self.unit[nonzero_fixed(stays, left)], len(self.unit_to_row)),
            unit_to_row=torch.where(self.unit_to_row >= 0, number[into][self.unit_to_row.clamp(min=0)], -1),
            reach=max(scope, self.reach, key=WIDTH.get),
            size_bias=size_bias,
            counts=counts,
        )

    def whole(self) -> "Rows":
        """Return this table together with the rows set aside by a hook."""
        return self if self.aside is None else self.aside.whole(self)

    def by_unit(self) -> "Rows":
        """Return the rows sorted by unit."""
        order, unit_to_row = self.unit_order
        deepstack = self.deepstack
        if deepstack.numel():
            deepstack = deepstack[order]
        return replace(
            self,
            values=self.values[order],
            deepstack=deepstack,
            given={name: value[order] for name, value in self.given.items()},
            unit=self.unit[order],
            unit_to_row=unit_to_row,
        )


def all_units(values: torch.Tensor, deepstack: torch.Tensor, geo: Geometry, pairs: int) -> Rows:
    """Return the rows of a video encoded without reuse, so each unit has its own row."""
    order, rank = order_tables(geo, pairs)
    rows = Rows(values, order, rank, geo, deepstack, counts=(geo.units,) * pairs, complete=True)
    rows.unit_order = rank, arange_on(len(rank), rank.device)
    return rows


def reused_units(
    values: torch.Tensor,
    deepstack: torch.Tensor,
    geo: Geometry,
    source: torch.Tensor,
    counts: Sequence[int],
    unit: torch.Tensor,
) -> Rows:
    """Return the rows of a video whose unchanged units reuse the rows of earlier frame pairs.

    Only changed units have their own row. All other units are represented by the row at the same position in an earlier frame pair.

    Args:
        values, deepstack, counts, unit: See `Rows`.
        source: int64 `[pairs, H*W]`, the frame pair whose row represents each unit. Negative for a row of the previous segment.
    """
    units = source.numel()
    rows = len(unit)
    number = torch.zeros(units, dtype=torch.int64, device=source.device)
    number[unit] = arange_on(rows, source.device)
    place = arange_on(geo.units, source.device)
    unit_to_row = torch.where(source >= 0, number[source.clamp(min=0) * geo.units + place], rows + place).flatten()
    reach = "clip"
    if rows == units:
        reach = "place"
    return Rows(
        values, unit, unit_to_row, geo, deepstack,
        reach=reach, size_bias=reach != "place", counts=tuple(counts), complete=True,
    )  # fmt: skip


def predicted_rows(
    values: torch.Tensor,
    deepstack: torch.Tensor,
    geo: Geometry,
    origin: torch.Tensor,
    counts: Sequence[int],
    unit: torch.Tensor,
) -> Rows:
    """Return the rows of a video in which some units have the same pixels as other units.

    Args:
        values, deepstack, counts, unit: See `Rows`.
        origin: int64 `[N]`, the unit whose row represents each unit.
    """
    number = torch.zeros_like(origin).scatter_(0, unit, arange_on(len(unit), unit.device))
    reach = "place" if len(unit) == len(origin) else "clip"
    return Rows(
        values, unit, number[origin], geo, deepstack,
        reach=reach, size_bias=reach != "place", counts=tuple(counts), complete=True,
    )  # fmt: skip


def _append_none(index: torch.Tensor) -> torch.Tensor:
    """Append -1 to the lookup table `index` (int64 `[n]`) so that looking up -1 returns -1."""
    return F.pad(index, (0, 1), value=-1)


def merge_rows(x: torch.Tensor, size: torch.Tensor, into: torch.Tensor, rows: int, moves: int) -> torch.Tensor:
    """Merge rows of `x` into the kept rows, which become means weighted by cluster size.

    Args:
        x: `[R, ...]`, the values of the rows.
        size: int64 `[R]`, the cluster sizes.
        into: int64 `[R]`, the row into which each row merges. Rows that are kept map to themselves.
        rows: The number of rows in the result. If fewer rows are kept, the result ends with meaningless padding.
        moves: An upper bound on the number of rows that merge into another row.

    Returns:
        `[rows, ...]`, computed in float32 and converted to the dtype of `x`.
    """
    goes = into != arange_on(len(into), into.device)
    stays = ~goes
    kept = nonzero_fixed(stays, rows)
    moved = nonzero_fixed(goes, moves)
    out = x[kept]
    before = size[kept]
    to = (stays.cumsum(0) - 1).clamp(max=rows - 1)[into[moved]]
    # Padding in `moved` has a weight of 0.
    added = torch.where(arange_on(moves, into.device) < goes.sum(), size[moved], 0)
    after = before.index_add(0, to, added)
    # If several rows merge into the same row, only one of their slots in `total` accumulates the sum. It doesn't matter which slot,
    # because they all start with that row's value.
    place = torch.empty_like(before).scatter_(0, to, arange_on(moves, into.device))[to]
    grown = (after > before)[to]  # rows without merges must stay bit-identical
    column = (-1, *[1] * (x.ndim - 1))
    total = out[to].float().mul_(torch.where(grown, before[to], 1).view(column))
    total.index_add_(0, place, x[moved].float().mul_(added.view(column)))
    out[to] = total.div_(torch.where(grown, after[to], 1).view(column)).to(x.dtype)[place]
    return out
