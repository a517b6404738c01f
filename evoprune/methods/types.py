"""The inputs and results of pruning methods, small frozen dataclasses over tensors; and counting and indexing of rows.

Shapes are known from the plan: `bincount`, `nonzero` and masks as indices synchronise a GPU, because the shape of their result
depends on values.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b

import torch
import torch.nn.functional as F

from evoprune.backend import mean_rows

# Counting and indexing.


def arange_on(count: int, device: torch.device | str) -> torch.Tensor:
    """Return int64 `[count]`: 0, 1, 2 and so on."""
    return torch.arange(count, dtype=torch.int64, device=device)


def nonzero_fixed(mask: torch.Tensor, count: int) -> torch.Tensor:
    """Return int64 `[count]`: the first `count` indices where `mask` (bool `[n]`) is true, ascending; filled up with zeros."""
    slot = torch.where(mask, mask.cumsum(0) - 1, count).clamp(max=count)
    return slot.new_zeros(count + 1).scatter_(0, slot, arange_on(len(mask), mask.device))[:count]


def generator_seed(seed: int) -> int:
    """Return the seed for torch's CPU generator, which takes the low 32 bits alone: below 2**32 as it is, else a hash of all its
    bits.
    """
    digest = blake2b(str(seed).encode(), digest_size=4).digest()
    return seed if 0 <= seed < 2**32 else int.from_bytes(digest)


@dataclass(frozen=True)
class Tokens:
    """A video as a selector sees it, after the encoder or between two of its layers (docs/methods.md, the contract).

    What the method did not declare in `needs` or `reads_question` raises TypeError.
    """

    rows: torch.Tensor  # [E, D], ordered by unit; one for each unit, unless some units were not encoded
    unit_to_row: torch.Tensor  # int64 [N], the row that represents each unit, -1 for none
    grid: tuple[int, int, int]  # (T, H, W) in units
    seed: int = 0  # for what is drawn at random, as `generator_seed` makes it
    # float32 "attention" [E], "keys" [E, 4 d], "middle" [E, D] and "question" [Q, D], as far as declared
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "seed", generator_seed(self.seed))

    def copied(self) -> "Tokens":
        """Return the same tokens in memory of their own."""
        given = {name: value.clone() for name, value in self.given.items()}
        return replace(self, rows=self.rows.clone(), unit_to_row=self.unit_to_row.clone(), given=given)

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]`: the feature of each unit, in raster order, frame pair after frame pair."""
        return self._of_units(self.rows)

    @property
    def normalised(self) -> torch.Tensor:
        """float32 `[N, D]`: the features, each divided by its length; zeros stay zeros."""
        return F.normalize(self.features.float(), dim=1)

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` (`[N, ...]`) as `[T, H * W, ...]`: frame pair by frame pair."""
        return x.view(self.grid[0], -1, *x.shape[1:])

    @cached_property
    def attention(self) -> torch.Tensor:
        """float32 `[N]`: the attention that each unit receives in its frame pair, in the tower's last full-attention layer.

        It is the mean over heads and queries, summed over the unit's patches, times the units of a frame pair: 1 is an even share.
        """
        return self._of_units(self._given("attention"))

    @cached_property
    def keys(self) -> torch.Tensor:
        """float32 `[N, 4 d]`: the key of each unit in the same layer, before rotary: the mean over heads, four patches joined."""
        return self._of_units(self._given("keys"))

    @cached_property
    def middle(self) -> torch.Tensor:
        """float32 `[N, D]`: the mean of each unit's states after the layers from 7/32 to 23/32 of the tower, merged to units."""
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
            raise TypeError(f"there is no {name} here: the method must declare {missing}")
        return self.given[name]

    def _of_units(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == len(self.unit_to_row) else rows[self.unit_to_row]


@dataclass(frozen=True)
class Selection:
    """The tokens that a selector keeps. Each token has the position of its unit."""

    kept: torch.Tensor  # int64 [K], the kept units, ascending
    # int64 [N], the index in `kept` of the token whose mean each unit joins, a kept unit its own; -1 for none. None: no means
    unit_to_token: torch.Tensor | None = None
    weight: torch.Tensor | None = None  # float32 [N], of each unit in that mean, above 0 for kept ones; None for equal
    size: torch.Tensor | None = None  # float32 [K]: the language model's attention adds log(size); None for 1 each
    # Where a unit joins several tokens: int64 [m] indices into `kept`, int64 [m] units, a kept one's own, and float32 [m] weights
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
    averages: bool = True  # False: each token stays as its kept unit is, whatever `unit_to_token` says it represents

    def features(self, rows: torch.Tensor, row_of: torch.Tensor | None = None) -> torch.Tensor:
        """Return the tokens, `[K, D]`, of `rows`, `[E, D]`; `row_of`: int64 `[N]`, the row of each unit, None for its own."""
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
        else:  # which units have a token is not read, which would wait for a GPU: the others weigh nothing
            into = self.unit_to_token.clamp(min=0)
            weight = (self.unit_to_token >= 0).float()
            if self.weight is not None:
                weight = weight * self.weight
        return mean_rows(rows, into, row, weight, len(self.kept))


@dataclass(frozen=True)
class Candidates:
    """B groups of rows (windows or frame pairs), padded to n rows each, in which a merger merges rows."""

    features: torch.Tensor  # float32 [B, n, D], what the merger declared in `needs`
    attention: torch.Tensor | None  # float32 [B, n], received in this layer; None unless declared
    place: torch.Tensor  # int64 [B, n], raster index in the frame pair
    size: torch.Tensor  # int64 [B, n], cluster sizes
    valid: torch.Tensor  # bool [B, n], False at padding, which is at the end of a group
    width: int  # W, units across the frame
