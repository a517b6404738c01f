"""What happens to rows between layers without a selector, and what a selector needs of them.

A `Reduction` reduces rows: `Merging`, as a merger decides, and `Followers`, which set rows aside (IPCV). `Gathering` collects.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from evoprune.backend import devices
from evoprune.errors import call
from evoprune.methods.base import Merger, Selector
from evoprune.methods.plans import Stage, TowerShape
from evoprune.methods.ranking import merge_rows, snap
from evoprune.methods.types import Candidates, arange_on, bincount_fixed, nonzero_fixed, runs, share_rows
from evoprune.model.numerics import without_autocast
from evoprune.vision.attention import AttentionPlan, attention_received
from evoprune.vision.layout import Scope, TokenLayout, merged_layout

Compared = tuple[torch.Tensor | None, torch.Tensor | None]
Reduced = tuple[torch.Tensor, TokenLayout]
KNOWN = ("attention", "keys", "middle")
MIDDLE = 7 / 32, 23 / 32  # the layers of "middle", in relative depth: those of Nuwa (arXiv 2602.02951)


class Reduction:
    """The base of what merges rows or sets them aside; by itself it does nothing. One object a video."""

    size_bias: bool = True  # whether attention weighs a row by its cluster size inside the group
    needs: frozenset[str] = frozenset()  # what `after` compares of a layer: as in `Merger.needs`

    def begin(self, x: torch.Tensor) -> None:
        """Notes the rows before the first layer, `[R, 4, hidden]`."""

    def active(self, layer: int) -> torch.Tensor | None:
        """int64: the rows that go through the layer's MLP; None for all."""
        return None

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        """Return whether `after` changes anything after a layer."""
        return False

    def after(self, layer: int, scope: Scope, x: torch.Tensor, layout: TokenLayout, compared: Compared) -> Reduced:
        """Return the rows for the next layer and their layout, from `x` (`[R, 4, hidden]`) after a layer whose attention has
        `scope`.

        `compared`: features of keys (float32 `[R, 4 * d]`) and attention received (float32 `[R]`) of the layer, None unless `needs`
        asks for it.
        """
        return x, layout

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        """Return the states `[R', 4, hidden]` of all rows that leave the tower, from those that a layer has computed."""
        return x

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """Values `[R', ...]` of all rows that leave the tower, from those of the rows of a layer."""
        return values

    def joined(self, values: torch.Tensor, before: TokenLayout, after: TokenLayout) -> torch.Tensor:
        """Values `[R', ...]` of all rows that leave the tower, as `after` has changed their layout `before` into another one."""
        return values


