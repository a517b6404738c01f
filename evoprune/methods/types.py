"""Inputs and results of pruning methods: small frozen dataclasses of tensors, and helpers for counting and indexing rows.

All shapes are known from the plan, so nothing here synchronizes the GPU. `bincount`, `nonzero` and boolean indexing would, because
the shapes of their results depend on values.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Self

import torch
import torch.nn.functional as F

from evoprune.backend import mean_rows
from evoprune.util import generator_seed

# Counting and indexing.


def arange_on(count: int, device: torch.device | str) -> torch.Tensor:
    """Return int64 `[count]`: the numbers from 0 to count - 1."""
    return torch.arange(count, dtype=torch.int64, device=device)


def nonzero_fixed(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the first `count` indices where `mask` (bool `[n]`) is True, ascending and padded with zeros."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, arange_on(len(mask), mask.device))[:count]


@dataclass(frozen=True)
class Tokens:
    """A video as a selector sees it, either after the encoder or between two of its layers (see the contract in docs/methods.md).

    Reading a property that the method did not declare in `needs` or `reads_question` raises TypeError.
    """

    rows: torch.Tensor  # [E, D], ordered by unit; there is one row per unit, unless some units were not encoded
    unit_to_row: torch.Tensor  # int64 [N], the row that represents each unit, or -1
    grid: tuple[int, int, int]  # (T, H, W) in units
    seed: int = 0  # the seed for random draws, passed through `generator_seed`
    # The inputs that the method declared: float32 "attention" [E], "keys" [E, 4 d], "middle" [E, D] and "question" [Q, D].
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "seed", generator_seed(self.seed))

    def copied(self) -> "Tokens":
        """Return a copy with cloned tensors."""
        given = {name: value.clone() for name, value in self.given.items()}
        return replace(self, rows=self.rows.clone(), unit_to_row=self.unit_to_row.clone(), given=given)

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]`: the units' features, in raster order within each frame pair, one frame pair after another."""
        return self._of_units(self.rows)

    @property
    def normalised(self) -> torch.Tensor:
        """float32 `[N, D]`: the features scaled to unit length. Zero vectors stay zero."""
        return F.normalize(self.features.float(), dim=1)

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape `x` from `[N, ...]` to `[T, H * W, ...]`, so that there is one entry per frame pair."""
        return x.view(self.grid[0], -1, *x.shape[1:])

    @cached_property
    def attention(self) -> torch.Tensor:
        """float32 `[N]`: the attention that each unit receives within its frame pair, in the tower's last full-attention layer.

        The attention is averaged over heads and queries, summed over the unit's patches, and multiplied by the number of units per
        frame pair. A value of 1 therefore means an equal share.
        """
        return self._of_units(self._given("attention"))

    @cached_property
    def keys(self) -> torch.Tensor:
        """float32 `[N, 4 d]`: each unit's keys in the tower's last full-attention layer, before rotary.

        The keys are averaged over heads, and the keys of the unit's four patches are concatenated.
        """
        return self._of_units(self._given("keys"))

    @cached_property
    def middle(self) -> torch.Tensor:
        """float32 `[N, D]`: each unit's state, averaged over the tower's middle layers, after merging patches.

        The middle layers are those between 7/32 and 23/32 of the tower's depth.
        """
        return self._of_units(self._given("middle"))

    @property
    def question(self) -> torch.Tensor:
        """float32 `[Q, D]`: the language model's embeddings of the question's tokens, without the rest of the prompt."""
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
    """The tokens that a selector keeps. Each token has the position of its unit."""

    kept: torch.Tensor  # int64 [K], the kept units, ascending
    # int64 [N]: for each unit, the index in `kept` of the token whose mean the unit joins, or -1. A kept unit joins its own token.
    # None if tokens are not means.
    unit_to_token: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # float32 [N]: each unit's weight in the mean, above 0 if kept; None if equal
    size: torch.Tensor | None = None  # float32 [K]: the language model's attention adds log(size); None means 1 for all
    # Replaces `unit_to_token` if a unit can join several tokens: int64 [m] indices into `kept`, int64 [m] units, and float32 [m]
    # weights. Each kept unit must join its own token.
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    # Whether tokens are means. If False, each token equals its kept unit, and `unit_to_token` only tells which units it represents.
    averages: bool = True

    @classmethod
    def of_pairs(cls, kept: Iterable[torch.Tensor], per_pair: int) -> Self:
        """Return a selection that consists of the kept places of each frame pair.

        Args:
            kept: For each frame pair, the int64 indices of the kept places, ascending.
            per_pair: The number of places in a frame pair.
        """
        return cls(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))

    def features(self, rows: torch.Tensor, row_of: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens `[K, D]`, computed from `rows` `[E, D]`.

        Args:
            row_of: int64 `[N]`, each unit's row. None if every unit has its own row.
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
        else:  # units without a token get weight 0, because filtering them out would synchronize the GPU
            into = self.unit_to_token.clamp(min=0)
            weight = (self.unit_to_token >= 0).float()
            if self.weight is not None:
                weight = weight * self.weight
        return mean_rows(rows, into, row, weight, len(self.kept))


@dataclass(frozen=True)
class Candidates:
    """B groups of rows, padded to n rows per group. Each group is a window or a frame pair.

    A merger merges rows only within a group.
    """

    features: torch.Tensor  # float32 [B, n, D], the feature that the merger declared in `needs`
    attention: torch.Tensor | None  # float32 [B, n], the attention received in this layer; None unless declared
    place: torch.Tensor  # int64 [B, n], raster index in the frame pair
    size: torch.Tensor  # int64 [B, n], cluster sizes
    valid: torch.Tensor  # bool [B, n], False for the padding at the end of a group
    width: int  # W, the number of units across the frame
