"""What a pruning method is: a small frozen dataclass whose fields are its settings.

There are four kinds. An `InputMethod` makes the video smaller before the encoder. A `Merger` merges rows between the encoder's
layers. A `Selector` keeps some tokens after the encoder. `EvoPrune` reuses rows in time and puts a selector between two layers.
Each makes an `EncoderPlan`. None of them knows of windows, rotary positions, patch mergers, placeholders or prompts.
"""

from abc import ABC, abstractmethod
from dataclasses import Field, dataclass, fields
from math import prod
from types import NoneType
from typing import ClassVar, Literal, Self, get_args

import torch

from evoprune.errors import UsageError
from evoprune.pruning.budget import spread
from evoprune.pruning.plan import EncoderPlan, Grid, TowerShape, full_plan
from evoprune.pruning.schedule import layer_weights, rows_after_layers
from evoprune.pruning.types import Candidates, Selection, Tokens


@dataclass(frozen=True)
class Method:
    """The base of all methods; by itself it keeps everything.

    Class attributes:
        name: how users select the method.
        source: the paper and section that it follows.
        acts: where it acts; for tables and help.
        exact: whether exactly K tokens come out; otherwise the nearest count that the method's shape allows, at most K unless that
            is below its least.
        reads_question: whether the selection depends on the question; it is then made again for each one.
    """

    name: ClassVar[str] = "none"
    source: ClassVar[str] = ""
    acts: ClassVar[Literal["none", "input", "inside", "after"]] = "none"
    exact: ClassVar[bool] = True
    reads_question: ClassVar[bool] = False

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        """What the encoder does with a video of `grid` (T, H, W) units, of which `keep` tokens are to be left."""
        return full_plan(tower, grid)

    @property
    def merger(self) -> "Merger | None":
        """What merges rows between the encoder's layers."""
        return None

    @property
    def selector(self) -> "Selector | None":
        """What selects tokens, inside the encoder or after it."""
        return None

    def automatic(self) -> Self:
        """The same method, keeping as many tokens as the content asks for and at most its budget.

        Raises:
            UsageError: the method cannot.
        """
        raise UsageError(
            f"method {self.name} cannot choose a budget by itself", "give a share (-b 0.25), or take --method evoprune"
        )

    def prunes(self, budget: float) -> bool:
        """Whether the method does anything at a budget."""
        return self.acts != "none" and budget < 1

    def reported_budget(self, budget: float | str) -> float | str:
        """The budget as reports show it: 1.0 for a method that prunes nothing."""
        return 1.0 if self.acts == "none" else budget

    @classmethod
    def from_args(cls, args: dict[str, str]) -> Self:
        """The method with settings given as texts, as on a command line.

        Raises:
            UsageError: the method has no such setting, or the value is not of its type or out of range.
        """
        known = {f.name: f for f in _setting_fields(cls)}
        values = {}
        for name, text in args.items():
            if name not in known:
                raise UsageError(f"method {cls.name} has no argument {name!r}", _settings(cls))
            values[name] = _parse(cls, known[name], text)
        try:
            return cls(**values)
        except ValueError as error:
            raise UsageError(f"method {cls.name}: {error}", _settings(cls)) from None


@dataclass(frozen=True)
class InputMethod(Method, ABC):
    """Makes the video smaller before the encoder: fewer or smaller frames."""

    acts: ClassVar[Literal["input"]] = "input"
    exact: ClassVar[bool] = False

    @abstractmethod
    def resize(self, grid: Grid, keep: int) -> Grid:
        """The grid (T, H, W) in units to look at instead of `grid`, with `keep` units or fewer where its shape allows.

        No side may grow. Fewer T are fewer frames, spread over the same time; smaller H and W are frames of lower resolution.
        """

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        return full_plan(tower, self.resize(grid, keep))


@dataclass(frozen=True)
class Merger(Method, ABC):
    """Merges rows between the encoder's layers, inside each window or frame pair.

    Class attributes:
        needs: the feature that `match` compares, one of "keys" (of the layer, before rotary), "keys_rotary" and "hidden"; and
            "attention" for attention received in the layer.
        size_bias: whether attention weighs a merged row by the units that it represents (ToMe, arXiv 2210.09461, section 3).
    """

    acts: ClassVar[Literal["inside"]] = "inside"
    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    size_bias: ClassVar[bool] = True

    @abstractmethod
    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Where each row of each group goes: int64 `[B, n]`, itself if it stays.

        Args:
            candidates: the groups.
            remove: int64 `[B]`, how many rows each group must lose. At least one must go where any should, and never more. The
                encoder calls again for the rest. On a GPU this function must not read values back (`item`, `nonzero`, masks as
                indices).
        """

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Rows of one frame pair after each layer, when `keep` of its `units` are to be left; here each layer removes as many."""
        return rows_after_layers(tower, units, windows, keep, layer_weights(tower.depth, "mean", 0.0, 1.0))

    def rounds(self, rows: int, left: int) -> int:
        """At most how many calls of `match` reduce a group from `rows` to `left` rows, whatever they are."""
        return rows - left

    @property
    def merger(self) -> "Merger":
        return self

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        count, height, width = grid
        if keep >= prod(grid):
            return full_plan(tower, grid)
        units, windows = height * width, tower.windows(height, width)
        due = [max(1, share) for share in spread(keep, count)]
        of_share = {share: tuple(self.rows(tower, units, windows, share)) for share in set(due)}
        merged = tuple(of_share[share] for share in due)
        left = [sum(rows) for rows in zip(*merged, strict=True)]
        return EncoderPlan(grid, keep, (prod(grid), *left[:-1]), left[-1], merged=merged)


@dataclass(frozen=True)
class Selector(Method, ABC):
    """Keeps some of the tokens: one function over what the encoder made of the video.

    Class attributes:
        needs: what it reads beside the features, of "attention" and "keys" in the tower's last full-attention layer.
    """

    acts: ClassVar[Literal["after"]] = "after"
    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def select(self, tokens: Tokens, keep: int) -> Selection:
        """The `keep` tokens that the language model reads."""

    def suffices(self, count: int, keep: int, units: int) -> bool:
        """Whether a selection of `count` of `units` is an answer to a request for `keep`."""
        return count == keep

    @property
    def selector(self) -> "Selector":
        return self

    def plan(self, tower: TowerShape, grid: Grid, keep: int) -> EncoderPlan:
        return full_plan(tower, grid, keep)


def _setting_fields(method: type[Method]) -> list[Field]:
    """The fields that users set: all but other methods."""
    return [f for f in fields(method) if not f.metadata.get("method")]


def _settings(method: type[Method]) -> str:
    known = ", ".join(f"{f.name}={f.default}" for f in _setting_fields(method))
    return f"its arguments and defaults: {known or 'none'}"


def _parse(method: type[Method], field_: Field, text: str):
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
        raise UsageError(problem, _settings(method)) from None
