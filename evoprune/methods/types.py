"""Inputs and results of pruning methods, as small frozen dataclasses over tensors, and helpers for counting and indexing rows.

Shapes follow from the plan. `bincount`, `nonzero` and masks as indices synchronize a GPU, because the shape of their result
depends on values.
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
    """Return int64 `[count]`: 0, 1, 2 and so on."""
    return torch.arange(count, dtype=torch.int64, device=device)


def nonzero_fixed(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the first `count` indices at which `mask` (bool `[n]`) is True, ascending, padded with zeros."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, arange_on(len(mask), mask.device))[:count]


@dataclass(frozen=True)
class Tokens:
    """A video as a selector sees it, after the encoder or between two of its layers (docs/methods.md, the contract).

    Properties that the method did not declare in `needs` or `reads_question` raise TypeError.
    """

    rows: torch.Tensor  # [E, D], ordered by unit; one for each unit, unless some units were not encoded
    unit_to_row: torch.Tensor  # int64 [N], the row that represents each unit, -1 for none
    grid: tuple[int, int, int]  # (T, H, W) in units
    seed: int = 0  # seed for random draws, reduced by `generator_seed`
    # float32 "attention" [E], "keys" [E, 4 d], "middle" [E, D] and "question" [Q, D], as far as declared
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "seed", generator_seed(self.seed))

    def copied(self) -> "Tokens":
        """Return the same tokens with copied tensors."""
        given = {name: value.clone() for name, value in self.given.items()}
        return replace(self, rows=self.rows.clone(), unit_to_row=self.unit_to_row.clone(), given=given)

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]`: the units' features, in raster order, frame pair after frame pair."""
        return self._of_units(self.rows)

    @property
    def normalised(self) -> torch.Tensor:
        """float32 `[N, D]`: the features scaled to length one; zeros stay zeros."""
        return F.normalize(self.features.float(), dim=1)

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """Reshape `x` (`[N, ...]`) to `[T, H * W, ...]`, one entry per frame pair."""
        return x.view(self.grid[0], -1, *x.shape[1:])

    @cached_property
    def attention(self) -> torch.Tensor:
        """float32 `[N]`: the attention that every unit receives in its frame pair, in the tower's last full-attention layer.

        It is the mean over heads and queries, summed over the unit's patches, times the units per frame pair: 1 is an even share.
        """
        return self._of_units(self._given("attention"))

    @cached_property
    def keys(self) -> torch.Tensor:
        """float32 `[N, 4 d]`: the unit's key in the same layer, before rotary.

        It is the mean over heads, with the unit's four patches concatenated.
        """
        return self._of_units(self._given("keys"))

    @cached_property
    def middle(self) -> torch.Tensor:
        """float32 `[N, D]`: the unit's mean state after the layers from 7/32 to 23/32 of the tower, merged to units."""
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
    # int64 [N], the index in `kept` of the token whose mean a unit joins (a kept unit joins its own), or -1. None: no means
    unit_to_token: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # float32 [N], a unit's weight in its mean, above 0 for kept units; None: equal
    size: torch.Tensor | None = None  # float32 [K]: the language model's attention adds log(size); None for 1 each
    # If units join several tokens: int64 [m] indices into `kept`, int64 [m] units (with each kept one's own), float32 [m] weights
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    # False: a token equals its kept unit, and `unit_to_token` says only which units it represents
    averages: bool = True

    @classmethod
    def of_pairs(cls, kept: Iterable[torch.Tensor], per_pair: int) -> Self:
        """Return the selection of the kept places in every frame pair.

        Args:
            kept: For each frame pair, int64 places among its `per_pair`, ascending.
        """
        return cls(torch.cat([places + pair * per_pair for pair, places in enumerate(kept)]))

    def features(self, rows: torch.Tensor, row_of: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens `[K, D]` made from `rows` `[E, D]`.

        Args:
            row_of: int64 `[N]`, the row of every unit; None if every unit has its own.
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
        else:  # units without a token get weight 0, because filtering them would wait for the GPU
            into = self.unit_to_token.clamp(min=0)
            weight = (self.unit_to_token >= 0).float()
            if self.weight is not None:
                weight = weight * self.weight
        return mean_rows(rows, into, row, weight, len(self.kept))


@dataclass(frozen=True)
class Candidates:
    """B groups of rows (windows or frame pairs), padded to n rows per group, inside which a merger merges rows."""

    features: torch.Tensor  # float32 [B, n, D], the feature that the merger declared in `needs`
    attention: torch.Tensor | None  # float32 [B, n], received in this layer; None unless declared
    place: torch.Tensor  # int64 [B, n], raster index in the frame pair
    size: torch.Tensor  # int64 [B, n], cluster sizes
    valid: torch.Tensor  # bool [B, n], False at the padding at the end of a group
    width: int  # W, units across the frame
