"""Budgets, which specify the fraction of visual tokens to keep. This module does not import torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Literal, get_args

from evoprune.errors import UsageError
from evoprune.methods.plans import Grid
from evoprune.util import did_you_mean, listed, shorten

PresetName = Literal["full", "high", "balanced", "fast"]
# "auto:inflection" derives the number of tokens from the curve of a method's scores (methods/selecting.py).
AutoName = Literal["auto", "auto:inflection"]


@dataclass(frozen=True)
class Budget:
    """The fraction of an input's visual tokens to keep, in (0, 1]. Use `parse` to create a budget."""

    # The type of user-supplied budgets: a number in (0, 1], the same number as a string ("0.25"), a percentage ("25%"), or a name
    # in `PRESETS`. Names in `AUTOS` are also valid if the caller allows automatic budgets.
    Given = float | str

    PRESETS: ClassVar[dict[PresetName, "Budget"]]
    AUTOS: ClassVar[dict[AutoName, "Budget"]]  # the number of tokens depends on the content (`Method.automatic`)
    FULL: ClassVar["Budget"]  # prunes nothing
    DEFAULT: ClassVar[Literal["balanced"]] = "balanced"

    video: float
    still: float  # the fraction for images and other single-frame-pair inputs, which have no temporal redundancy
    name: str = ""  # the name of a two-fraction preset or of a budget in `AUTOS`; empty if the user passed a number

    @classmethod
    def parse(cls, given: float | str, auto: bool = False) -> "Budget":
        """Parse a number in (0, 1], a percentage, or a name.

        Args:
            auto: Whether to also accept the names in `AUTOS`.

        Raises:
            UsageError: If `given` is anything else.
        """
        known = dict(cls.PRESETS)
        if auto:
            known |= cls.AUTOS
        if isinstance(given, str) and given in known:
            return known[given]
        percent = isinstance(given, str) and given.rstrip().endswith("%")
        share = _number(given.rstrip()[:-1]) / 100 if percent else _number(given)
        if not 0 < share <= 1:
            raise _refused(given, known)
        return cls(share, share)

    @classmethod
    def of(cls, recorded: float | str) -> "Budget":
        """Return the budget that is stored as `recorded` in options that have been checked (see `recorded`)."""
        if isinstance(recorded, str):
            return (cls.PRESETS | cls.AUTOS)[recorded]
        return cls(recorded, recorded)

    @property
    def recorded(self) -> float | str:
        """The budget as stored in options, records, and results: its name if it has one, otherwise a number."""
        return self.name or self.video

    @property
    def largest(self) -> float:
        """The largest fraction of its tokens that any input can keep with this budget."""
        return max(self.video, self.still)

    def share(self, grid: Grid) -> float:
        """Return the fraction of tokens to keep for an input with this `grid`, which is (T, H, W) in units."""
        return self.still if grid[0] == 1 else self.video

    def keep(self, grid: Grid) -> int:
        """Return K, the number of tokens to keep for an input with this `grid`, which is (T, H, W) in units."""
        return self.count(self.share(grid), prod(grid))

    @staticmethod
    def count(share: float, units: int) -> int:
        """Return K, the number of tokens to keep: max(1, floor(share * units + 0.5)), but at most `units`."""
        return min(units, max(1, math.floor(share * units + 0.5)))

    def share_of_all(self, grids: Sequence[Grid]) -> float:
        """Return the fraction of tokens to keep over all inputs, for methods that cannot use a different fraction per input."""
        if self.still == self.video:
            return self.video
        return sum(map(self.keep, grids)) / sum(map(prod, grids))


Budget.FULL = Budget(1.0, 1.0)
Budget.PRESETS = {
    "full": Budget.FULL,
    "high": Budget(0.4, 0.7, "high"),
    "balanced": Budget(0.25, 0.5, "balanced"),
    "fast": Budget(0.1, 0.3, "fast"),
}
AUTO, AUTO_INFLECTION = get_args(AutoName)
# The lowest and highest fraction of tokens that an automatic budget can keep.
AUTO_LEAST = 0.05
AUTO_MOST = 0.5
Budget.AUTOS = {name: Budget(AUTO_MOST, AUTO_MOST, name) for name in (AUTO, AUTO_INFLECTION)}


def _number(value: float | str) -> float:
    """Convert `value` to a float. Returns NaN if it is not a number."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _refused(given: float | str, known: dict[str, Budget]) -> UsageError:
    """Return the error for an invalid budget. `known` contains the named budgets that would be accepted."""
    if isinstance(given, str) and given in Budget.AUTOS:
        hint = f"give a share of tokens such as 0.25; {given} works only with VideoQA and with commands that ask or evaluate"
        return UsageError(f"budget {given!r} does not work here", hint)
    percent = _number(given)
    likely = did_you_mean(str(given), known)
    if 1 < percent <= 100:
        likely = f"did you mean {percent / 100:g} (or {percent:g}%)? "
    names = listed([name for name in known if name != AUTO_INFLECTION], "or")  # works only with a few methods
    hint = f"{likely}give a share above 0 and up to 1 (0.25 or 25% for a quarter), or a name: {names}"
    text = shorten(given, 80) if isinstance(given, str) else given
    return UsageError(f"budget {text!r} is not a share of tokens to keep", hint)
