"""What a pruning method is: a small frozen dataclass whose fields are its settings and whose hooks do nothing by default.

A method may act on the `input` (`plan`), `inside` the encoder (`rows`, `match`, `narrow`) and `after` it (`select`). It says in
`needs` what it wants to be given and gets only that. It knows nothing of windows, rotary positions, patch mergers, placeholders or
prompts.
"""

from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from functools import cached_property
from types import NoneType
from typing import ClassVar, Literal, get_args

import torch

from evoprune.errors import UsageError
from evoprune.pruning.schedule import TowerShape

AT_ONCE = 4096  # units of which float32 copies are made at a time


@dataclass(frozen=True)
class Candidates:
    """Groups of rows (windows, grids or blocks of grids) that are to lose some, side by side; padding at the end of a group is not
    `valid`.

    Attributes:
        features: float32 `[B, n, D]`, what the method asked for in `features`.
        attention: float32 `[B, n]`, attention received, or None if not asked for.
        place: int64 `[B, n]`, raster index in the grid.
        moment: int64 `[B, n]`, grid in the block.
        size: int64 `[B, n]`, units of the block that each row stands for.
        valid: bool `[B, n]`.
        grid_width: units a row of the grid.
    """

    features: torch.Tensor
    attention: torch.Tensor | None
    place: torch.Tensor
    moment: torch.Tensor
    size: torch.Tensor
    valid: torch.Tensor
    grid_width: int


