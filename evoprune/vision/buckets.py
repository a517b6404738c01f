"""Groups of rows (windows or frame pairs) as batches for attention.

Groups of similar length share a *bucket*: they are padded to a common length, and a mask covers the padding. Equal groups of
neighbouring rows need no padding, so their bucket is a view without gather or mask. On a CPU, `buckets` sorts the groups by
their lengths. On a GPU, reading the lengths would synchronise. There `Packed` holds all groups at once: for a kernel that reads
the lengths on the device, or as one bucket padded to the greatest possible length.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.model.config import PATCHES
from evoprune.pruning.indices import ascending, runs
from evoprune.vision.layout import Groups


@dataclass(frozen=True)
class Bucket:
    """A batch of B groups, with Q query rows and K key rows each."""

    shape: tuple[int, int]  # (B, Q)
    query: torch.Tensor | None  # int64 `[B, Q]` rows, or None where the bucket is all rows in order
    key: torch.Tensor | None  # int64 `[B, K]` rows, or None where the keys are the queries
    query_valid: torch.Tensor | None  # bool `[B, Q]`, False at padding; None without padding
    key_count: torch.Tensor  # int64 `[B, K]`, how many units of the group each key represents; 0 at padding
    padded: bool  # whether any key is padding
    # int64 `[R]`, the index of each row among the B * Q answers; None where `query` and `query_valid` say it
    back: torch.Tensor | None = None
    # bool `[B, K]`, whether the key is a row of the group's own frame pair, False at padding; None where every key is
    near: torch.Tensor | None = None

    def by_head(self, x: torch.Tensor, which: str) -> torch.Tensor:
        """Rows of `x` `[R, 4, heads, d]` as `[B, heads, Q*4 or K*4, d]`; `which`: "query" or "key"."""
        index = self.key if which == "key" and self.key is not None else self.query
        rows = x if index is None else x[index]
        return rows.reshape(self.shape[0], -1, *x.shape[2:]).transpose(1, 2)


@dataclass(frozen=True)
class Packed:
    """All groups of a chunk, for a device whose values the CPU does not read."""

    groups: Groups  # from `layout.attention_groups` with `exact=False`
    rows: int  # R, of the chunk

    @cached_property
    def ends(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Two int32 `[G + 1]`, each a zero and the ends of all groups: counted in query patches, and in key patches."""
        lengths = torch.stack([self.groups.length, self.groups.key_length])
        query, key = F.pad(lengths.cumsum(1) * PATCHES, (1, 0)).int().unbind(0)
        return query.contiguous(), key.contiguous()

    @cached_property
    def bucket(self) -> Bucket:
        """One bucket of all groups, padded to the greatest length that a group can have."""
        groups, count, longest = self.groups, len(self.groups.length), self.groups.longest[0]
        if groups.even:
            return Bucket((count, longest), None, None, None, groups.count.view(count, longest), False)
        row = ascending(self.rows, groups.start.device)
        group = torch.searchsorted(groups.start + groups.length, row, right=True).clamp(max=count - 1)
        back = (group * longest + row - groups.start[group]).clamp(max=count * longest - 1)
        return _padded(groups, self.rows, ascending(count, row.device), *groups.longest, back)


def _padded(
    groups: Groups, rows: int, members: torch.Tensor, longest: int, most: int, back: torch.Tensor | None = None
) -> Bucket:
    """The bucket of some groups (int64 `[B]`), padded to `longest` queries and `most` keys. `rows`: of all groups.

    `back`: see `Bucket`; without it, whether there is padding is read, which synchronises.
    """
    query, valid = runs(groups.start[members], groups.length[members], longest, rows)
    start = groups.key_length.cumsum(0) - groups.key_length
    key, key_valid = runs(start[members], groups.key_length[members], most, len(groups.keys))
    return Bucket(
        tuple(query.shape),
        query,
        None if groups.consecutive else groups.keys[key],
        None if back is None and valid.all() else valid,
        torch.where(key_valid, groups.count[key], 0),
        back is not None or not key_valid.all(),
        back,
        None if groups.near is None else groups.near[key] & key_valid,
    )


def buckets(groups: Groups) -> list[Bucket]:
    """Sorts groups into buckets of similar length.

    Up to four different numbers of keys get a bucket each; more are put together where they differ by less than a quarter. Where
    queries and keys are not the same rows, a bucket is divided again: its numbers of queries differ by less than a half. So a group
    with one new row is not padded to a full group.
    """
    lengths = groups.key_length.unique()
    if groups.consecutive and len(lengths) == 1:
        shape = (len(groups.length), int(lengths))
        return [Bucket(shape, None, None, None, groups.count.view(shape), False)]
    rows, made = int(groups.length.sum()), []
    for like in _alike(groups.key_length, 0.75 if len(lengths) > 4 else 1.0):
        batches = [like] if groups.consecutive else [like[some] for some in _alike(groups.length[like], 0.5)]
        for members in batches:
            longest, most = (int(each[members].max()) for each in (groups.length, groups.key_length))
            made.append(_padded(groups, rows, members, longest, most))
    return made


def _alike(length: torch.Tensor, share: float) -> Iterator[torch.Tensor]:
    """Divides groups by `length` (int64 `[G]`), longest first: each time, all longer than `share` of the longest left.

    Yields indices of groups, int64.
    """
    left = length.unique().tolist()[::-1]
    while left:
        below = [n for n in left[1:] if n <= share * left[0]]
        yield ((length <= left[0]) & (length > (below[0] if below else 0))).nonzero().flatten()
        left = below


def key_bias(bucket: Bucket, size_bias: bool, dtype: torch.dtype) -> torch.Tensor | None:
    """The bias on the scores of each key patch, `[B, 1, 1, K*4]`; None where it is zero everywhere.

    It is the log of the key's cluster size, or 0 without `size_bias`; -inf at padding.
    """
    if not size_bias and not bucket.padded:
        return None
    count = bucket.key_count.float() if size_bias else (bucket.key_count > 0).float()
    return count.log().to(dtype).repeat_interleave(PATCHES, dim=1)[:, None, None]
