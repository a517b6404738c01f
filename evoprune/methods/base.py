"""The kinds of pruning methods: small frozen dataclasses whose fields are their settings.

An `InputMethod` makes the video smaller, an `EncoderMethod` (such as a `Merger`) reduces rows between layers of the tower, a
`Selector` selects tokens after the tower, and a `LanguageMethod` drops tokens inside the language model (methods/language.py).
Methods know nothing about windows, rotary positions, patch mergers, placeholders or prompts. methods/chain.py combines them.
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
    """Base class of all methods. By itself it keeps every token."""

    name: ClassVar[str] = "none"  # name that users select the method by
    package: ClassVar[str] = ""  # how errors name a plug-in method; set when it is loaded
    source: ClassVar[str] = ""  # the paper that it follows (arXiv id, section if known), or "this project"
    acts: ClassVar[Literal["none", "input", "inside", "after", "language"]] = "none"
    # Whether exactly K tokens come out; otherwise the nearest count: at most K, or the method's minimum if that is more.
    exact: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self)

    def automatic(self) -> Self:
        """Return a copy whose number of tokens depends on the content and is at most the budget's.

        Raises:
            UsageError: The method does not support this.
        """
        raise not_automatic(self.name)

    @property
    def args(self) -> dict[str, Any]:
        """The settings by name, as reports show them."""

        def json_value(value: Any) -> Any:
            if isinstance(value, float) and not isfinite(value):
                return str(value)  # JSON has no infinity
            return value

        return {f.name: json_value(getattr(self, f.name)) for f in fields(self)}


def not_automatic(name: str) -> UsageError:
    """Return the error for an "auto" budget with a method that cannot let the content decide."""
    hint = "give a share such as 0.25, or use method evoprune"
    return UsageError(f"method {name} does not support automatic budgets", hint)


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """Makes the video smaller before the encoder, with fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """Return the smaller grid that replaces `grid`: at most `keep` units if its shape allows, and no larger in any dimension.

        A smaller T means fewer frames over the same time; smaller H and W mean lower resolution.
        """


@dataclass(frozen=True)
class Selector(Method, ABC):
    """Selects units: tokens after the encoder or, in a stage of an `EncoderMethod`, rows that continue."""

    acts: ClassVar[Literal["after"]] = "after"
    # Inputs besides the features: "attention" or "keys" of the tower's last full-attention layer, or "middle" for states in the
    # middle of the tower. Between layers: nothing, or "hidden" for rows before the next layer's norm.
    needs: ClassVar[frozenset[str]] = frozenset()
    reads_question: ClassVar[bool] = False  # whether the selection is made again for each question
    drops: ClassVar[bool] = True  # whether the `unit_to_token` of a selection may be -1 for a unit that has a row
    weighs: ClassVar[bool] = False  # whether selections may have a `size`, which weights tokens in attention
    # For methods that rank tokens: a function of the tokens that returns float32 [N], higher for tokens to keep first.
    scores: ClassVar[Callable[[Self, Tokens], torch.Tensor] | None] = None

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """Return the tokens that the language model reads: `keep` of them, or another number if not `exact`."""

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Return True if a selection of `count` tokens is acceptable when `keep` of `units` were requested."""
        return count == keep


@dataclass(frozen=True)
class EncoderMethod(Method, ABC):
    """Reduces rows between layers of the tower, in stages."""

    acts: ClassVar[Literal["inside"]] = "inside"
    reuse: ClassVar[float] = 0.0  # a unit is encoded again if it changes by at least this many of 255 levels; 0: always
    combines: ClassVar[bool] = False  # whether users may name the token selector that follows it: NAME+SELECTOR
    tokens: ClassVar[Selector | None] = None  # selects tokens after the tower; None if every row becomes a token
    # Whether launch-bound inputs (`TowerShape.launch_bound`) skip stages and reuse, and only `tokens` prunes them
    small_after_tower: ClassVar[bool] = False

    @abstractmethod
    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> Sequence[Stage]:
        """Return the stages that reduce rows, in the order of their layers.

        `keep` is K, less than the number of units in `grid`.
        """


@dataclass(frozen=True)
class Merger(EncoderMethod, ABC):
    """Merges rows between the encoder's layers, inside windows or frame pairs."""

    # The feature that `match` compares: "keys" (of the layer, before rotary), "keys_rotary" or "hidden". Also "attention",
    # for the attention received in the layer.
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True  # whether attention weighs a merged row by its cluster size (ToMe, section 3)

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Return int64 `[B, n]`: the row of its group that each row merges into, or itself if it stays.

        The encoder calls this in rounds until every group has lost enough rows. A round removes at most `remove` (int64 `[B]`) rows
        and at least one. On a GPU, it must not read values back (`item`, `nonzero`, masks as indices).
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Return the rows of a frame pair with this many units and windows after each layer, down to `keep`.

        Here all layers remove the same number of rows.
        """
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """Return the maximum number of `match` calls that reduce a group from `rows` to `left` rows, for any content."""
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
    """Check fields whose types have a range, as in `Annotated[float, "[0, 1]"]`. Raises the same errors as `check_ranges`."""
    check_ranges(method, **{f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")})


def check_ranges(method: object, **ranges: str) -> None:
    """Check attributes of a method against intervals such as "[0, 1]" or "(0, inf)"; a round bracket excludes the end.

    Raises:
        ValueError: Some numbers (or NaN) are outside their range. The message names them with their ranges.
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
    """Return an interval in words; `low` and `high` are its ends as numbers."""
    above = "above" if interval[0] == "(" else "at least"
    below = "below" if interval[-1] == ")" else "at most"
    if high == inf:
        return f"{above} {low:g}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"from {low:g} to {high:g}"
    return f"{above} {low:g} and {below} {high:g}"
