"""What a pruning method is: a small frozen dataclass whose fields are its settings.

An `InputMethod` makes the video smaller before the encoder. A `Merger` merges rows between the encoder's layers. A
`Selector` keeps some tokens after the encoder. A `Front` saves work inside the encoder, in front of a selector.
`EvoPrune` and `EarlyTom` put a selector between two layers. Each makes an `EncoderPlan`. A `LanguageMethod`
(methods/language_method.py) drops tokens between layers of the language model and makes a `LanguagePlan`. No method
knows of windows, rotary positions, patch mergers, placeholders or prompts.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import Field, asdict, dataclass, field, fields
from math import prod
from types import NoneType
from typing import Any, ClassVar, Literal, Self, get_args

import torch

from evoprune.errors import UsageError
from evoprune.pruning.budget import spread
from evoprune.pruning.encoder_plan import EncoderPlan, Grid, TowerShape, full_plan
from evoprune.pruning.language_plan import LanguagePlan
from evoprune.pruning.schedule import layer_weights, rows_after_layers
from evoprune.pruning.types import Candidates, Selection, Tokens


@dataclass(frozen=True)
class Method:
    """The base of all methods; by itself it keeps every token.

    Class attributes:
        name: the name by which users select the method.
        source: the paper (arXiv id, section where known) that it follows, or "this project".
        acts: where it acts: nowhere, on the input, inside the encoder, after it, or inside the language model. For tables and help.
        exact: whether exactly K tokens come out. Otherwise the method keeps the nearest count that its shape allows: at most K, or
            its own minimum if that is more.
        reads_question: whether the selection depends on the question. It is then made again for each question.
    """

    name: ClassVar[str] = "none"
    source: ClassVar[str] = ""
    acts: ClassVar[Literal["none", "input", "inside", "after", "language"]] = "none"
    exact: ClassVar[bool] = True
    reads_question: ClassVar[bool] = False

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        """The encoder's work on one video.

        Args:
            tower: the shape of the vision tower.
            grid: (T, H, W) of the video in units.
            keep: K, the number of tokens for the language model.
        """
        return full_plan(tower, grid)

    @property
    def merger(self) -> "Merger | None":
        """The merger that runs between the encoder's layers; None without one."""
        return None

    @property
    def selector(self) -> "Selector | None":
        """The selector that runs inside the encoder or after it; None without one."""
        return None

    @property
    def inner(self) -> "Selector | None":
        """The selector that runs between layers of the encoder, where the plan says so; None without one.

        It gets the rows after the norm of the next layer, or, if it `needs` "hidden", as they are.
        """
        return None

    @property
    def weighs(self) -> bool:
        """Whether selections may have sizes (`Selection.size`), by which the language model's attention weighs tokens."""
        return False

    @property
    def encoder(self) -> "Method":
        """What it does before the language model: itself, but for a method that acts inside the language model."""
        return self

    @property
    def language(self) -> "Method | None":
        """The `LanguageMethod` that drops tokens inside the language model; None without one."""
        return None

    def language_plan(self, depth: int, tokens: int, budget: float) -> LanguagePlan | None:
        """What leaves the language model; None if nothing does.

        Args:
            depth: layers of the language model.
            tokens: visual tokens that reach it.
            budget: the share that the user asked for, in (0, 1].
        """
        return None

    def prompt_columns(self, depth: int, tokens: int, text: int, budget: float) -> int | tuple[int, ...]:
        """Columns of a prompt with `text` tokens of text, in each layer of the language model or in all; otherwise as above."""
        plan = self.language_plan(depth, tokens, budget)
        return tokens + text if plan is None else tuple(keys + text for keys, _, _ in plan.work)

    def prompt_work(self, depth: int, tokens: int, text: int, budget: float) -> int | list[tuple[int, ...]]:
        """The same for the cost: of each layer, the columns whose keys, queries and MLP it computes; or of all, a number."""
        plan = self.language_plan(depth, tokens, budget)
        return tokens + text if plan is None else [tuple(count + text for count in layer) for layer in plan.work]

    @property
    def args(self) -> dict[str, Any]:
        """The settings by name, as reports show them: an infinite number is a text, because JSON has no such number."""
        return _reported(asdict(self))

    @property
    def all_methods(self) -> "list[Method]":
        """This method and the methods that it holds in its fields."""
        held = [getattr(self, f.name) for f in fields(self) if f.metadata.get("method")]
        return [self, *(each for method in held if method for each in method.all_methods)]

    @property
    def reading(self) -> tuple[str, str]:
        """For the refusal of a method that reads the question: that it does, or what behind it does, and what to take instead."""
        name, selector = self.encoder.name, self.selector
        if selector in (None, self.encoder):
            return f"method {name} reads the question", "another method"
        return f"method {name} selects with {selector.name}, which reads the question", f"{name}+divprune"

    def automatic(self) -> Self:
        """The same method with a count that depends on the content, and is at most the budget's.

        Raises:
            UsageError: the method cannot do this.
        """
        raise UsageError(
            f"method {self.name} cannot let the content decide the budget",
            "give a share such as 0.25, or take method evoprune",
        )

    def acts_at(self, budget: float) -> bool:
        """Whether the method does anything at `budget`, a share in (0, 1]."""
        return self.acts != "none" and budget < 1

    def reported_budget(self, budget: float | str) -> float | str:
        """The budget for reports: 1.0 for a method that prunes nothing, else as given."""
        return 1.0 if self.acts == "none" else budget

    @classmethod
    def from_args(cls, args: dict[str, Any]) -> Self:
        """The method with settings as texts, as on a command line; other values count as their texts.

        Raises:
            UsageError: the method has no such setting, or a value has the wrong type or is out of range.
        """
        known = {f.name: f for f in _setting_fields(cls)}
        values = {}
        for name, text in args.items():
            if name not in known:
                raise UsageError(f"method {cls.name} has no argument {name!r}", cls.settings_hint())
            values[name] = _parse(cls, known[name], str(text))
        try:
            made = cls(**values)
        except ValueError as error:
            raise UsageError(f"method {cls.name}: {error}", cls.settings_hint()) from None
        if wrong := [name for name, value in values.items() if value != value]:  # NaN is no number to any method
            raise UsageError(f"method {cls.name}: {wrong[0]}=nan is not a number", cls.settings_hint())
        return made

    @classmethod
    def settings_hint(cls, name: str | None = None) -> str:
        """A hint that lists the settings, or that shows how one is given."""
        known = {f.name: f"{f.name}={f.default}" for f in _setting_fields(cls)}
        if name in known:
            return f"a setting has a value: {cls.name}:{known[name]}"
        return f"its arguments and defaults: {', '.join(known.values()) or 'none'}"


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """Makes the video smaller before the encoder: fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """The smaller grid that replaces `grid`; both are (T, H, W) in units.

        It has `keep` units or fewer where its shape allows. No dimension may grow. A smaller T means fewer frames over the same
        time; smaller H and W mean frames of lower resolution.
        """

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        return full_plan(tower, self.resize(grid, keep))


@dataclass(frozen=True)
class Merger(Method, ABC):
    """Merges rows between the encoder's layers, inside each window or frame pair.

    Class attributes:
        needs: the feature that `match` compares, one of "keys" (of the layer, before rotary), "keys_rotary" and "hidden"; also
            "attention", for attention received in the layer.
        size_bias: whether attention weighs a merged row by its cluster size (ToMe, arXiv 2210.09461, section 3).
    """

    acts: ClassVar[Literal["inside"]] = "inside"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Which row of its group each row merges into.

        The encoder calls this in rounds until every group has lost its rows. On a GPU, it must not read values back (`item`,
        `nonzero`, masks as indices).

        Args:
            candidates: B groups of up to n rows.
            remove: int64 `[B]`, how many rows each group must still lose. A round removes at least one of them, and never more.

        Returns:
            int64 `[B, n]`, indices inside the group; its own index for a row that stays.
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Rows of one frame pair after each layer; here every layer removes equally many.

        Args:
            tower: the shape of the vision tower.
            units, windows: of the frame pair.
            keep: rows after the last layer.
        """
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """The most calls of `match` that reduce a group from `rows` to `left` rows, for any content."""
        return rows - left

    @property
    def merger(self) -> "Merger":
        return self

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        count, height, width = grid
        if keep >= prod(grid):
            return full_plan(tower, grid)
        units, windows = height * width, tower.windows(height, width)
        shares = [max(1, share) for share in spread(keep, count)]
        of_share = {share: tuple(self.rows(tower, units, windows, share)) for share in set(shares)}
        merged = tuple(of_share[share] for share in shares)
        left = [sum(rows) for rows in zip(*merged, strict=True)]
        return EncoderPlan(grid, keep, (prod(grid), *left[:-1]), left[-1], merged=merged)