@dataclass(frozen=True)
class Tokens:
    """What leaves the encoder, before the language model reads it.

    Attributes:
        rows: `[E, D]`, ordered by place; all units, unless the encoder left some out.
        owner: int64 `[N]`, which of them stands for each unit of the video.
        grid: (T, H, W) in units.
        seconds_per_grid: time from one grid to the next.
        seed: for methods that draw lots.
        given: what the method asked for: float32 "attention" `[E]` and "keys" `[E, 4 d]`, a value a row; "question" `[Q, D]`.
        home: int64 `[E]`, the unit at whose place each row sits, where the rows were chosen inside the tower; else None.
    """

    rows: torch.Tensor
    owner: torch.Tensor
    grid: tuple[int, int, int]
    seconds_per_grid: float
    seed: int
    given: Mapping[str, torch.Tensor] = field(default_factory=dict)
    home: torch.Tensor | None = None

    @cached_property
    def features(self) -> torch.Tensor:
        """`[N, D]`: a token for each unit of the video, in order."""
        return self._of_units(self.rows)

    @cached_property
    def attention(self) -> torch.Tensor:
        """float32 `[N]`: attention that each unit receives in its grid, in the tower's last layer that sees whole grids.

        Mean over heads and over all units of the grid as queries, sum over the unit's patches, times the units of a grid: 1 is an
        even share. A merged row counts as often as the units it stands for, both as query and as key, and what it receives is
        shared out among them evenly; a unit that was not encoded again has what its reference received then.

        Raises:
            TypeError: not asked for.
        """
        return self._of_units(self._given("attention"))

    @cached_property
    def keys(self) -> torch.Tensor:
        """float32 `[N, 4 d]`: the key of each unit in the same layer, before rotary: mean over heads, its four patches joined.

        Joined and not averaged, because what lies where inside the unit is part of what it shows. Merged rows have the mean.

        Raises:
            TypeError: not asked for.
        """
        return self._of_units(self._given("keys"))

    @property
    def question(self) -> torch.Tensor:
        """float32 `[Q, D]`: the language model's embeddings of the question's tokens, without the prompt around them.

        Raises:
            TypeError: not asked for.
        """
        return self._given("question")

    def _given(self, name: str) -> torch.Tensor:
        if name not in self.given:
            how = "`reads_question`" if name == "question" else f'"{name}" among its `needs`'
            raise TypeError(f"the {name} was not asked for: the method has to say so, by {how}")
        return self.given[name]

    def _of_units(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if len(rows) == len(self.owner) else rows[self.owner]


@dataclass(frozen=True)
class Selection:
    """Which tokens the language model reads, where some of them stand for others too.

    Attributes:
        kept: int64 `[K]`, ascending units; each goes on at its own place.
        owner: int64 `[N]`, for every unit the number in `kept` of the one whose mean it goes into, -1 for none. Every kept
            token has at least one.
        weight: float32 `[N]`, how much each unit counts in that mean, at least 0 and the kept ones above it; None for all the same.
        counts: float32 `[K]`, as how many tokens the language model's attention counts each, above 0; None for one each.
    """

    kept: torch.Tensor
    owner: torch.Tensor
    weight: torch.Tensor | None = None
    counts: torch.Tensor | None = None

    def features(self, rows: torch.Tensor, of: torch.Tensor | None = None) -> torch.Tensor:
        """`[K, D]`: the mean of the units that each kept one stands for, made in float32.

        Args:
            rows: `[E, D]`.
            of: int64 `[N]`, which row each unit has; None where each has its own.
        """
        total = torch.zeros(len(self.kept), rows.shape[1], device=rows.device)
        size = torch.zeros(len(self.kept), device=rows.device)
        units = (self.owner >= 0).nonzero()[:, 0]
        into, row = self.owner[units], units if of is None else of[units]
        weight = torch.ones(len(units), device=rows.device) if self.weight is None else self.weight[units]
        if of is not None:  # the same row into the same token many times is common: once, and as much heavier
            pair, back = (into * len(rows) + row).unique(return_inverse=True)
            weight = torch.zeros(len(pair), device=rows.device).index_add_(0, back, weight)
            into, row = pair // len(rows), pair % len(rows)
        size.index_add_(0, into, weight)
        for some in torch.arange(len(into), device=rows.device).split(AT_ONCE):
            total.index_add_(0, into[some], rows[row[some]].float() * weight[some][:, None])
        return (total / size[:, None]).to(rows.dtype)


@dataclass(frozen=True)
class Method:
    """Keeps everything; the base of all methods.

    Class attributes:
        name: what it is selected by.
        acts: where; for tables and help.
        block: grids of a block, inside which rows are counted and may be merged.
        needs: what a method is given that acts inside the encoder: "attention", and one of "keys", "keys_rotary" and "hidden" as
            features; or after it: "attention", "keys".
        size_bias: whether attention counts a merged row as often as the units it stands for.
        reuse: by how many levels of 255 a unit must differ from its reference to be encoded anew (pruning/reference.py); 0 for all.
        refresh: in so many grids each unit has its turn to be encoded anew all the same; 0 for never.
        encoder_budget: share of the units that the encoder goes on computing, where it was set apart from the budget; None where
            it follows from it. A method that has such a share has a field of this name.
        exact: whether exactly K tokens come out; otherwise the nearest number not above K that the method's shape allows, or
            its least.
        reads_question: whether what is kept depends on the question, which `select` is given then, once for each.
    """

    name: ClassVar[str] = "none"
    block: ClassVar[int] = 1
    acts: ClassVar[Literal["none", "input", "inside", "after"]] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()
    size_bias: ClassVar[bool] = False
    exact: ClassVar[bool] = True
    reuse: ClassVar[float] = 0.0
    refresh: ClassVar[int] = 0
    reads_question: ClassVar[bool] = False
    encoder_budget: ClassVar[float | None] = None

    def prunes(self, budget: float) -> bool:
        """Whether the tower's own output is not simply passed on: all of it is at a budget of 1, unless the encoder has its own."""
        return self.acts != "none" and (budget < 1 or self.encoder_budget is not None)

    def told(self, budget: float | str) -> float | str:
        """The budget as reports have it: all for a method that prunes nothing, whatever was asked for."""
        return 1.0 if self.acts == "none" else budget

    def merges(self, budget: float) -> bool:
        """Whether rows are left out inside the tower."""
        return self.acts == "inside" and self.prunes(budget)

    def chooses(self, budget: float) -> bool:
        """Whether `select` is asked."""
        return self.selects and (self.acts == "after" or self.merges(budget))

    def encoder_share(self, budget: float) -> float | None:
        """The share of the units that the encoder goes on computing; None for a method that has none to set."""
        return None

    def automatic(self) -> "Method":
        """The same method keeping as much as the content asks for, at most its budget.

        Raises:
            UsageError: it cannot.
        """
        raise UsageError(
            f"method {self.name} cannot choose a budget by itself", "give a share (-b 0.25), or take --method evoprune"
        )

    @property
    def selects(self) -> bool:
        """Whether `select` has a say."""
        return self.acts == "after"

    @property
    def chooser(self) -> "Method":
        """The method whose `select` it is."""
        return self

    @property
    def merger(self) -> "Method":
        """For a method that acts inside: the same without what only the choice after the encoder depends on."""
        return self

    @property
    def needs_after(self) -> frozenset[str]:
        """What `select` is given, of "attention" and "keys"."""
        return self.needs if self.acts == "after" else frozenset()

    def plan(self, grid: tuple[int, int, int], keep: int) -> tuple[int, int, int]:
        """The grid, (T, H, W) in units, to look at instead of `grid` so that `keep` units are left; no side is longer.

        Fewer T are fewer frames, spread over the same time; smaller H and W are frames of less resolution.
        """
        return grid

    def rows(self, tower: TowerShape, units: int, windows: int, keep: int) -> list[int]:
        """Rows of one block after each layer of the tower, when `keep` of its `units` are to be left (at least one)."""
        return [units] * tower.depth

    def allowance(self, units: int, due: int) -> int:
        """How many rows may be left in a block of `units`, of which `due` tokens would be the block's even share."""
        return due

    def scope(self, tower: TowerShape, layer: int) -> Literal["window", "block"]:
        """Inside what rows are merged in a layer; only in blocks where a block is more than a grid."""
        return "window" if tower.scope(layer) == "window" and self.block == 1 else "block"

    def match(self, candidates: Candidates, remove: torch.Tensor) -> torch.Tensor:
        """Where each row of each group goes: int64 `[B, n]`, itself if it stays.

        `remove` (int64 `[B]`) rows of each group should go, at least one where any should and never more; it may be 0, and a
        group may be empty. The encoder calls again for the rest. On a GPU it must not look at values: no `item`, `nonzero` or masks
        as indices.
        """
        raise TypeError(f"{self.name} does not merge")

    def rounds(self, rows: int, left: int) -> int:
        """At most how many calls of `match` it takes from `rows` rows in a group to `left`, whatever they are."""
        return rows - left

    def narrows_after(self, tower: TowerShape, budget: float) -> int | None:
        """After how many of the tower's layers, at least one, `narrow` says which rows go on; None for never.

        All of the video goes through the layers after it together. Who narrows is given nothing but the rows after the encoder.
        """
        return None

    def narrow(self, tokens: Tokens, keep: int) -> Selection | None:
        """Which units are rows from then on, and which of them stands for each of the others; None for those that are.

        Args:
            tokens: rows as the next layer takes them in, `[E, 4 hidden]`.
            keep: K, of the language model.
        """
        raise TypeError(f"{self.name} does not narrow")

    def select(self, tokens: Tokens, keep: int) -> torch.Tensor | Selection:
        """Which units the language model reads: int64 `[keep]`, ascending; or with means of several."""
        raise TypeError(f"{self.name} does not select")

    @classmethod
    def from_args(cls, args: dict[str, str]) -> "Method":
        """Makes the method from texts, as given on a command line.

        Raises:
            UsageError: a name the method does not have, or a value that is not of its type.
        """
        known = {f.name: f for f in fields(cls)}
        values = {}
        for name, text in args.items():
            if name == "encoder_budget" and name not in known:
                raise UsageError(
                    f"method {cls.name} has no encoder budget",
                    "leave it out, or take --method evoprune; in a list of methods evoprune:encoder_budget=0.25",
                )
            if name not in known:
                raise UsageError(f"method {cls.name} has no argument {name!r}", _settings(cls))
            values[name] = _parse(cls, known[name], text)
        try:
            return cls(**values)
        except ValueError as error:
            raise UsageError(f"method {cls.name}: {error}", _settings(cls)) from None


def _settings(method: type[Method]) -> str:
    return "its arguments and defaults: " + (", ".join(f"{f.name}={f.default}" for f in fields(method)) or "none")


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
