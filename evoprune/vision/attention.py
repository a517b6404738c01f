"""Computes attention between rows within groups (windows or frame pairs).

`attention_groups` prepares the groups for a layer's attention, and the result can be reused until the rows change. On the CPU,
where reading values is free, groups of similar length are padded to a common length, and a mask hides the padding. If all groups
consist of contiguous rows and have the same length, no padding or mask is needed. On other devices, reading the lengths would force
a synchronization, so `PackedGroups` passes all groups to a kernel that reads the lengths on the device. If no such kernel is
available, all groups are padded to the maximum length.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.backend import Attention, Device, Timer
from evoprune.methods import arange_on
from evoprune.model import PATCHES, without_autocast
from evoprune.vision.layout import Scope, bincount_fixed, cat, group_table, group_units, order_tables, runs
from evoprune.vision.rows import Rows

# Name of the received attention when it is computed separately, in float32 (`attention_received`). "attention", on the other hand,
# is a by-product of the layer's own computation.
PRECISE_ATTENTION = "precise attention"


@dataclass(frozen=True)
class PaddedGroups:
    """A batch of B attention groups, each padded to Q query rows and K key rows."""

    shape: tuple[int, int]  # (B, Q)
    # The query rows, either as int64 indices `[B, Q]` or as a slice of contiguous rows. None means all rows in order.
    query: torch.Tensor | slice | None = None
    key: torch.Tensor | None = None  # int64 `[B, K]`, the key rows; None if they are the same as the query rows
    # int64 or bool `[B, K]`, the key weights, 0 for padding. None if all weights are equal.
    weight: torch.Tensor | None = None
    # bool `[B, Q]`, False for padding. None if there is no padding or if `back` is set.
    inside: torch.Tensor | None = None
    # Two int64 `[R]` tensors: each row's group and its index within the group. None if `query` and `inside` are sufficient.
    back: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: Rows | None = None  # the rows of the video; None if the groups contain all rows in order

    @property
    def key_rows(self) -> torch.Tensor | slice | None:
        """The rows that serve as keys: indices or a slice, as described for `query`."""
        return self.query if self.key is None else self.key

    def parts(self, rows: int) -> Iterator["PaddedGroups"]:
        """Split the batch into parts. Parts with more than one group have at most `rows` query rows and at most `rows` key rows."""
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
            query = _index(self.query, of)
            if query is None:
                query = slice(of.start * longest, of.stop * longest)
            key, weight, inside = (_index(x, of) for x in (self.key, self.weight, self.valid))
            yield PaddedGroups((of.stop - of.start, longest), query, key, weight, inside, rows=self.rows)

    def by_head(self, x: torch.Tensor, index: torch.Tensor | slice | None) -> torch.Tensor:
        """Gather rows of `x` (`[R, 4, heads, d]`) for attention. Returns `[B, heads, n*4, d]`.

        `index` is either `query` or `key_rows`, with n rows per group.
        """
        if index is not None:
            x = x[index]
        return x.reshape(self.shape[0], -1, *x.shape[-2:]).transpose(1, 2)

    def write(self, answer: torch.Tensor, out: torch.Tensor) -> None:
        """Write the attention output `answer` (`[B, Q, 4, heads, d]`) to the query rows of `out` (`[R, 4, heads, d]`)."""
        if isinstance(self.query, slice):
            out[self.query] = answer.flatten(0, 1)
        elif self.valid is None:
            out[self.query] = answer
        else:
            out[self.query[self.valid]] = answer[self.valid]

    @cached_property
    def valid(self) -> torch.Tensor | None:
        """Query row mask, bool `[B, Q]`, False for padding. None if there is no padding."""
        if self.back is None:
            return self.inside
        row = torch.ones_like(self.back[0], dtype=torch.bool)
        return row.new_zeros(self.shape).index_put_(self.back, row)

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """The log weight of each key patch, float32 `[B, 1, 1, K*4]`, to add to the attention scores. None if all are 0."""
        if self.weight is None:
            return None
        return self.weight.float().log().repeat_interleave(PATCHES, dim=1)[:, None, None]


@dataclass(frozen=True)
class PackedGroups:
    """All attention groups of a video, for a kernel that reads the group lengths on the device."""

    rows: Rows
    scope: Scope
    kernel: Callable  # `Attention.varlen_kernel`

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
        """Compute attention within all groups in a single kernel call.

        Args:
            q, k, v: `[patches, heads, d]`, sorted by group.
        """
        longest = longest_key = self.rows.longest(self.scope)
        if self.rows.mixes(self.scope):
            longest_key = self.rows.geometry.largest(self.scope)
        return self.kernel(q, k, v, *self.ends, longest * PATCHES, longest_key * PATCHES, scale=scale)

    @cached_property
    def keys(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The key rows, sorted by group, and their weights, each as int64 `[K]`.

        If the key rows are None, all rows are keys, in order. If the weights are None, all keys are weighted equally.
        """
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
        """Group offsets in query patches and in key patches, each as int32 `[G + 1]`, starting with 0."""
        rows = self.rows
        query = (first_rows(rows, self.scope)[1] * PATCHES).int()
        if not rows.mixes(self.scope):
            return query, query
        return query, group_units(rows.geometry, rows.pairs, self.scope)[2]


