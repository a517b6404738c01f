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

from evoprune.backend import devices
from evoprune.backend.attention import NEVER, attends_by_products, form_of_groups
from evoprune.methods.types import arange_on, bincount_fixed, cat, runs
from evoprune.model.config import PATCHES
from evoprune.model.numerics import without_autocast
from evoprune.vision.layout import Scope, group_table, group_units, order_tables
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
    rows: Rows | None = None  # all, if keys may be of other frame pairs than their group

    def parts(self, rows: int) -> Iterator["PaddedGroups"]:
        """Yields the batch in parts of whole groups, of at most so many query or key rows, or of one group."""
        groups, longest = self.shape
        at_once = max(1, rows // max(longest, 0 if self.key is None else self.key.shape[1]))
        if at_once >= groups:
            yield self
            return
        for first in range(0, groups, at_once):
            of = slice(first, min(first + at_once, groups))
            query = slice(of.start * longest, of.stop * longest) if self.query is None else self.query[of]
            key, weight, inside = (x if x is None else x[of] for x in (self.key, self.weight, self.valid))
            yield PaddedGroups((of.stop - of.start, longest), query, key, weight, inside, rows=self.rows)

    def by_head(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, heads, d]` as `[B, heads, Q*4 or K*4, d]`; `which`: "query" or "key"."""
        index = self.key if which == "key" and self.key is not None else self.query
        rows = x if index is None else x[index]
        return rows.reshape(self.shape[0], -1, *x.shape[2:]).transpose(1, 2)

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
        """Attention of all groups in one call of the kernel; arguments `[patches, heads, d]`, keys group after group."""
        longest = longest_key = self.rows.longest(self.scope)
        if self.rows.mixes(self.scope):
            longest_key = self.rows.geometry.largest(self.scope)
        return self.kernel(q, k, v, *self.ends, longest * PATCHES, longest_key * PATCHES, scale=scale)

    @cached_property
    def keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """int64 `[K]`, key rows, group after group, None for all in order; int64 `[K]`, how much each weighs, None for evenly."""
        rows = self.rows
        if not rows.mixes(self.scope):
            return None, rows.size if rows.size_bias else None
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
        return query, group_units(rows.geometry, rows.pairs, self.scope)[2] if rows.mixes(self.scope) else query


Groups = list[PaddedGroups] | PackedGroups


def attention_groups(rows: Rows, scope: Scope, like: torch.Tensor) -> Groups:
    """Return how rows attend inside their groups of `scope`, on the device and in the dtype of `like`."""
    return form_of_groups(
        like,
        by_length=lambda: groups_by_length(rows, scope),
        packed=lambda kernel: PackedGroups(rows, scope, kernel),
        padded=lambda: [padded_groups(rows, scope)],
    )


def first_rows(rows: Rows, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """int64 `[R]`, the group of each row; int64 `[G + 1]`, the first row of each group, and the end of the last one."""
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


def padded_groups(rows: Rows, scope: Scope) -> PaddedGroups:
    """Return all groups, padded to the greatest length that a group can have; reads no value."""
    longest = rows.longest(scope)
    full = rows.geometry.even(scope)
    same = rows.counts is not None and min(rows.counts) == longest
    if full and not rows.mixes(scope) and (rows.reach == "place" or (scope == "pair" and same)):
        shape = len(rows) // longest, longest
        return PaddedGroups(shape, weight=rows.size.view(shape) if rows.size_bias else None)
    group, bounds = first_rows(rows, scope)
    query = (bounds[:-1, None] + arange_on(longest, bounds.device)).clamp(max=len(rows) - 1)
    back = group, (arange_on(len(rows), group.device) - bounds[group]).clamp(max=longest - 1)
    groups = PaddedGroups((rows.group_count(scope), longest), query, back=back, rows=_if_clip(rows))
    if not rows.mixes(scope):
        return replace(
            groups, weight=torch.where(groups.valid, rows.size[query], 0) if rows.size_bias else groups.valid
        )
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
    count = rows.size if rows.size_bias else None  # how many of the group's units each key row represents
    if rows.mixes(scope):
        keys, key_length, count = _keys_of_groups(rows, scope, used)
        key_start = key_length.cumsum(0) - key_length
    lengths = key_length.unique()
    if keys is None and len(lengths) == 1:
        shape = len(length), int(lengths)
        return [PaddedGroups(shape, weight=count.view(shape) if rows.size_bias else None)]

    def padded(members: torch.Tensor) -> PaddedGroups:
        longest, longest_key = (int(each[members].max()) for each in (length, key_length))
        query, valid = runs(start[members], length[members], longest, len(rows))
        total = len(rows) if keys is None else len(keys)
        key, key_valid = runs(key_start[members], key_length[members], longest_key, total)
        weight = torch.where(key_valid, count[key], 0) if rows.size_bias else None if key_valid.all() else key_valid
        key = None if keys is None else keys[key]
        inside = None if valid.all() else valid
        return PaddedGroups(tuple(query.shape), query, key, weight, inside, rows=_if_clip(rows))

    batches = []
    for like in _alike(key_length, 0.75 if len(lengths) > 4 else 1.0):
        parts = [like] if keys is None else [like[subset] for subset in _alike(length[like], 0.5)]
        batches += map(padded, parts)
    return batches


def _if_clip(rows: Rows) -> Rows | None:
    return rows if rows.reach == "clip" else None


def _keys_of_groups(rows: Rows, scope: Scope, used: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the rows that represent units of each group that is `used` (bool `[G]`): its own, and others, in any frame pair.

    int64, these rows, group after group; int64, how many each group has; int64, how many units of the group each represents.
    """
    limit = len(rows) + rows.geometry.units
    group = group_table(rows.geometry, rows.pairs, scope)[:-1]
    asked = (rows.unit_to_row >= 0) & used[group]  # a group without query rows needs no keys
    both, count = (group * limit + rows.unit_to_row)[asked].unique(return_counts=True)
    return both % limit, bincount_fixed(both // limit, rows.group_count(scope))[used], count


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divides groups by `length` (int64 `[G]`), longest first: each time the indices of all above `share` of the longest left."""
    left = length.unique().tolist()[::-1]
    while left:
        below = [n for n in left[1:] if n <= share * left[0]]
        yield ((length <= left[0]) & (length > (below[0] if below else 0))).nonzero().flatten()
        left = below


def grouped_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: Groups,
    received: torch.Tensor | None = None,
    timer: devices.Timer | None = None,
    at_once: int | None = None,
) -> torch.Tensor:
    """Softmax attention of every row to the key rows of its group, `[R, 4, heads, d]`.

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
            return cat(answers)[batch.back]
        for part in parts:
            answer = _attend_padded(q, k, v, part, received, timer)
            if part.query is None:
                return answer.reshape(q.shape)
            out = torch.empty_like(q) if out is None else out
            if isinstance(part.query, slice):
                out[part.query] = answer.flatten(0, 1)
            else:
                valid = ... if part.valid is None else part.valid
                out[part.query[valid]] = answer[valid]
    return out


def _attend_padded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    groups: PaddedGroups,
    received: torch.Tensor | None,
    timer: AbstractContextManager,
) -> torch.Tensor:
    """Attention of a batch of groups, `[B, Q, 4, heads, d]`; arguments as in `grouped_attention`."""
    query, key, value = (groups.by_head(x, which) for x, which in ((q, "query"), (k, "key"), (v, "key")))
    bias = None if groups.bias is None else groups.bias.to(q.dtype)
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
    """Attention `[B, heads, Q, d]` as two matrix products; and the attention received, float32 `[B, K]`, or None.

    For bf16 on a CPU it takes half the time of the fused kernel, if the scores stay in the cache. `k`, `v`: `[B, heads, K, d]`;
    `bias`: `[B, 1, 1, K]`; `weight`: float32 `[B, Q]`, of each query in the attention received, which `timer` measures.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is not None:
        bias = bias.expand(-1, heads, 1, -1).reshape(batch * heads, 1, keys)
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
        added, beta = (q.new_empty(1), 0) if bias is None else (bias[of], 1)
        for at in range(0, queries, rows):
            piece = slice(at, at + rows)
            scores = torch.baddbmm(added, q[of, piece], k[of].transpose(1, 2), beta=beta, alpha=dim**-0.5).softmax(-1)
            out[of, piece] = torch.bmm(scores, v[of])
            if received is not None:
                with timer:
                    received[of] += (scores * weight[of, piece]).sum(1)
    out = out.view(batch, heads, queries, dim)
    return out, None if received is None else received.view(batch, heads, keys).sum(1)


def attention_received(q: torch.Tensor, k: torch.Tensor, groups: Groups, at_once: int | None = None) -> torch.Tensor:
    """float32, like the rows of `k`: as `received` of `grouped_attention`, without the output of the attention."""
    total = torch.zeros(len(k), dtype=torch.float32, device=k.device)
    for batch in [padded_groups(groups.rows, groups.scope)] if isinstance(groups, PackedGroups) else groups:
        for part in batch.parts(at_once or len(k)):
            per_key = received_by_keys(part.by_head(q, "query"), part.by_head(k, "key"), part)
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
        scores = (queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)
        probs = (scores.float() if groups.bias is None else scores.float() + groups.bias).softmax(-1)
        total += torch.einsum("bhqk,bq->bk", probs, weight[:, at : at + step])
    return total


def query_weight(groups: PaddedGroups, q: torch.Tensor) -> torch.Tensor:
    """float32 `[B, Q*4]`: the weight of each query (`q`: `[..., heads, d]`) in the mean over heads and queries of its group."""
    valid = q.new_ones(groups.shape, dtype=torch.float32) if groups.valid is None else groups.valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / q.shape[-2]).repeat_interleave(PATCHES, dim=1)


def add_by_row(received: torch.Tensor, per_key: torch.Tensor, groups: PaddedGroups) -> None:
    """Adds what the key patches of groups receive (`per_key`, float32 `[B, K*4]`) to their rows in `received`, float32 `[R]`."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = groups.key if groups.key is not None else groups.query
    if index is None or isinstance(index, slice):
        received[index or slice(None)] += per_row.flatten()
        return
    if groups.rows is not None:  # keys of other frame pairs receive nothing
        pair = groups.rows.pair_of_row
        per_row = torch.where(pair[index] == pair[groups.query[:, :1]], per_row, 0)
    if groups.weight is not None:
        per_row = torch.where(groups.weight > 0, per_row, 0)
    received.index_add_(0, index.clamp(min=0).flatten(), per_row.flatten())


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: PackedGroups) -> torch.Tensor:
    """Attention of all groups by a kernel that reads their lengths on the GPU; it takes neither mask nor bias."""
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

    The kernel scales all products by 1 / sqrt(d), so the log is multiplied by sqrt(d) here. It is the sum of two numbers, because
    one bf16 number would be off by up to 2^-9 of it. A weight of 0 is one of e^-`NEVER`. Zeros fill up to a multiple of eight
    dimensions, which kernels need.
    """
    dim = q.shape[-1]
    extra = -(dim + 2) % 8 + 2
    value = weight.float().log().clamp(min=-NEVER) * dim**0.5
    high = value.to(k.dtype)
    low = (value - high.float()).to(k.dtype)
    more = F.pad(torch.stack([high, low], -1), (0, extra - 2))[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
