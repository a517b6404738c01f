"""Maps the columns of a pruned batch of prompts to the columns of the original batch.

A column is a token position in a batch of prompts. The remaining columns are right-aligned, so that all rows still end where the
answer begins. Rows with fewer remaining columns are padded on the left, and unneeded padding is removed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from evoprune.errors import UsageError
from evoprune.methods import arange_on
from evoprune.suggestions import Suggesting

PAST = "evoprune"  # KV cache attribute, which is inherited by copies of the cache


@dataclass(frozen=True, repr=False)
class Columns(Suggesting):
    """Maps the columns of a pruned batch to columns of the original batch.

    Columns of the pruned batch are called places, to distinguish them from columns of the original batch.
    """

    # int64 `[B, C]`, which maps each place to its original column. Each row starts with padding (-1), followed by the remaining
    # columns in ascending order.
    index: torch.Tensor
    width: int  # number of columns in the unpruned batch

    @classmethod
    def of(cls, left: Sequence[torch.Tensor], ids: torch.Tensor, mask: torch.Tensor | None = None) -> "Columns":
        """Right-align each row's remaining columns, using only as many places as needed for the longest row.

        Args:
            left: One tensor per row, listing the remaining columns in ascending order, int64 `[n]`.
            ids: Token IDs of the unpruned batch, int64 `[B, L]`.
            mask: The attention mask `[B, L]`, which is 0 at padding, or None if there is no padding. Padding before a row's first
                token is removed if it would take more places than needed for the longest row.
        """
        needed = left
        if mask is not None:
            padding = (mask.cumsum(1) == 0).sum(1).tolist()
            needed = [columns[columns >= first] for columns, first in zip(left, padding, strict=True)]
        places = max(1, *map(len, needed))
        return cls(right_aligned(left, places, -1).to(ids.device), ids.shape[1])

    def __repr__(self) -> str:
        return f"<Columns: {self.places:,} of {self.width:,} in a batch of {len(self.index)}>"

    @property
    def places(self) -> int:
        """Number of columns in the pruned batch (C)."""
        return self.index.shape[1]

    @property
    def padded(self) -> bool:
        """Whether any row is padded to the length of the longest row."""
        return bool((self.index < 0).any())

    def take(self, x: torch.Tensor, fill: int = 0) -> torch.Tensor:
        """Select the tensor entries that correspond to the remaining columns.

        Args:
            x: A tensor with one entry per column of the unpruned batch, `[..., B or 1, width]`.
            fill: The padding value.

        Returns:
            A tensor with one entry per column of the pruned batch, `[..., B, C]`.
        """
        index = self.index.to(x.device)
        x = x.expand(*x.shape[:-2], len(index), -1)
        return x.gather(-1, index.clamp(min=0).expand(*x.shape[:-1], -1)).masked_fill(index < 0, fill)

    def following(self, width: int) -> "Columns":
        """Return a copy with new columns appended for a batch that has grown to `width` columns."""
        more = arange_on(width, self.index.device)[self.width :]
        return Columns(torch.cat([self.index, more.expand(len(self.index), -1)], 1), width)

    def first(self, places: int) -> "Columns":
        """Return a copy cropped to the first `places` columns of the pruned batch.

        The copy's width includes the pruned columns between its last remaining column and the next one.

        Raises:
            UsageError: If the rows would be cropped at different columns of the unpruned batch.
        """
        ends = self.index[:, places].unique()
        if len(ends) > 1:
            hint = "crop the cache of each prompt separately"
            raise UsageError("the KV cache was cropped in the middle of a padded batch", hint)
        return Columns(self.index[:, :places], int(ends))

    def repeated(self, times: int) -> "Columns":
        """Repeat each row `times` times, for beam search or multiple answers per prompt."""
        return Columns(self.index.repeat_interleave(times, 0), self.width)


def right_aligned(rows: Sequence[torch.Tensor], places: int, fill: float) -> torch.Tensor:
    """Stack rows of varying lengths into a tensor `[B, places]`, cropping or padding each row on the left."""
    return torch.stack([pad(row, (places - len(row), 0), value=fill) for row in rows])  # negative padding crops a row


@dataclass(frozen=True)
class Past:
    """Information about a pruned prompt needed for later calls with the same KV cache."""

    columns: Columns  # prompt columns that remain after pruning
    # int64 `[B, L]`, one value per prompt column. If the prompt is cropped right after a column, the position of a later token is
    # that column's value plus the number of preceding tokens.
    delta: torch.Tensor
    sizes: torch.Tensor | None = None  # cluster sizes of the remaining columns, float32 `[B, C]`; None if all are 1

    def cropped(self, length: int) -> "Past":
        """Return the `Past` for the same KV cache after cropping to `length` columns.

        If the cache still contains the entire prompt, this returns the object itself.
        """
        if length >= self.columns.places:
            return self
        columns = self.columns.first(length)
        sizes = None if self.sizes is None else self.sizes[:, :length]
        return Past(columns, self.delta[:, : columns.width], sizes)


def remember(past: Past | None, results: Iterable[Any]) -> None:
    """Attach `past` to the KV cache in a call's results, so that later calls with this cache can find it."""
    for cache in results:
        if past is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, PAST, past)