class Gathering:
    """Collects what a selector needs; attention and keys are those of the tower's last full-attention layer.

    `merge`: the patch merger, from float32 `[R, 4, hidden]` to `[R, D]`.

    Raises TypeError: the selector needs something unknown. ValueError: the tower has no full-attention layer.
    """

    def __init__(self, selector: Selector, tower: TowerShape, merge: Callable[[torch.Tensor], torch.Tensor]):
        if unknown := sorted(selector.needs - set(KNOWN)):
            known = f"after the encoder there is {', '.join(KNOWN)}"
            raise TypeError(f"method {selector.name} needs {unknown[0]!r}; {known}")
        if not tower.full_layers:
            raise ValueError(f"method {selector.name} needs a full-attention layer, and this tower has none")
        self.layer = max(tower.full_layers)  # that is looked at
        first, last = (min(round(share * tower.depth), tower.depth - 1) for share in MIDDLE)
        # After which states are added
        self.middle = range(first, last + 1) if "middle" in selector.needs else range(0)
        self._merge = merge
        self._needs = selector.needs
        self._states: torch.Tensor | None = None
        self._values: dict[str, torch.Tensor] = {}

    @property
    def needs_keys(self) -> bool:
        return "keys" in self._needs

    def look(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        keys: torch.Tensor | None,
        layout: TokenLayout,
        groups: AttentionPlan,
        at_once: int,
        spread: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        """Computes the values of rows in that layer; `q`, `k`, `groups`, `at_once` as in `attention_received`, of frame pairs.

        `keys`: float32 `[R, 4 * d]`, features of keys before rotary; `spread`: the values of all rows, of those of the layer.
        """
        if "attention" in self._needs:
            self._values["attention"] = spread(
                attention_received(q, k, groups, at_once)[: len(q)] * layout.geometry.units
            )
        if self.needs_keys:
            self._values["keys"] = spread(keys)

    def add_states(self, x: torch.Tensor) -> None:
        """Adds the rows after one of the layers `middle`, `[R, 4, hidden]`, to the states of which it is the mean."""
        share = x.float() / len(self.middle)
        self._states = share if self._states is None else self._states + share

    def collected(self, order: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the values by name, float32 `[E, ...]`, in the `order` of these rows, int64 `[E]`."""
        if self._states is not None:
            self._values["middle"] = self._merge(self._states).float()
            self._states = None
        return {name: self._values[name][order] for name in sorted(self._values)}


class Merging(Reduction):
    """Rows merge after some layers, in windows or frame pairs, as a merger decides.

    `left`: by the number of layers that have run, where rows merge, the rows of each frame pair from there on.
    `failed` gets bool tensors without dimension, which are read at the end: whether a group did not lose its rows.
    """

    def __init__(self, merger: Merger, left: Mapping[int, tuple[int, ...]], failed: list[torch.Tensor]):
        self._merger = merger
        self._left = left
        self._failed = failed
        self.size_bias = merger.size_bias
        self.needs = merger.needs

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        return self._left.get(layer + 1, layout.per_pair) != layout.per_pair

    def after(self, layer: int, scope: Scope, x: torch.Tensor, layout: TokenLayout, compared: Compared) -> Reduced:
        """In rounds, until each frame pair has its target.

        Where shapes are static, the rounds cannot end early: there are as many as the worst case needs, and until the last one
        merged rows stay at the end as padding.

        Raises RuntimeError: the merger removed no row in a round, or too many; raised only where shapes are not static.
        """
        features, received = compared
        features = x.flatten(1).float() if features is None else features
        target = self._left[layer + 1]
        static = not devices.exact_shapes(x.device)
        rows = _RoundRows(x, features, received, layout, scope)
        longest = layout.longest(scope)
        goal = devices.to_device(torch.tensor(target, dtype=torch.int64, device="cpu"), x.device)
        wanted = share_rows(rows.lengths.view(len(target), -1), goal, longest).flatten()
        rounds = most_rounds(layout, scope, target, self._merger) if static else layout.rows - sum(target)
        for left in reversed(range(rounds)):
            merged = self._round(rows, wanted, longest, target, last=not left, static=static)
            if merged is None:
                break
            rows = merged
        layout = rows.layout
        if not static:
            if layout.rows != sum(target):
                problem = f"left {layout.rows} rows where {sum(target)} were planned"
                raise RuntimeError(f"method {self._merger.name} {problem}")
            return rows.x, layout
        self._failed.append((rows.lengths != wanted).any())
        # A merger that removed too many rows leaves padding. `finish` reports it; until then padding must stay inside the last
        # frame pair.
        return rows.x, replace(layout, unit=layout.unit.clamp(max=len(layout.unit_to_row) - 1))

    def _round(
        self,
        rows: "_RoundRows",
        wanted: torch.Tensor,
        longest: int,
        target: tuple[int, ...],
        *,
        last: bool,
        static: bool,
    ) -> "_RoundRows | None":
        """One round: a call of the merger, and the merging that it decides. None if every group has lost its rows.

        `wanted`: int64 `[groups]`, the target of each group; `longest`: upper bound of its rows now; `target`: rows of each frame
        pair after the last round.
        """
        layout = rows.layout
        length = rows.lengths
        start = length.cumsum(0) - length
        remove = length - wanted
        if not static:
            busy = (remove > 0).nonzero().flatten()
            if not len(busy):
                return None
            start = start[busy]
            length = length[busy]
            remove = remove[busy]
            longest = int(length.max())
        row, valid = runs(start, length, longest, layout.rows)
        candidates = Candidates(
            features=rows.features[row],
            attention=None if rows.attention is None else rows.attention[row],
            place=layout.place[row],
            size=layout.size[row],
            valid=valid,
            width=layout.geometry.width,
        )
        place = torch.where(valid, row, layout.rows).flatten()
        with without_autocast():  # the merger may write into what it gets: nothing reads that again
            local = call(self._merger.package, self._merger.match, candidates, remove)
        # int64 `[R]`: the row that each row merges into, its own index if it stays. A last entry takes the values at padding.
        into = arange_on(layout.rows + 1, row.device)
        into = into.scatter_(0, place, row.gather(1, local).flatten())[:-1]
        stays = into == arange_on(layout.rows, into.device)
        if static:
            left = sum(target) if last else layout.rows
            moves = layout.rows - sum(target)
        else:
            left = int(stays.sum())
            moves = layout.rows - left
            if not moves:
                raise RuntimeError(f"method {self._merger.name} merged nothing in a {rows.scope} that must lose rows")
        attention = rows.attention
        if attention is not None:
            attention = torch.zeros_like(attention).index_add_(0, into, attention)[nonzero_fixed(stays, left)]
        x, features = (merge_rows(tensor, layout.size, into, left, moves) for tensor in (rows.x, rows.features))
        counts = target if left == sum(target) else None
        return _RoundRows(x, features, attention, merged_layout(layout, into, rows.scope, left, counts), rows.scope)

    def joined(self, values: torch.Tensor, before: TokenLayout, after: TokenLayout) -> torch.Tensor:
        """A merged row has the size-weighted mean."""
        if not values.numel():
            return values.new_empty(after.rows, *values.shape[1:])
        into = after.unit_to_row[before.unit]
        size = before.size.float()
        weight = size.new_zeros(after.rows).index_add_(0, into, size).clamp_(min=1)
        wide = (-1, *[1] * (values.ndim - 1))
        total = torch.zeros(after.rows, *values.shape[1:], dtype=torch.float32, device=values.device)
        total.index_add_(0, into, values.float() * size.view(wide))
        return (total / weight.view(wide)).to(values.dtype)


@dataclass(frozen=True)
class _RoundRows:
    """Rows between two rounds of merging."""

    x: torch.Tensor  # `[R, 4, hidden]`
    features: torch.Tensor  # float32 `[R, D]`, which the merger compares; a merged row has the size-weighted mean
    attention: torch.Tensor | None  # float32 `[R]`, of which a merged row has the sum
    layout: TokenLayout
    scope: Scope  # of the groups

    @property
    def lengths(self) -> torch.Tensor:
        """int64 `[groups]`: rows of each group. Padding counts as one more group, which is left out."""
        total = self.layout.group_count(self.scope)
        return bincount_fixed(self.layout.group_of(self.layout.unit, self.scope), total + 1)[:total]


def most_rounds(layout: TokenLayout, scope: Scope, target: Sequence[int], merger: Merger) -> int:
    """Return the most rounds until every group has lost its rows, for any content."""
    worst = 0
    for rows, left in set(zip(layout.per_pair, target, strict=True)):
        if scope == "pair":
            worst = max(worst, merger.rounds(rows, left))
        else:  # only the device knows how many rows a window has and loses
            longest = min(rows, layout.geometry.largest_window)
            cases = ((n, max(1, n - (rows - left))) for n in range(1, longest + 1))
            worst = max([worst, *(merger.rounds(n, fewest) for n, fewest in cases)])
    return worst


class Followers(Reduction):
    """Rows, of which every unit is one, that are set aside and come back at the end of the tower.

    After some layers (`Stage.first_layer`) each frame pair keeps the rows that the last layer changed most. A dropped row remembers
    its state and the kept rows nearest to it. Until `SetAside.until` it moves as these move on average, and it stays a key and a
    value of attention, but no MLP computes it. Then the kept rows go on alone. After the last layer all dropped rows come back,
    moved in the same way (IPCV, arXiv 2512.18747). Every shape follows from the plan, so nothing synchronises.
    """

    size_bias = False

    def __init__(self, stage: Stage, depth: int):
        self._first = stage.first_layer
        self._plan = stage.reduce
        self._depth = depth
        self._earlier: torch.Tensor | None = None  # the rows before the layer whose changes decide
        self._saved: torch.Tensor | None = None  # [R, 4, hidden], the rows after that layer

    def begin(self, x: torch.Tensor) -> None:
        if self._first == 1:
            self._earlier = x

    def active(self, layer: int) -> torch.Tensor | None:
        return self._kept if self._first <= layer < self._plan.until else None

    def acts(self, layer: int, layout: TokenLayout) -> bool:
        return self._first - 1 <= layer + 1 <= self._plan.until or layer + 1 == self._depth

    def after(self, layer: int, scope: Scope, x: torch.Tensor, layout: TokenLayout, compared: Compared) -> Reduced:
        plan = self._plan
        done = layer + 1
        if done < self._first:
            self._earlier = x
            return x, layout
        if done == self._first:
            self._divide(x, layout)
        elif done <= plan.until:
            x = self._moved(x[self._kept])
        if done == self._depth:
            return self.all_rows(x), self._layout
        return (x[self._kept], self._layout_of_kept) if done == plan.until else (x, layout)

    def all_rows(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._saved is None or len(x) == len(self._saved) else self._moved(x)

    def spread(self, values: torch.Tensor) -> torch.Tensor:
        """A dropped row has the mean of the rows that it follows."""
        if self._saved is None or len(values) == len(self._saved):
            return values
        full = values.new_empty(len(self._saved), *values.shape[1:])
        full[self._kept] = values
        full[self._dropped] = self._mean_of_near(values).to(values.dtype)
        return full

    def _divide(self, x: torch.Tensor, layout: TokenLayout) -> None:
        """Decides which rows stay, and whom the others follow."""
        geo = layout.geometry
        pairs = layout.pairs
        keep = self._plan.left
        rows = x.flatten(1).float().view(pairs, geo.units, -1)
        change = (rows - self._earlier.flatten(1).float().view_as(rows)).norm(dim=2)
        change = snap(change / change.amax(1, keepdim=True).clamp(min=1e-30))
        rank = geo.order.argsort()  # of each place in window order
        order = rank[change[:, rank].argsort(dim=1, descending=True, stable=True)]  # ties by place
        kept = order[:, :keep].sort().values
        dropped = order[:, keep:].sort().values
        first = arange_on(pairs, x.device)[:, None]
        near = nearest_rows(rows, kept, dropped, self._plan.neighbours)
        self._near = (near + first[:, :, None] * keep).flatten(0, 1)
        first = first * geo.units
        self._kept, self._dropped = (kept + first).flatten(), (dropped + first).flatten()
        self._saved, self._earlier, self._layout = x, None, layout
        # the others own nothing
        unit = layout.unit[self._kept]
        unit_to_row = torch.full_like(layout.unit_to_row, -1)
        unit_to_row[unit] = arange_on(len(unit), unit.device)
        self._layout_of_kept = TokenLayout(geo, pairs, unit, unit_to_row, "window", (keep,) * pairs)

    def _moved(self, kept: torch.Tensor) -> torch.Tensor:
        """Return all rows `[R, 4, hidden]`, from the kept ones: a dropped row has moved as the rows that it follows, on average."""
        moved = self._saved.index_copy(0, self._kept, kept)
        move = self._mean_of_near(kept.float() - self._saved[self._kept].float())
        return moved.index_copy_(0, self._dropped, (self._saved[self._dropped].float() + move).to(moved.dtype))

    def _mean_of_near(self, values: torch.Tensor) -> torch.Tensor:
        """float32 `[dropped, ...]`: for each dropped row the mean of `values` (`[kept, ...]`) over the rows that it follows."""
        return sum(values[near].float() for near in self._near.unbind(1)) / self._near.shape[1]


def nearest_rows(rows: torch.Tensor, kept: torch.Tensor, dropped: torch.Tensor, count: int) -> torch.Tensor:
    """int64 `[B, d, min(count, k)]`: indices in `kept` of the rows nearest to each dropped row, the nearest first; ties by index.

    `rows`: float32 `[B, n, D]`; `kept`, `dropped`: int64 `[B, k]` and `[B, d]`, indices of rows.
    """
    wide = (-1, -1, rows.shape[2])
    dropped_rows, kept_rows = (rows.gather(1, index[:, :, None].expand(wide)) for index in (dropped, kept))
    distance = torch.cdist(dropped_rows, kept_rows)
    longest = distance.flatten(1).amax(1)[:, None, None] if distance.numel() else distance.new_ones(())
    order = snap(distance / longest.clamp(min=1e-30)).argsort(dim=2, stable=True)
    return order[:, :, :count]
