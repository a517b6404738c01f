"""Inputs and results of pruning methods: small frozen dataclasses of tensors, and helpers for counting and indexing rows.

Nothing in this module synchronizes the GPU, because all shapes are known from the plan. `bincount`, `nonzero` and boolean indexing
would synchronize it, because the shapes of their results depend on the data.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F

from evoprune.backend import mean_rows
from evoprune.util import CONVERT, converted, generator_seed

# Counting and indexing.


def arange_on(count: int, device: torch.device | str) -> torch.Tensor:
    """Return the numbers from 0 to `count` - 1 as an int64 tensor on `device`."""
    return torch.arange(count, dtype=torch.int64, device=device)


def nonzero_fixed(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return the indices of the first `count` True entries of a mask without synchronizing the GPU.

    Args:
        mask: bool `[n]`.
        count: The length of the result.

    Returns:
        int64 `[count]`, ascending. If the mask has fewer True entries, the result is padded with zeros.
    """
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, arange_on(len(mask), mask.device))[:count]


@converted
@dataclass(frozen=True)
class Tokens:
    """The video features passed to a selector, taken either after the encoder or between two of its layers.

    For the full contract, see docs/methods.md. Some properties raise a TypeError unless the method declares them in `needs` or
    `reads_question`.
    """

    rows: torch.Tensor  # [E, D], in unit order; one row per unit, unless some units were not encoded
    unit_to_row: torch.Tensor  # int64 [N], the row that represents each unit, or -1
    grid: tuple[int, int, int]  # (T, H, W) in units
    # Seed for random draws, passed through `generator_seed`.
    seed: int = field(default=0, metadata={CONVERT: generator_seed})
    # The inputs requested by the method: float32 "attention" [E], "keys" [E, 4 d], "middle" [E, D], and "question" [Q, D].
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    # The weights of the norm in the tower's patch merger, which identify the model; None between layers.
    merger_norm: torch.Tensor | None = None

    def copied(self) -> "Tokens":
        """Return a copy with cloned tensors."""
        given = {name: value.clone() for name, value in self.given.items()}
        norm = None if self.merger_norm is None else self.merger_norm.clone()
        return replace(
            self, rows=self.rows.clone(), unit_to_row=self.unit_to_row.clone(), given=given, merger_norm=norm
        )

    @cached_property
    def features(self) -> torch.Tensor:
        """The units' features, `[N, D]`, ordered by frame pair and in raster order within each frame pair."""
        return self._of_units(self.rows)

    @property
    def normalised(self) -> torch.Tensor:
        """The features scaled to unit length, float32 `[N, D]`. Zero vectors stay zero."""
        return F.normalize(self.features.float(), dim=1)

    @cached_property
    def fingerprint(self) -> str:
        """A string of 16 hex digits that identifies the model, computed from `merger_norm`, or "" if it is None.

        The result does not depend on the dtype or the device of a loaded model.
        """
        if self.merger_norm is None:
            return ""
        values = self.merger_norm.detach().to("cpu", torch.bfloat16).view(torch.int16)
        return hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16]

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape `x` from `[N, ...]` to `[T, H * W, ...]`, with one entry per frame pair."""
        return x.view(self.grid[0], -1, *x.shape[1:])

    @cached_property
    def attention(self) -> torch.Tensor:
        """The attention that each unit receives within its frame pair in the tower's last full-attention layer, float32 `[N]`.

        The attention is averaged over heads and queries, summed over the unit's patches, and multiplied by the number of units per
        frame pair. Therefore, a value of 1 corresponds to uniform attention.
        """
        return self._of_units(self._given("attention"))

    @cached_property
    def keys(self) -> torch.Tensor:
        """Each unit's keys in the tower's last full-attention layer, before rotary embedding, float32 `[N, 4 d]`.

        The keys are averaged over heads, and those of the unit's four patches are concatenated.
        """
        return self._of_units(self._given("keys"))

    @cached_property
    def middle(self) -> torch.Tensor:
        """Each unit's state after its patches are merged, averaged over the tower's middle layers, float32 `[N, D]`.

        The middle layers are those between 7/32 and 23/32 of the tower's depth.
        """
        return self._of_units(self._given("middle"))

    @property
    def question(self) -> torch.Tensor:
        """The language model's embeddings of the question, excluding the rest of the prompt, float32 `[Q, D]`."""
        return self._given("question")

    def _given(self, name: str) -> torch.Tensor:
        if name not in self.given:
            missing = f'"{name}" in its `needs`'
            if name == "question":
                missing = "`reads_question`"
            raise TypeError(f"{name} is not available: the method must declare {missing}")
        return self.given[name]

    def _of_units(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == len(self.unit_to_row) else rows[self.unit_to_row]


@dataclass(frozen=True)
class Selection:
    """The tokens kept by a selector. In the prompt, each token has the position of its unit."""

    kept: torch.Tensor  # int64 [K], the kept units, ascending
    # int64 [N]: for each unit, the index in `kept` of the token whose mean includes the unit, or -1. Kept units belong to their own
    # token. None if tokens are not means.
    unit_to_token: torch.Tensor | None = None
    # float32 [N]: each unit's weight in the mean, above 0 for kept units; None for equal weights.
    weight: torch.Tensor | None = None
    size: torch.Tensor | None = None  # float32 [K]: the language model's attention adds log(size); None means 1 for all
    # Used instead of `unit_to_token` if a unit can contribute to several tokens: int64 [m] indices into `kept`, int64 [m] units,
    # and float32 [m] weights. Each kept unit must contribute to its own token.
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    # Whether tokens are means of units. If False, each token equals its kept unit, and `unit_to_token` only specifies which units
    # the token represents.
    averages: bool = True

    @classmethod
    def of_pairs(cls, kept: Iterable[torch.Tensor], per_pair: int) -> Self:
        """Combine per-frame-pair selections into a selection for the whole video.

        Args:
            kept: For each frame pair, the int64 indices of the units to keep, ascending and relative to the frame pair.
            per_pair: The number of units in a frame pair.
        """
        return cls(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))

    def features(self, rows: torch.Tensor, row_of: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the features of the selected tokens by either copying or averaging rows.

        Args:
            rows: `[E, D]`, the features of the encoded units.
            row_of: int64 `[N]`, each unit's row. None if every unit has its own row.

        Returns:
            `[K, D]`, one row per selected token.
        """
        if not self.averages or (self.unit_to_token is None and self.means is None):
            if row_of is None:
                return rows[self.kept]
            return rows[row_of[self.kept]]
        if row_of is None:
            row = arange_on(len(rows), rows.device)
        else:
            row = row_of.clamp(min=0)
        if self.means is not None:
            into, unit, weight = self.means
            row = row[unit]
        else:  # units without a token have weight 0, because filtering them out would synchronize the GPU
            into = self.unit_to_token.clamp(min=0)
            weight = (self.unit_to_token >= 0).float()
            if self.weight is not None:
                weight = weight * self.weight
        return mean_rows(rows, into, row, weight, len(self.kept))


@dataclass(frozen=True)
class Candidates:
    """The rows that a merger may merge, as B groups padded to n rows each.

    Each group is a window or a frame pair. Rows merge only within their group.
    """

    features: torch.Tensor  # float32 [B, n, D], the feature that the merger declared in `needs`
    attention: torch.Tensor | None  # float32 [B, n], the attention received in this layer; None unless requested
    place: torch.Tensor  # int64 [B, n], each row's raster index in the frame pair
    size: torch.Tensor  # int64 [B, n], the number of units merged into each row
    valid: torch.Tensor  # bool [B, n], False for padding at the end of a group
    width: int  # W, the width of the frame in units
