"""How many visual tokens a budget buys, and how they are spread over the grids. No tensors, no torch."""

import math

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