Groups = list[PaddedGroups] | PackedGroups


def attention_groups(rows: Rows, scope: Scope, like: torch.Tensor) -> Groups:
    """Return the windows or frame pairs in the most efficient data structure for the device and dtype of `like`."""
    return Attention.of(like).form_of_groups(
        by_length=lambda: groups_by_length(rows, scope),
        packed=lambda kernel: PackedGroups(rows, scope, kernel),
        padded=lambda: [padded_groups(rows, scope)],
    )


def _index(x: torch.Tensor | None, index: slice | torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x[index]


def first_rows(rows: Rows, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each row's group, int64 `[R]`, and the group offsets in rows, int64 `[G + 1]`."""
    group = rows.group(scope)
    return group, torch.searchsorted(group, arange_on(rows.group_count(scope) + 1, group.device))


def keys_of_units(rows: Rows, scope: Scope) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each group's keys, one per unit in the group, without synchronizing the device.

    If a row represents several units of a group, it appears as several keys. With size bias, all of them are valid, which weights
    the row by its number of units. Without size bias, only one of them is valid.

    Returns:
        int64 `[G, K]`, the rows that serve as keys, and bool `[G, K]`, True for valid keys.
    """
    key = F.pad(rows.unit_to_row, (0, 1), value=-1)[group_units(rows.geometry, rows.pairs, scope)[0]]
    if rows.size_bias:
        return key, key >= 0
    key = key.sort(1, descending=True).values
    return key, F.pad(key[:, 1:] != key[:, :-1], (1, 0), value=True) & (key >= 0)


def equal_groups(rows: Rows, groups: int) -> PaddedGroups:
    """Divide the rows, in order, into groups of equal length. Rows attend only to rows in their own group."""
    shape = groups, len(rows) // groups
    if rows.weight is None:
        return PaddedGroups(shape)
    return PaddedGroups(shape, weight=rows.weight.view(shape))


def weight_of(weight: torch.Tensor | None, key: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    """Return the key weights, int64 or bool `[B, K]`, with 0 for padding, or None if all weights are equal.

    Args:
        weight: int64, the weights indexed by `key`. None if all weights are equal.
        key: int64 `[B, K]`, indices into `weight`.
        valid: bool `[B, K]`, False for padding. None if there is no padding.
    """
    if weight is None:
        return valid
    if valid is None:
        return weight[key]
    return torch.where(valid, weight[key], 0)


def padded_groups(rows: Rows, scope: Scope) -> PaddedGroups:
    """Return all groups as one batch, padded to the maximum length, without synchronizing the device."""
    longest = rows.longest(scope)
    full = rows.geometry.even(scope)
    same = rows.counts is not None and min(rows.counts) == longest
    # If there is one row per unit, or if all frame pairs have the same number of rows, all groups have the same length.
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
    """Return batches of groups with similar lengths. Reads the lengths back from the device.

    If the groups have at most four distinct key counts, each batch contains the groups with one of these counts. Otherwise, each
    group in a batch has more than three quarters as many keys as the longest group in the batch. If queries and keys are different
    rows, each batch is split again so that each group has more than half as many queries as the longest group. That way, a group
    with a single new row isn't padded to the length of a full group.
    """
    length = rows.lengths(scope)
    start = length.cumsum(0) - length
    used = length > 0  # whether a group has query rows, which are always contiguous in the row table
    start = start[used]
    length = length[used]
    keys = None  # int64, the key rows, sorted by group; None if each group's keys are its own rows
    key_start = start
    key_length = length
    weight = rows.weight  # number of the group's units represented by each key row; None if all weights are equal
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

    share = 1.0  # one batch per key count
    if len(lengths) > 4:
        share = 0.75
    batches = []
    for alike in _by_similar_length(key_length, share):
        if keys is None:
            batches.append(padded(alike))
        else:
            batches += [padded(alike[subset]) for subset in _by_similar_length(length[alike], 0.5)]
    return batches


def _runs(start: torch.Tensor, length: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `runs` with the maximum length. The returned mask is None if there is no padding. Reads the lengths from the device."""
    index, valid = runs(start, length, int(length.max()), rows)
    if valid.all():
        return index, None
    return index, valid


def _keys_of_groups(
    rows: Rows, scope: Scope, used: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Return each group's key rows, which represent the group's units and may belong to other frame pairs.

    Args:
        used: bool `[G]`, True for groups with query rows. All other groups have no keys.

    Returns:
        Three int64 tensors: the key rows, sorted by group; the number of key rows in each group with query rows; and the number of
        the group's units represented by each key row. Without size bias, the third value is None.
    """
    limit = len(rows) + rows.geometry.units
    group = group_table(rows.geometry, rows.pairs, scope)[:-1]
    used_units = (rows.unit_to_row >= 0) & used[group]
    group_and_row, count = (group * limit + rows.unit_to_row)[used_units].unique(return_counts=True)
    if not rows.size_bias:
        count = None
    return group_and_row % limit, bincount_fixed(group_and_row // limit, rows.group_count(scope))[used], count


def _by_similar_length(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divide groups into batches by `length` (int64 `[G]`), and yield the group indices of each batch.

    Each batch contains the longest remaining groups and all groups longer than `share` times that length.
    """
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
    timer: Timer | None = None,
    at_once: int | None = None,
) -> torch.Tensor:
    """Compute softmax attention from each row to the key rows in its group. Returns `[R, 4, heads, d]`.

    Args:
        q, k, v: `[R, 4, heads, d]`, after rotary.
        groups: The groups of the rows.
        received: float32 `[R]`, an accumulator for the attention received by each row, updated in place. Received attention is
            averaged over heads and over the group's queries, and summed over the row's four patches. Queries in other frame pairs
            are ignored. None skips this computation.
        timer: Measures the time spent on `received`.
        at_once: The number of query rows to process at a time, which limits memory usage. None processes all rows at once. Kernels
            that read lengths on the device ignore this limit.
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
    """Compute attention within a batch of groups, `[B, Q, 4, heads, d]`. For the arguments, see `grouped_attention`."""
    query = groups.by_head(q, groups.query)
    key = groups.by_head(k, groups.key_rows)
    value = groups.by_head(v, groups.key_rows)
    bias = groups.bias
    if bias is not None:
        bias = bias.to(q.dtype)
    per_key = None
    if Attention.of(q).prefers_products(key.shape[2]):
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
    """Compute attention as two matrix products instead of calling the fused kernel.

    In bf16 on a CPU, this takes half the time of the fused kernel, provided that the scores fit in the CPU cache.

    Args:
        q: `[B, heads, Q, d]`.
        k, v: `[B, heads, K, d]`.
        bias: `[B, 1, 1, K]`, added to the scores, or None.
        weight: float32 `[B, Q]`, each query's weight in the received attention. None skips the received attention.
        timer: Measures the time spent on the received attention.

    Returns:
        The attention output `[B, heads, Q, d]`, and the received attention (float32 `[B, K]`), or None if `weight` is None.
    """
    batch, heads, queries, dim = q.shape
    keys = k.shape[2]
    q, k, v = (x.reshape(batch * heads, -1, dim) for x in (q, k, v))
    if bias is None:
        added = q.new_empty(1)  # a placeholder, ignored because `beta` is 0
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
    score_limit = Device(q.device).scores_at_a_time
    rows = max(1, min(queries, score_limit // keys))
    groups = max(1, min(len(q), score_limit // (rows * keys)))
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
    """Compute only the attention received by each row of `k`, float32, without the attention output. See `grouped_attention`."""
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
    """Compute the attention received by each key patch, float32 `[B, K*4]`. `queries` and `keys` come from `by_head`."""
    batch, heads, _, dim = queries.shape
    weight = query_weight(groups, queries.transpose(1, 2))
    total = torch.zeros(batch, keys.shape[2], dtype=torch.float32, device=keys.device)
    step = max(1, Device(queries.device).scores_at_a_time // (batch * heads * keys.shape[2]))
    for at in range(0, queries.shape[2], step):
        scores = ((queries[:, :, at : at + step] * dim**-0.5) @ keys.transpose(2, 3)).float()
        if groups.bias is not None:
            scores = scores + groups.bias
        total += torch.einsum("bhqk,bq->bk", scores.softmax(-1), weight[:, at : at + step])
    return total


def query_weight(groups: PaddedGroups, q: torch.Tensor) -> torch.Tensor:
    """Return each query patch's weight in the mean over queries and heads, float32 `[B, Q*4]`. `q` is `[..., heads, d]`."""
    if groups.valid is None:
        valid = q.new_ones(groups.shape, dtype=torch.float32)
    else:
        valid = groups.valid.float()
    return (valid / valid.sum(1, keepdim=True).clamp(min=1) / PATCHES / q.shape[-2]).repeat_interleave(PATCHES, dim=1)


def add_by_row(received: torch.Tensor, per_key: torch.Tensor, groups: PaddedGroups) -> None:
    """Add the attention received by key patches (`per_key`, float32 `[B, K*4]`) to their rows in `received` (float32 `[R]`)."""
    per_row = per_key.view(len(per_key), -1, PATCHES).sum(2)
    index = groups.key_rows
    if index is None or isinstance(index, slice):
        received[index or slice(None)] += per_row.flatten()
        return
    if groups.rows.reach == "clip":  # keys in other frame pairs receive no attention
        pair = groups.rows.pair_of_row
        per_row = torch.where(pair[index] == pair[groups.query[:, :1]], per_row, 0)
    if groups.weight is not None:
        per_row = torch.where(groups.weight > 0, per_row, 0)
    received.index_add_(0, index.clamp(min=0).flatten(), per_row.flatten())


def attend_packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: PackedGroups) -> torch.Tensor:
    """Compute attention within groups using a kernel that reads the group lengths on the GPU.

    The kernel supports neither masks nor biases, so the weights are encoded in extra head dimensions (see `with_bias`).
    """
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
    """Encode the log of `weight` (int64 `[K]`) in extra head dimensions: q' = [q, 1, 1, 0 ...], k' = [k, high, low, 0 ...].

    The extra dimensions are computed by `Attention.bias_features`. A weight of 0 becomes e^-`Attention.NEVER`.
    """
    dim = q.shape[-1]
    more = Attention.of(k).bias_features(weight.float().log(), dim, least=-Attention.NEVER * dim**0.5)
    extra = more.shape[1]
    more = more[:, None, None].expand(*k.shape[:3], extra)
    ones = F.pad(q.new_ones(*q.shape[:3], 2), (0, extra - 2))
    return torch.cat([q, ones], -1), torch.cat([k, more], -1), F.pad(v, (0, extra))
