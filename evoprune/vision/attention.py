"""Attention of rows inside their groups (windows or frame pairs).

`attention_groups` makes what a layer's attention needs, once until rows change. Where reading values costs nothing, groups of
similar length are padded to a common length, and a mask covers the padding; equal groups of neighbouring rows need neither.
Elsewhere, reading the lengths would synchronise. There `PackedGroups` holds all groups for a kernel that reads the lengths on the
device; without one, all groups are padded to the greatest possible length.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.backend import NEVER, attends_by_products, bias_features, devices, form_of_groups
from evoprune.methods import arange_on
from evoprune.model import PATCHES, without_autocast
from evoprune.vision.layout import Scope, bincount_fixed, group_table, group_units, order_tables, runs
from evoprune.vision.rows import Rows


@dataclass(frozen=True)
class PaddedGroups:
    """A batch of B groups, with Q query rows and K key rows each."""

    shape: tuple[int, int]  # (B, Q)
    # int64 `[B, Q]` rows, or neighbouring ones in order, or None where the groups are all rows in order
    query: torch.Tensor | slice | None = None
    key: torch.Tensor | None = None  # int64 `[B, K]` rows, or None where the keys are the queries
    # int64 or bool `[B, K]`, how much each key weighs, 0 at padding; None where all weigh the same
    weight: torch.Tensor | None = None
    inside: torch.Tensor | None = None  # bool `[B, Q]`, False at padding; None without padding, and with `back`
    # int64 `[R]`, twice: the group of each row, and its number in it; None where `query` and `inside` say it
    back: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: Rows | None = None  # all; None where the groups are all rows in order

    @property
    def key_rows(self) -> torch.Tensor | slice | None:
        """The rows that are keys, in one of the forms of `query`."""
        return self.query if self.key is None else self.key

    def parts(self, rows: int) -> Iterator["PaddedGroups"]:
        """Yields the batch in parts of whole groups, of at most so many query or key rows, or of one group."""
        groups, longest = self.shape
        widest = longest
        if self.key is not None:
            widest = max(longest, self.key.shape[1])
        at_once = max(1, rows // widest)
        if at_once >= groups:
            yield self
            return
        for first in range(0, groups, at_once):
            of = slice(first, min(first + at_once, groups))
            query = _some(self.query, of)
            if query is None:
                query = slice(of.start * longest, of.stop * longest)
            key, weight, inside = (_some(x, of) for x in (self.key, self.weight, self.valid))
            yield PaddedGroups((of.stop - of.start, longest), query, key, weight, inside, rows=self.rows)

    def by_head(self, x: torch.Tensor, index: torch.Tensor | slice | None) -> torch.Tensor:
        """Return rows of `x` `[R, 4, heads, d]` as `[B, heads, n*4, d]`; `index`: `query` or `key_rows`, n of each group."""
        if index is not None:
            x = x[index]
        return x.reshape(self.shape[0], -1, *x.shape[-2:]).transpose(1, 2)

    def write(self, answer: torch.Tensor, out: torch.Tensor) -> None:
        """Writes what attention answers the queries, `[B, Q, 4, heads, d]`, to their rows of `out`, `[R, 4, heads, d]`."""
        if isinstance(self.query, slice):
            out[self.query] = answer.flatten(0, 1)
        elif self.valid is None:
            out[self.query] = answer
        else:
            out[self.query[self.valid]] = answer[self.valid]

    @cached_property
    def valid(self) -> torch.Tensor | None:
        """bool `[B, Q]`, which queries are no padding; None for all."""
        if self.back is None:
            return self.inside
        row = torch.ones_like(self.back[0], dtype=torch.bool)
        return row.new_zeros(self.shape).index_put_(self.back, row)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """What is added to the scores of each key patch, float32 `[B, 1, 1, K*4]`: the log of its weight. None for 0."""
        if self.weight is None:
            return None
        return self.weight.float().log().repeat_interleave(PATCHES, dim=1)[:, None, None]


@dataclass(frozen=True)
class PackedGroups:
    """All groups of rows, for a device whose values the CPU does not read."""

    rows: Rows
    scope: Scope
    kernel: Callable  # `varlen_kernel`

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Return the attention of all groups in one call of the kernel; arguments `[patches, heads, d]`, keys group after group."""
        longest = longest_key = self.rows.longest(self.scope)
        if self.rows.mixes(self.scope):
            longest_key = self.rows.geometry.largest(self.scope)
        return self.kernel(q, k, v, *self.ends, longest * PATCHES, longest_key * PATCHES, scale=scale)

    @cached_property
    def keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """int64 `[K]`, key rows, group after group, None for all in order; int64 `[K]`, how much each weighs, None for evenly."""
        rows = self.rows
        if not rows.mixes(self.scope):
            return None, rows.weight
        if rows.size_bias and rows.complete:
            return rows.unit_to_row[order_tables(rows.geometry, rows.pairs)[0]], None
        used = group_units(rows.geometry, rows.pairs, self.scope)[1]
        key, weight = (x.flatten()[used] for x in keys_of_units(rows, self.scope))
        return key.clamp(min=0), weight.long()

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int32 `[G + 1]`, each a zero and the ends of all groups: counted in query patches, and in key patches."""
        rows = self.rows
        query = (first_rows(rows, self.scope)[1] * PATCHES).int()
        if not rows.mixes(self.scope):
            return query, query
        return query, group_units(rows.geometry, rows.pairs, self.scope)[2]


Groups = list[PaddedGroups] | PackedGroups


def attention_groups(rows: Rows, scope: Scope, like: torch.Tensor) -> Groups:
    """Return how rows attend inside their groups of `scope`, on the device and in the dtype of `like`."""
    return form_of_groups(
        like,
        by_length=lambda: groups_by_length(rows, scope),
        packed=lambda kernel: PackedGroups(rows, scope, kernel),
        padded=lambda: [padded_groups(rows, scope)],
    )


def _some(x: torch.Tensor | None, index: slice | torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x[index]


def first_rows(rows: Rows, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return int64 `[R]`, the group of each row; int64 `[G + 1]`, the first row of each group, and the end of the last one."""
    group = rows.group(scope)
    return group, torch.searchsorted(group, arange_on(rows.group_count(scope) + 1, group.device))


