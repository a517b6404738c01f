"""Base classes for pruning methods. A method is a small frozen dataclass whose fields are its settings.

There are four kinds of methods. An `InputMethod` makes the video smaller. An `EncoderMethod` (such as a `Merger`) reduces the
number of rows between layers of the tower. A `Selector` selects tokens after the tower. A `LanguageMethod` drops tokens inside the
language model (methods/language.py). Methods do not need to know about windows, rotary positions, patch mergers, placeholders or
prompts. methods/chain.py combines them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite, prod
from typing import Any, ClassVar, Literal, Self

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


@dataclass(frozen=True)
class Method:
    """The base class of all methods. Used directly, it keeps every token."""

    name: ClassVar[str] = "none"  # the name by which users select the method
    package: ClassVar[str] = ""  # how error messages refer to a plug-in method; set when the plug-in is loaded
    source: ClassVar[str] = ""  # the paper that the method follows (arXiv id, and section if known), or "this project"
    acts: ClassVar[Literal["none", "input", "inside", "after", "language"]] = "none"
    # Whether the method returns exactly K tokens. Otherwise it returns the closest count that it can reach without exceeding K,
    # or its minimum if that is more than K.
    exact: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self)

    def automatic(self) -> Self:
        """Return a copy of the method that lets the content decide how many tokens to keep, up to the budget.

        Raises:
            UsageError: If the method does not support automatic budgets.
        """
        raise not_automatic(self.name)

    @property
    def args(self) -> dict[str, Any]:
        """The settings by name, as shown in reports."""

        def json_value(value: Any) -> Any:
            if isinstance(value, float) and not isfinite(value):
                return str(value)  # JSON has no infinity
            return value

        return {f.name: json_value(getattr(self, f.name)) for f in fields(self)}


def not_automatic(name: str) -> UsageError:
    """Return the error for an "auto" budget with a method that does not support automatic budgets."""
    hint = "give a share such as 0.25, or use method evoprune"
    return UsageError(f"method {name} does not support automatic budgets", hint)


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """A method that makes the video smaller before it is encoded, by using fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """Return the smaller grid that replaces `grid`.

        The new grid is no larger in any dimension, and it has at most `keep` units if its shape allows that. A smaller T means
        fewer frames over the same time. A smaller H or W means a lower resolution.
        """


@dataclass(frozen=True)
class Selector(Method, ABC):
    """A method that selects units: tokens after the encoder or, in a stage of an `EncoderMethod`, rows."""

    acts: ClassVar[Literal["after"]] = "after"
    # The inputs that the selector needs besides the features. After the tower, a selector can request "attention" and "keys", which
    # come from the last full-attention layer, and "middle", the states from the middle of the tower. Between layers, it can request
    # only "hidden": instead of the rows after the next layer's norm, it then sees the rows before this norm.
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_question: ClassVar[bool] = False  # whether the selection depends on the question and is repeated for each one
    drops: ClassVar[bool] = True  # whether `unit_to_token` in a selection may be -1 for a unit that has a row
    weighs: ClassVar[bool] = False  # whether selections may have a `size`, which weights tokens in attention
    # For methods that rank tokens: a function that takes the tokens and returns float32 [N]. Tokens with higher scores are kept
    # first.
    scores: ClassVar[Callable[[Self, Tokens], torch.Tensor] | None] = None

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """Select the tokens that the language model reads. If the method is `exact`, it selects exactly `keep` of them."""

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Return True if a selection may have `count` tokens when `keep` of the video's `units` were requested."""
        return count == keep


@dataclass(frozen=True)
class EncoderMethod(Method, ABC):
    """A method that reduces the number of rows between layers of the tower, in one or more stages."""

    acts: ClassVar[Literal["inside"]] = "inside"
    # A unit that changed by at least this many of 255 levels is encoded again. With 0, every unit is encoded.
    reuse: ClassVar[float] = 0.0
    combines: ClassVar[bool] = False  # whether users may append a token selector, as in NAME+SELECTOR
    tokens: ClassVar[Selector | None] = None  # selects tokens after the tower; None if every row becomes a token
    # Whether launch-bound inputs (see `TowerShape.launch_bound`) skip stages and reuse, so that only `tokens` prunes them.
    small_after_tower: ClassVar[bool] = False

    @abstractmethod
    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> Sequence[Stage]:
        """Return the stages that reduce the number of rows, in the order of their layers.

        `keep` is K. It is less than the number of units in `grid`.
        """


@dataclass(frozen=True)
class Merger(EncoderMethod, ABC):
    """A method that merges rows between the encoder's layers. Rows merge only within the same window or frame pair."""

    # The feature that `match` compares: "keys" (the layer's keys before rotary), "keys_rotary" or "hidden". Add "attention" if
    # `match` also needs the attention that rows receive in the layer.
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True  # whether attention weights a merged row by its cluster size (ToMe, section 3)

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Return int64 `[B, n]`: the index of the row that each row merges into. A row that stays gets its own index.

        Indices are relative to the row's group. The encoder calls this method in rounds until every group has lost enough rows.
        Each round must remove at least one row in total, and at most `remove` (int64 `[B]`) rows from each group. On a GPU, the
        method must not read values back to the host, so it cannot use `item`, `nonzero` or boolean indexing.
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Return the number of rows left in a frame pair after each layer, down to `keep`.

        By default, all layers remove the same number of rows.

        Args:
            units: The number of units in the frame pair.
            windows: The number of windows in the frame pair.
        """
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """Return the maximum number of `match` calls needed to reduce a group from `rows` to `left` rows, whatever the content."""
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
    """Check all fields whose type declares a range, such as `Annotated[float, "[0, 1]"]`.

    Raises:
        ValueError: See `check_ranges`.
    """
    check_ranges(method, **{f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")})


def check_ranges(method: object, **ranges: str) -> None:
    """Check that attributes of a method lie within intervals such as "[0, 1]" or "(0, inf)". A parenthesis excludes the endpoint.

    Raises:
        ValueError: If a value is NaN or out of range. The message lists all such values with their ranges.
    """
    wrong = []
    for name, interval in ranges.items():
        low, high = map(float, interval[1:-1].split(","))
        value = getattr(method, name)
        outside = not low <= value <= high  # true for NaN, too
        at_open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if outside or at_open_end:
            wanted = _worded(low, high, interval)
            if not isfinite(value) and high == inf:
                wanted = "a finite number"
            wrong.append(f"{name}={value:g} is not {wanted}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """Describe an interval in words. `low` and `high` are its endpoints as numbers."""
    above = "above" if interval[0] == "(" else "at least"
    below = "below" if interval[-1] == ")" else "at most"
    if high == inf:
        return f"{above} {low:g}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"from {low:g} to {high:g}"
    return f"{above} {low:g} and {below} {high:g}"
