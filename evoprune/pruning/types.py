"""The inputs and results of pruning methods: small frozen dataclasses over tensors."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from evoprune.pruning.indices import ascending

AT_ONCE = 4096  # units that have float32 copies at a time


@dataclass(frozen=True)
class Tokens:
    """A video as a selector sees it, after the encoder or between two of its layers.

    What the method did not declare in `needs` or `reads_question` raises TypeError.
    """

    rows: torch.Tensor  # [E, D], ordered by unit; one for each unit, unless some units were not encoded
    owner: torch.Tensor  # int64 [N], the row that represents each unit, -1 for none
    grid: tuple[int, int, int]  # (T, H, W) in units
    seconds_per_pair: float = 1.0  # from one frame pair to the next
    seed: int = 0  # for what is drawn at random
    # float32 "attention" [E], "keys" [E, 4 d], "middle" [E, D] and "question" [Q, D], as far as declared
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)

    def copied(self) -> "Tokens":
        """The same tokens in memory of their own."""
        given = {name: value.clone() for name, value in self.given.items()}
        return replace(self, rows=self.rows.clone(), owner=self.owner.clone(), given=given)

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]`: the feature of each unit, in raster order, frame pair after frame pair."""
        return self._of_units(self.rows)

    @property
    def unit(self) -> torch.Tensor:
        """float32 `[N, D]`: the features, each divided by its length; zeros stay zeros."""
        return F.normalize(self.features.float(), dim=1)

    def by_pair(self, x: torch.Tensor) -> torch.Tensor:
        """`x` (`[N, ...]`) as `[T, H * W, ...]`: frame pair by frame pair."""
        return x.view(self.grid[0], -1, *x.shape[1:])

    @cached_property
    def attention(self) -> torch.Tensor:
        """float32 `[N]`: the attention that each unit receives in its frame pair, in the tower's last full-attention layer.

        It is the mean over heads and over the queries of all encoded units of the frame pair, summed over the unit's patches, times
        the number of units of a frame pair. So 1 is an even share.
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
            missing = "`reads_question`" if name == "question" else f'"{name}" in its `needs`'
            raise TypeError(f"there is no {name} here: the method must declare {missing}")
        return self.given[name]

    def _of_units(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == len(self.owner) else rows[self.owner]


@dataclass(frozen=True)
class Selection:
    """The tokens that a selector keeps.

    Attributes:
        kept: int64 `[K]`, the kept units, ascending; each token has the position of its unit.
        owner: int64 `[N]`, for each unit the index in `kept` of the token whose mean it joins, -1 for none. Every kept unit joins
            its own token. None: each token is the feature of its unit alone.
        weight: float32 `[N]`, the weight of each unit in that mean: at least 0, and above 0 for kept units. None for equal weights.
        size: float32 `[K]`, the weight of each token in the language model's attention, which adds log(size) to the token's logits:
            the cluster size, or a power of it. None for 1 each.
        means: int64 `[m]` indices into `kept`, int64 `[m]` units and float32 `[m]` weights, in place of `owner` and `weight` where
            a unit joins several tokens: each token is the weighted mean of its units, its own among them.
    """

    kept: torch.Tensor
    owner: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    size: torch.Tensor | None = None
    means: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def features(self, rows: torch.Tensor, row_of: torch.Tensor | None = None) -> torch.Tensor:
        """`[K, D]`: the tokens, in the dtype of `rows` (`[E, D]`); means are computed in float32.

        `row_of`: int64 `[N]`, the row of each unit; None where each unit has its own.
        """
        if self.owner is None and self.means is None:
            return rows[self.kept if row_of is None else row_of[self.kept]]
        total = torch.zeros(len(self.kept), rows.shape[1], dtype=torch.float32, device=rows.device)
        size = torch.zeros(len(self.kept), dtype=torch.float32, device=rows.device)
        into, units, weight = self.means or self._means_of_owners()
        row = units if row_of is None else row_of[units]
        if row_of is not None:  # a row that joins the same token many times joins it once, with the sum of the weights
            both, back = (into * len(rows) + row).unique(return_inverse=True)
            weight = torch.zeros(len(both), dtype=torch.float32, device=rows.device).index_add_(0, back, weight)
            into, row = both // len(rows), both % len(rows)
        size.index_add_(0, into, weight)
        for some in ascending(len(into), rows.device).split(AT_ONCE):
            total.index_add_(0, into[some], rows[row[some]].float() * weight[some][:, None])
        return (total / size[:, None]).to(rows.dtype)

    def _means_of_owners(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`owner` and `weight` as `means`."""
        units = (self.owner >= 0).nonzero()[:, 0]
        if self.weight is not None:
            return self.owner[units], units, self.weight[units]
        return self.owner[units], units, torch.ones(len(units), dtype=torch.float32, device=units.device)


@dataclass(frozen=True)
class Candidates:
    """B groups of rows (windows or frame pairs), padded to n rows each, in which a merger merges rows."""

    features: torch.Tensor  # float32 [B, n, D], what the merger declared in `needs`
    attention: torch.Tensor | None  # float32 [B, n], received in this layer; None unless declared
    place: torch.Tensor  # int64 [B, n], raster index in the frame pair
    size: torch.Tensor  # int64 [B, n], cluster sizes
    valid: torch.Tensor  # bool [B, n], False at padding, which is at the end of a group
    width: int  # W, units across the frame
