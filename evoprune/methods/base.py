"""The kinds of pruning methods: small frozen dataclasses whose fields are their settings.

An `InputMethod` makes the video smaller, an `EncoderMethod` reduces rows between layers of the tower (a `Merger` is one), a
`Selector` selects tokens after it, and a `LanguageMethod` drops tokens inside the language model (methods/language.py).
Methods know nothing of windows, rotary positions, patch mergers, placeholders or prompts. methods/chain.py combines them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, prod
from typing import Annotated, Any, ClassVar, Literal, Self

import torch

from evoprune.errors import UsageError
from evoprune.methods.plans import (
    Grid,
    Merge,
    Stage,
    TowerShape,
    layer_weights,
    rows_after_layers,
    spread,
)
from evoprune.methods.types import Candidates, Selection, Tokens

# Types of settings: the number's, and its range.
Share = Annotated[float, "[0, 1]"]
Part = Annotated[float, "(0, 1)"]
Cosine = Annotated[float, "[-1, 1]"]
Count = Annotated[int, "[1, inf)"]


@dataclass(frozen=True)
class Method:
    """Be the base of all methods; by itself it keeps every token."""

    name: ClassVar[str] = "none"  # by which users select it
    package: ClassVar[str] = ""  # how errors name a method of another package; set when it is loaded
    source: ClassVar[str] = ""  # the paper (arXiv id, section where known) that it follows, or "this project"
    acts: ClassVar[Literal["none", "input", "inside", "after", "language"]] = "none"
    # Whether exactly K tokens come out; otherwise the nearest count: at most K, or the method's minimum if that is more.
    exact: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self)

    def automatic(self) -> Self:
        """Return the same with a count that depends on the content, and is at most the budget's. Raises UsageError if it cannot."""
        raise not_automatic(self.name)

    @property
    def args(self) -> dict[str, Any]:
        """Return the settings by name, as reports show them."""

        def json_value(value: Any) -> Any:
            if isinstance(value, float) and not isfinite(value):
                return str(value)  # JSON has no infinite number
            return value

        return {f.name: json_value(getattr(self, f.name)) for f in fields(self)}


def not_automatic(name: str) -> UsageError:
    """Return the error of a budget of "auto" for a method that cannot let the content decide."""
    hint = "give a share such as 0.25, or take method evoprune"
    return UsageError(f"method {name} cannot let the content decide the budget", hint)


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """Makes the video smaller before the encoder: fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """Return the smaller grid that replaces `grid`: `keep` units or fewer where its shape allows, and no dimension may grow.

        A smaller T means fewer frames over the same time; smaller H and W mean frames of lower resolution.
        """


@dataclass(frozen=True)
class Selector(Method, ABC):
    """Selects some units: tokens after the encoder, or, in a stage of an `EncoderMethod`, rows that go on."""

    acts: ClassVar[Literal["after"]] = "after"
    # What it reads beside the features: "attention" or "keys" of the tower's last full-attention layer, "middle" for states in the
    # middle of the tower. Between layers: nothing, or "hidden" for rows before the next layer's norm.
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_question: ClassVar[bool] = False  # whether the selection is made again for each question
    drops: ClassVar[bool] = True  # whether the `unit_to_token` of a selection may be -1 for a unit that has a row
    weighs: ClassVar[bool] = False  # whether selections may have a `size`, by which the language model weighs tokens
    # For a method that ranks tokens, a function of them: float32 [N], higher for what is kept sooner.
    scores: ClassVar[Callable[[Self, Tokens], torch.Tensor] | None] = None

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """Return the tokens that the language model reads: `keep` of them, or another number if not `exact`."""

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Return whether a selection of `count` tokens is acceptable where `keep` of `units` were requested."""
        return count == keep


@dataclass(frozen=True)
class EncoderMethod(Method, ABC):
    """Reduces rows between layers of the tower, in stages."""

    acts: ClassVar[Literal["inside"]] = "inside"
    reuse: ClassVar[float] = 0.0  # a unit is encoded again if it changes by at least this many levels of 255; 0: always
    combines: ClassVar[bool] = False  # whether users may name the selector of tokens behind it: NAME+SELECTOR
    tokens: ClassVar[Selector | None] = None  # selects tokens after the tower; None where every row becomes a token
    # Whether `tokens` alone prunes an input that launches bound (`TowerShape.launch_bound`), without stages and reuse
    small_after_tower: ClassVar[bool] = False

    @abstractmethod
    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> Sequence[Stage]:
        """Say where how many rows are left, in the order of layers; `keep` is K, fewer than all units of the `grid`."""


@dataclass(frozen=True)
class Merger(EncoderMethod, ABC):
    """Merges rows between the encoder's layers, inside each window or frame pair."""

    # The feature that `match` compares, one of "keys" (of the layer, before rotary), "keys_rotary" and "hidden"; also "attention",
    # for attention received in the layer.
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True  # whether attention weighs a merged row by its cluster size (ToMe, section 3)

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Return int64 `[B, n]`: which row of its group each of the B groups' rows merges into, itself if it stays.

        The encoder calls this in rounds until every group has lost its rows, `remove` (int64 `[B]`) at most and one at least. On a
        GPU, it must not read values back (`item`, `nonzero`, masks as indices).
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Rows of a frame pair of so many units and windows after each layer, at last `keep`; here all remove equally many."""
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """Return the most calls of `match` that reduce a group from `rows` to `left` rows, for any content."""
        return rows - left

    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> list[Stage]:
        count, height, width = grid
        units = height * width
        windows = tower.windows(height, width)
        shares = [max(1, share) for share in spread(keep, count)]
        of_share = {share: self.rows(tower, units, windows, share) for share in set(shares)}
        stages = []
        before = prod(grid)
        for layer, left in enumerate(zip(*(of_share[share] for share in shares), strict=True), 1):
            if sum(left) < before:
                before = sum(left)
                stages.append(Stage(layer, before, Merge(self, left)))
        return stages


def check_settings(method: object) -> None:
    """Checks the fields of a method whose types have a range, such as `Share`; otherwise as `check_ranges`."""
    check_ranges(method, **{f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")})


def check_ranges(method: object, **ranges: str) -> None:
    """Checks attributes of a method, by an interval each such as "[0, 1]" or "(0, inf)"; a round bracket excludes the end.

    Raises ValueError: it names each number that is outside, NaN included, and its range.
    """
    wrong = []
    for name, interval in ranges.items():
        low, high = map(float, interval[1:-1].split(","))
        value = getattr(method, name)
        outside = not low <= value <= high  # so is what is no number
        at_open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if outside or at_open_end:
            wanted = _worded(low, high, interval)
            if not isfinite(value) and high == inf:
                wanted = "a finite number"
            wrong.append(f"{name}={value:g} is not {wanted}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """Return an interval, with its ends as numbers, in words."""
    above = "above" if interval[0] == "(" else "at least"
    below = "below" if interval[-1] == ")" else "at most"
    if high == inf:
        return f"{above} {low:g}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"from {low:g} to {high:g}"
    return f"{above} {low:g} and {below} {high:g}"
