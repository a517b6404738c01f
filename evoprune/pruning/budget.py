"""How many visual tokens a budget buys, and how they are spread over the grids. No tensors, no torch."""

import math
from dataclasses import dataclass

from evoprune.errors import UsageError

PRESETS = {"full": 1.0, "high": 0.5, "balanced": 0.25, "fast": 0.1}
DEFAULT = "high"


def parse_budget(text: str | float) -> float:
    """A preset's name or a number in (0, 1], as the share of visual tokens that is kept.

    Raises:
        UsageError: anything else.
    """
    if isinstance(text, str) and text in PRESETS:
        return PRESETS[text]
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(
            f"budget {text!r} is not a share of tokens to keep",
            f"give a number above 0 and up to 1 (0.25 for a quarter), or one of {', '.join(PRESETS)}",
        )
    return value


def keep_count(budget: float, units: int) -> int:
    """K = max(1, floor(budget * units + 0.5)), at most `units`."""
    return min(units, max(1, math.floor(budget * units + 0.5)))


def spread(keep: int, grids: int) -> list[int]:
    """Shares `keep` tokens out over equal grids: each gets the rounded-down or rounded-up mean, evenly through time.

    This is largest remainder with its ties (all remainders are equal) given at even distances instead of to the first grids,
    so that below one token a grid the whole clip is still covered. Sums to `keep`.
    """
    return [(i + 1) * keep // grids - i * keep // grids for i in range(grids)]


@dataclass
class Spending:
    """Hands rows out to the blocks of a clip, one after another, each of which has an allowance of its own.

    A block that repeats what was there before has fewer rows than it may keep. If `adaptive`, what it leaves is saved for later
    blocks that have more; so none gets less than its own allowance, and up to any block no more is spent than was allowed so far.
    """

    adaptive: bool
    saved: int = 0

    def left(self, rows: int, allowance: int) -> int:
        """How many of its rows the next block keeps."""
        most = allowance + self.saved
        left = min(rows, most)
        self.saved = most - left if self.adaptive else 0
        return left