@dataclass(frozen=True)
class Selector(Method, ABC):
    """Keeps some of the tokens: one function over the encoder's output.

    Class attributes:
        needs: what it reads beside the features: "attention" or "keys" of the tower's last full-attention layer, "middle" for
            states in the middle of the tower.
        scores: for a method that ranks tokens, a function of them: float32 `[N]`, higher for what is kept sooner. Else None.
    """

    acts: ClassVar[Literal["after"]] = "after"
    needs: ClassVar[frozenset[str]] = frozenset()
    scores: ClassVar[Callable[[Self, Tokens], torch.Tensor] | None] = None

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """The tokens that the language model reads: `keep` of them, or another number if not `exact`."""

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Whether a selection of `count` tokens is acceptable where `keep` of `units` were requested."""
        return count == keep

    @property
    def selector(self) -> "Selector":
        return self

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        return full_plan(tower, grid, keep)


@dataclass(frozen=True)
class Front(Method, ABC):
    """What saves work inside the encoder and leaves every unit a token, in front of a selector after it.

    Field: then: the selector, which users name after `NAME+`.
    """

    then: Selector | None = field(default=None, metadata={"method": True})

    @property
    def args(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in _setting_fields(type(self))}
        return {**_reported(own), self.then.name: self.then.args}

    @property
    def selector(self) -> Selector:
        return self.then

    @property
    def exact(self) -> bool:
        return self.then.exact

    @property
    def weighs(self) -> bool:
        return self.then.weighs

    @property
    def reads_question(self) -> bool:
        return self.then.reads_question

    def automatic(self) -> Self:
        raise UsageError(
            f"method {self.name}+{self.then.name} cannot let the content decide the budget",
            "give a share such as 0.25, or take method evoprune",
        )


def _setting_fields(method: type[Method]) -> list[Field]:
    """The fields that users set: all except those that hold another method, or what belongs to a model."""
    return [f for f in fields(method) if not f.metadata]


def _reported(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: str(v) if isinstance(v, float) and not math.isfinite(v) else v for name, v in settings.items()}


def _parse(method: type[Method], field_: Field, text: str):
    """The value of a setting given as text, in the type of its default."""
    kind = type(field_.default)
    if field_.default is None:
        if text == "None":
            return None
        kind = next(kind for kind in get_args(field_.type) if kind is not NoneType)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        problem = f"method {method.name}: {field_.name}={text!r} is not {kind.__name__}"
        raise UsageError(problem, method.settings_hint()) from None
