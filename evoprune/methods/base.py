"""Base classes for pruning methods. A method is a small frozen dataclass whose fields are its settings.

There are four types of methods. An `InputMethod` makes the video smaller. An `EncoderMethod`, such as a `Merger` (merger.py),
reduces the number of rows between tower layers. A `Selector` selects tokens after the tower. A `LanguageMethod` drops tokens inside
the language model (methods/language.py). Methods don't need to know about windows, rotary positions, patch mergers, placeholders,
or prompts. methods/chain.py combines methods of different types.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from math import inf, isfinite
from typing import Any, ClassVar, Literal, Self

import torch

from evoprune.errors import UsageError
from evoprune.methods.plans import Grid, Stage, TowerShape
from evoprune.methods.types import Selection, Tokens


@dataclass(frozen=True)
class Method:
    """The base class of all pruning methods. An instance of this class itself keeps every token."""

    name: ClassVar[str] = "none"  # name by which users select the method
    package: ClassVar[str] = ""  # name of a plug-in method in error messages; set when the plug-in is loaded
    source: ClassVar[str] = ""  # the method's source: a paper (arXiv ID, and section if known) or "this project"
    acts: ClassVar[Literal["none", "input", "inside", "after", "language"]] = "none"
    # Whether the method returns exactly K tokens. If not, it gets as close to K as possible without exceeding it, unless the
    # smallest token count that it supports is already larger than K.
    exact: ClassVar[bool] = True

    def __post_init__(self):
        check_settings(self)

    def automatic(self) -> Self:
        """Return a copy of the method that chooses the token count based on the video content, up to the budget.

        Raises:
            UsageError: If the method does not support automatic budgets.
        """
        raise not_automatic(self.name)

    @property
    def args(self) -> dict[str, Any]:
        """The method's settings as shown in reports, keyed by name."""

        def json_value(value: Any) -> Any:
            if isinstance(value, float) and not isfinite(value):
                return str(value)  # JSON does not support infinity
            return value

        return {f.name: json_value(getattr(self, f.name)) for f in fields(self)}


def not_automatic(name: str) -> UsageError:
    """Return the error for an "auto" budget with a method that does not support automatic budgets."""
    hint = "give a share such as 0.25, or use method evoprune"
    return UsageError(f"method {name} does not support automatic budgets", hint)


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """A method that makes the video smaller before encoding, by using fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """Return the smaller (T, H, W) grid at which to encode the video.

        No dimension of the new grid may exceed the corresponding dimension of `grid`. The new grid has at most `keep` units, if the
        method can make it that small. A smaller T means fewer frames for the same time span, and a smaller H or W means a lower
        resolution.
        """


@dataclass(frozen=True)
class Selector(Method, ABC):
    """A method that selects tokens after the vision encoder, or rows between its layers as a stage of an `EncoderMethod`."""

    acts: ClassVar[Literal["after"]] = "after"
    # The inputs that the selector needs in addition to the features. After the tower, a selector can request "attention" and
    # "keys", which come from the last full-attention layer, and "middle", the states from the middle of the tower. Between layers,
    # it normally gets the rows after the next layer's norm, and can only request "hidden", the rows before this norm.
    needs: ClassVar[frozenset[str]] = frozenset()
    # Whether the selection depends on the question and is repeated for each question.
    reads_question: ClassVar[bool] = False
    drops: ClassVar[bool] = True  # whether `unit_to_token` in a selection may be -1 for a unit with a row
    weighs: ClassVar[bool] = False  # whether selections may have a `size`, which weights tokens in attention
    # For ranking methods: a function that takes the tokens and returns their scores as float32 [N]. Tokens with higher scores are
    # kept first. None for all other methods.
    scores: ClassVar[Callable[[Self, Tokens], torch.Tensor] | None] = None

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """Select the tokens to pass to the language model: exactly `keep` tokens if the method is `exact`."""

    def check_tower(self, tower: TowerShape) -> None:
        """Check that the selector can select tokens of a vision tower.

        Raises:
            UsageError: If it cannot, for example because it was trained for another model.
        """

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Return True if `count` is a valid number of tokens to select.

        Args:
            count: The number of selected tokens.
            keep: The requested number of tokens.
            units: The number of units in the video.
        """
        return count == keep


@dataclass(frozen=True)
class EncoderMethod(Method, ABC):
    """A method that prunes inside the vision tower. It reduces the number of rows between layers, in one or more stages."""

    acts: ClassVar[Literal["inside"]] = "inside"
    # Units are re-encoded if their pixels changed by at least this many of 255 levels. With 0, every unit is encoded.
    reuse: ClassVar[float] = 0.0
    # Whether units whose pixels are predicted exactly by other units are not encoded. See `EncoderPlan.predict`.
    predict: ClassVar[bool] = False
    combines: ClassVar[bool] = False  # whether users may append a token selector, as in NAME+SELECTOR
    tokens: ClassVar[Selector | None] = None  # selects tokens after the tower; None if every row becomes a token
    # Whether launch-bound inputs (see `TowerShape.launch_bound`) skip all stages and reuse, so that only `tokens` prunes them.
    small_after_tower: ClassVar[bool] = False

    @abstractmethod
    def stages(self, tower: TowerShape, grid: Grid, keep: int) -> Sequence[Stage]:
        """Return the stages that reduce the number of rows, in layer order.

        Args:
            keep: K, the number of tokens to keep, which is always less than the number of units in `grid`.
        """


def check_settings(method: object) -> None:
    """Check the values of all fields whose type declares a range, such as `Annotated[float, "[0, 1]"]`.

    Raises:
        ValueError: See `check_ranges`.
    """
    check_ranges(method, **{f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")})


def check_ranges(method: object, **ranges: str) -> None:
    """Check that the method's attributes lie within the given intervals.

    Args:
        ranges: Intervals such as "[0, 1]" or "(0, inf)", keyed by attribute name. Parentheses exclude the endpoint.

    Raises:
        ValueError: If a value is NaN or out of range. The message lists all such values with their ranges.
    """
    wrong = []
    for name, interval in ranges.items():
        low, high = map(float, interval[1:-1].split(","))
        value = getattr(method, name)
        outside = not low <= value <= high  # also true for NaN
        at_open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if outside or at_open_end:
            wanted = _worded(low, high, interval)
            if not isfinite(value) and high == inf:
                wanted = "a finite number"
            wrong.append(f"{name}={value:g} is not {wanted}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """Describe an interval in words, such as "from 0 to 1" for "[0, 1]". `low` and `high` are its endpoints as numbers."""
    above = "above" if interval[0] == "(" else "at least"
    below = "below" if interval[-1] == ")" else "at most"
    if high == inf:
        return f"{above} {low:g}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"from {low:g} to {high:g}"
    return f"{above} {low:g} and {below} {high:g}"