def keys_of_units(rows: Rows, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the keys of groups without reading values, `[G, K]`: int64, the row of each of a group's units; and bool, which count.

    A row of several units of a group is as many keys, which weigh together what the size bias says; without it one counts.
    """
    key = F.pad(rows.unit_to_row, (0, 1), value=-1)[group_units(rows.geometry, rows.pairs, scope)[0]]
    if rows.size_bias:
        return key, key >= 0
    key = key.sort(1, descending=True).values
    return key, F.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True) & (key >= 0)


def equal_groups(rows: Rows, groups: int) -> PaddedGroups:
    """Return `groups` groups of equally many neighbouring rows, whose keys are their own rows."""
    shape = groups, len(rows) // groups
    if rows.weight is None:
        return PaddedGroups(shape)
    return PaddedGroups(shape, weight=rows.weight.view(shape))


def weight_of(weight: torch.Tensor | None, key: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return the weight of keys, int64 or bool `[B, K]`, 0 at padding; None where all weigh the same.

    `weight`: int64, of each entry that `key` (int64 `[B, K]`) is an index of, or None for evenly. `valid`: bool `[B, K]`, or None
    without padding.
    """
    if weight is None:
        return valid
    if valid is None:
        return weight[key]
    return torch.where(valid, weight[key], 0)


def padded_groups(rows: Rows, scope: Scope) -> PaddedGroups:
    """Return all groups, padded to the greatest length that a group can have; reads no value."""
    longest = rows.longest(scope)
    full = rows.geometry.even(scope)
    same = rows.counts is not None and min(rows.counts) == longest
    # Each group has as many rows: one for each unit, or so many in each frame pair.
    if full and not rows.mixes(scope) and (rows.reach == "place" or (scope == "pair" and same)):
        return equal_groups(rows, len(rows) // longest)
    group, bounds = first_rows(rows, scope)
    query = (bounds[:-1, None] + arange_on(longest, bounds.device)).clamp(max=len(rows) - 1)
    back = group, (arange_on(len(rows), group.device) - bounds[group]).clamp(max=longest - 1)
    groups = PaddedGroups((rows.group_count(scope), longest), query, back=back, rows=rows)
    if not rows.mixes(scope):
        return replace(groups, weight=weight_of(rows.weight, query, groups.valid))
    if rows.size_bias and rows.complete and full:
        return replace(groups, key=rows.unit_to_row[group_units(rows.geometry, rows.pairs, scope)[0]])
    key, weight = keys_of_units(rows, scope)
    return replace(groups, key=key, weight=weight)


def groups_by_length(rows: Rows, scope: Scope) -> list[PaddedGroups]:
    """Return batches of groups of similar length; reads values.

    Up to four different numbers of keys get a batch each; more are put together where they differ by less than a quarter. Where
    queries and keys are not the same rows, a batch is divided again: its numbers of queries differ by less than a half. So a group
    with one new row is not padded to a full group.
    """
    length = rows.lengths(scope)
    start = length.cumsum(0) - length
    used = length > 0  # a group has query rows, which are neighbours
    start = start[used]
    length = length[used]
    keys = None  # int64, key rows, group after group; None where the keys of a group are its own rows
    key_start = start
    key_length = length
    weight = rows.weight  # how many of the group's units each key row represents; None for evenly
    if rows.mixes(scope):
        keys, key_length, weight = _keys_of_groups(rows, scope, used)
        key_start = key_length.cumsum(0) - key_length
    lengths = key_length.unique()
    if keys is None and len(lengths) == 1:
        return [equal_groups(rows, len(length))]

    def padded(members: torch.Tensor) -> PaddedGroups:
        query, inside = _runs(start[members], length[members], len(rows))
        shape = tuple(query.shape)
        if keys is None:
            return PaddedGroups(shape, query, None, weight_of(weight, query, inside), inside, rows=rows)
        key, valid = _runs(key_start[members], key_length[members], len(keys))
        return PaddedGroups(shape, query, keys[key], weight_of(weight, key, valid), inside, rows=rows)

    share = 1.0  # a batch for each number of keys
    if len(lengths) > 4:
        share = 0.75
    batches = []
    for alike in _alike(key_length, share):
        if keys is None:
            batches.append(padded(alike))
        else:
            batches += [padded(alike[subset]) for subset in _alike(length[alike], 0.5)]
    return batches


def _runs(start: torch.Tensor, length: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return `runs`, as wide as the longest; None for which are valid, if all are. It reads values."""
    index, valid = runs(start, length, int(length.max()), rows)
    if valid.all():
        return index, None
    return index, valid


def _keys_of_groups(
    rows: Rows, scope: Scope, used: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return the rows that represent units of each group that is `used` (bool `[G]`): its own, and others, in any frame pair.

    int64, these rows, group after group; int64, how many each group has; int64, how many units of the group each represents, None
    without size bias.
    """
    limit = len(rows) + rows.geometry.units
    group = group_table(rows.geometry, rows.pairs, scope)[:-1]
    asked = (rows.unit_to_row >= 0) & used[group]  # a group without query rows needs no keys
    both, count = (group * limit + rows.unit_to_row)[asked].unique(return_counts=True)
    if not rows.size_bias:
        count = None
    return both % limit, bincount_fixed(both // limit, rows.group_count(scope))[used], count


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divides groups by `length` (int64 `[G]`), longest first; yields the indices of all above `share` of the longest left."""
    left = length.unique().tolist()
    while left:
        longest = max(left)
        left = [n for n in left if n < longest and n <= share * longest]
        yield ((length <= longest) & (length > max(left, default=0))).nonzero().flatten()


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: Groups,
    received: torch.Tensor | None = None,
    timer: devices.Timer | None = None,
    at_once: int | None = None,
) -> torch.Tensor:
    """Return the softmax attention of every row to the key rows of its group, `[R, 4, heads, d]`.

    Args:
        q, k, v: `[R, 4, heads, d]`, after rotary.
        received: float32 `[R]`, to which the attention is added that each row receives: the mean over heads and over the queries of
            a group, summed over the row's 4 patches. Queries of other frame pairs are left out. `timer` measures the time for it.
        at_once: rows of groups that attend at a time, except in a kernel, which bounds the memory; None for all.
    """
    timer = timer or nullcontext()
    if isinstance(groups, PackedGroups):
        if received is not None:
            with timer:
                received += attention_received(q, k, groups, at_once)
        return attend_packed(q, k, v, groups)
    out = None
    for batch in groups:
        parts = list(batch.parts(at_once or len(k)))
        if batch.back is not None:
            answers = [_attend_padded(q, k, v, part, received, timer) for part in parts]
            return devices.cat(answers)[batch.back]
        for part in parts:
            answer = _attend_padded(q, k, v, part, received, timer)
            if part.query is None:
                return answer.reshape(q.shape)
            if out is None:
                out = torch.empty_like(q)
            part.write(answer, out)
    return out


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: PaddedGroups,
    received: torch.Tensor | None,
    timer: AbstractContextManager,
) -> torch.Tensor:
    """Return the attention of a batch of groups, `[B, Q, 4, heads, d]`; arguments as in `grouped_attention`."""
    query = groups.by_head(q, groups.query)
    key = groups.by_head(k, groups.key_rows)
    value = groups.by_head(v, groups.key_rows)
    bias = groups.bias
    if bias is not None:
        bias = bias.to(q.dtype)
    per_key = None
    if attends_by_products(q, key.shape[2]):
        weight = None
        if received is not None:
            with timer:
                weight = query_weight(groups, q)
        answer, per_key = attend_by_products(query, key, value, bias, weight, timer)
    else:
        answer = F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    if received is not None:
        with timer:
            if per_key is None:
                per_key = received_by_keys(query, key, groups)
            add_by_row(received, per_key, groups)
    return answer.unflatten(2, (-1, PATCHES)).permute(0, 2, 3, 1, 4)


def attend_by_products(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    weight: torch.Tensor | None,
    timer: AbstractContextManager,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return attention `[B, heads, Q, d]` as two matrix products; and the attention received, float32 `[B, K]`, or None.

    For bf16 on a CPU it takes half the time of the fused kernel, if the scores stay in the cache. `k`, `v`: `[B, heads, K, d]`;
    `bias`: `[B, 1, 1, K]`; `weight`: float32 `[B, Q]`, of each query in the attention received, which `timer` measures.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is None:
        added = q.new_empty(1)  # which `beta` leaves out
        beta = 0
    else:
        bias = bias.expand(-1, heads, 1, -1).reshape(batch * heads, 1, keys)
        beta = 1
    out = torch.empty_like(q)
    received = None
    if weight is not None:
        with timer:
            received = torch.zeros(batch * heads, keys, dtype=torch.float32, device=q.device)
            weight = weight.repeat_interleave(heads, 0)[:, :, None]
    held = devices.scores_at_a_time(q.device)
    rows = max(1, min(queries, held // keys))
    groups = max(1, min(len(q), held // (rows * keys)))
    for g in range(0, len(q), groups):
        of = slice(g, g + groups)
        if bias is not None:
            added = bias[of]
        for at in range(0, queries, rows):
            piece = slice(at, at + rows)
            scores = torch.baddbmm(added, q[of, piece], k[of].transpose(1, 2), beta=beta, alpha=dim**-0.5).softmax(-1)
            out[of, piece] = torch.bmm(scores, v[of])
            if received is not None:
                with timer:
                    received[of] += (scores * weight[of, piece]).sum(1)
    if received is not None:
        received = received.view(batch, heads, keys).sum(1)
    return out.view(batch, heads, queries, dim), received


def attention_received(q: torch.Tensor, k: torch.Tensor, groups: Groups, at_once: int | None = None) -> torch.Tensor:
    """Return float32, like the rows of `k`: as `received` of `grouped_attention`, without the output of the attention."""
    total = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    if isinstance(groups, PackedGroups):
        groups = [padded_groups(groups.rows, groups.scope)]
    for batch in groups:
        for part in batch.parts(at_once or len(k)):
            per_key = received_by_keys(part.by_head(q, part.query), part.by_head(k, part.key_rows), part)
            add_by_row(total, per_key, part)
    return total


@without_autocast()
def received_by_keys(queries: torch.Tensor, keys: torch.Tensor, groups: PaddedGroups) -> torch.Tensor:
    """Return the attention that each key patch of groups receives, float32 `[B, K*4]`, from `queries` and `keys` by head."""
    batch, heads, _, dim = queries.shape
    weight = query_weight(groups, queries.transpose(1, 2))
    total = torch.zeros(batch, keys.shape[2], dtype=torch.float32, device=keys.device)
    step = max(1, devices.scores_at_a_time(queries.device) // (batch * heads * keys.shape[2]))
    for at in range(0, queries.shape[2], step):
        scores = ((queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)).float()
        if groups.bias is not None:
            scores = scores + groups.bias
        total += torch.einsum("bhqk,bq->bk", scores.softmax(-1), weight[:, at : at + step])
    return total


def query_weight(groups: PaddedGroups, q: torch.Tensor) -> torch.Tensor:
    """Return the weight of each query (`q`: `[..., heads, d]`) in the mean over its group and heads, float32 `[B, Q*4]`."""
    if groups.valid is None:
        valid = q.new_ones(groups.shape, dtype=torch.float32)
    else:
        valid = groups.valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / q.shape[-2]).repeat_interleave(PATCHES, dim=1)


def add_by_row(received: torch.Tensor, per_key: torch.Tensor, groups: PaddedGroups) -> None:
    """Adds what the key patches of groups receive (`per_key`, float32 `[B, K*4]`) to their rows in `received`, float32 `[R]`."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = groups.key_rows
    if index is None or isinstance(index, slice):
        received[index or slice(None)] += per_row.flatten()
        return
    if groups.rows.reach == "clip":  # keys of other frame pairs receive nothing
        pair = groups.rows.pair_of_row
        per_row = torch.where(pair[index] == pair[groups.query[:, :1]], per_row, 0)
    if groups.weight is not None:
        per_row = torch.where(groups.weight > 0, per_row, 0)
    received.index_add_(0, index.clamp(min=0).flatten(), per_row.flatten())


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: PackedGroups) -> torch.Tensor:
    """Return the attention of all groups by a kernel that reads their lengths on the GPU; it takes neither mask nor bias."""
    dim = q.shape[-1]
    keys, weight = groups.keys
    key = k
    value = v
    if keys is not None:
        key = k[keys]
        value = v[keys]
    if weight is not None:
        q, key, value = with_bias(q, key, value, weight)
    answer = groups.attend(*(x.flatten(0, 1) for x in (q, key, value)), scale=dim**-0.5)
    return answer[..., :dim].unflatten(0, (-1, PATCHES))


def with_bias(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Carries the log of `weight` (int64 `[K]`) in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    They are those of `bias_features`. A weight of 0 is one of e^-`NEVER`.
    """
    dim = q.shape[-1]
    more = bias_features(weight.float().log(), dim, k.dtype, least=-NEVER * dim**0.5)
    extra = more.shape[1]
    more = more[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
