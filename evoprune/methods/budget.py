"""Budgets: which share of the visual tokens is kept. No torch."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, get_args

from evoprune.errors import UsageError
from evoprune.methods.plans import Grid
from evoprune.util import did_you_mean

PresetName = Literal["full", "high", "balanced", "fast"]
AutoName = Literal[
    "auto", "auto:inflection"
]  # the second one: from the curve of a method's scores (methods/selecting.py)
# What users give; at run time also a percentage as a text, "10%".
GivenShare = float | PresetName
GivenBudget = float | Literal[PresetName, AutoName]


@dataclass(frozen=True)
class Budget:
    """Say which share of its visual tokens an input keeps, in (0, 1]. Made by `parse`."""

    video: float
    still: float  # of an input of one frame pair, which no other repeats
    name: str = ""  # of a preset with two shares, or of one of `AUTOS`; a number has none

    @classmethod
    def parse(cls, given: float | str, auto: bool = False) -> "Budget":
        """Return what a number in (0, 1], a percentage or a name stands for.

        `auto`: whether the names of `AUTOS` are allowed, too. Raises UsageError: something else.
        """
        known = dict(PRESETS)
        if auto:
            known |= AUTOS
        if isinstance(given, str) and given in known:
            return known[given]
        percent = isinstance(given, str) and given.rstrip().endswith("%")
        share = _number(given.rstrip()[:-1]) / 100 if percent else _number(given)
        if not 0 < share <= 1:
            raise _refused(given, known)
        return cls(share, share)

    @property
    def recorded(self) -> float | str:
        """Return what options, records and results hold: a name or a number."""
        return self.name or self.video

    @property
    def largest(self) -> float:
        """Return the largest share of any input."""
        return max(self.video, self.still)

    def share(self, grid: Grid) -> float:
        """Return the share of one input, whose `grid` is (T, H, W) in units."""
        return self.still if grid[0] == 1 else self.video

    def keep(self, grid: Grid) -> int:
        """Return K, the number of tokens that is kept of one input."""
        return keep_count(self.share(grid), prod(grid))

    def share_of_all(self, grids: Sequence[Grid]) -> float:
        """Return the share of all units of several inputs that is kept, for methods that know only one share."""
        if self.still == self.video:
            return self.video
        return sum(map(self.keep, grids)) / sum(map(prod, grids))


def keep_count(share: float, units: int) -> int:
    """Return K = max(1, floor(share * units + 0.5)), at most `units`."""
    return min(units, max(1, math.floor(share * units + 0.5)))


FULL = Budget(1.0, 1.0)
PRESETS: dict[PresetName, Budget] = {
    "full": FULL,
    "high": Budget(0.4, 0.7, "high"),
    "balanced": Budget(0.25, 0.5, "balanced"),
    "fast": Budget(0.1, 0.3, "fast"),
}
# With the accuracy that they keep in the worst of the demo's worlds and weights, and the speed of the first token against Hugging
# Face at 3B dimensions, fp32 (results/frontier.md).
IN_WORDS = "high (0.4; accuracy 98.2%, 2.0x as fast), balanced (0.25; 97.1%, 2.7x), fast (0.1; 95.8%, 4.4x)"
DEFAULT_BUDGET: Literal["balanced"] = "balanced"
# Under AUTO the content decides how many tokens are kept (`Method.automatic`), between these shares.
AUTO, AUTO_INFLECTION = get_args(AutoName)
AUTO_LEAST = 0.05
AUTO_MOST = 0.5
AUTOS = {name: Budget(AUTO_MOST, AUTO_MOST, name) for name in (AUTO, AUTO_INFLECTION)}


def _number(value: float | str) -> float:
    """Return it as a number; NaN where it is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def _refused(given: float | str, known: dict[str, Budget]) -> UsageError:
    """Return the error of a value that `parse` does not take, where the names in `known` are allowed."""
    if isinstance(given, str) and given in AUTOS:
        hint = (
            f"give a share of tokens such as 0.25; {given} works with VideoQA, and with commands that ask or evaluate"
        )
        return UsageError(f"budget {given!r} does not work here", hint)
    autos = [name for name in AUTOS if name in known]
    percent = _number(given)
    likely = did_you_mean(str(given), known)
    if 1 < percent <= 100:
        likely = f"did you mean {percent / 100:g} (or {percent:g}%)? "
    names = ", ".join(PRESETS)
    if autos:
        names += f", or {' or '.join(autos)}"
    hint = f"{likely}give a number above 0 and up to 1 (0.25 or 25% for a quarter), or one of {names}"
    return UsageError(f"budget {given!r} is not a share of tokens to keep", hint)
