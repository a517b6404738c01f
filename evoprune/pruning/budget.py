"""How many visual tokens a budget keeps, and how they are spread over the frame pairs. No tensors, no torch."""

import math
from collections.abc import Sequence
from fractions import Fraction

from evoprune.errors import UsageError

PRESETS = {"full": 1.0, "high": 0.5, "balanced": 0.25, "fast": 0.1}
DEFAULT = "balanced"
# Under AUTO the content decides how many tokens are kept (`Method.automatic`), between these shares.
AUTO, AUTO_LEAST, AUTO_MOST = "auto", 0.05, 0.5


def parse_budget(text: str | float) -> float:
    """The share of visual tokens to keep, from the name of a preset or a number in (0, 1].

    Raises:
        UsageError: the text is neither.
    """
    if isinstance(text, str) and text in PRESETS:
        return PRESETS[text]
    try:
        value = float(text)
    except (TypeError, ValueError):
        value = math.nan
    if not 0 < value <= 1:
        raise UsageError(
            f"budget {text!r} is not a share of tokens to keep",
            f"give a number above 0 and up to 1 (0.25 for a quarter), or one of {', '.join(PRESETS)}"
            + (f"; {AUTO} works with VideoQA, and with commands that ask" if text == AUTO else ""),
        )
    return value


def parse_budget_or_auto(text: str | float) -> float | str:
    """As `parse_budget`, but returns "auto" unchanged."""
    if text == AUTO:
        return AUTO
    try:
        return parse_budget(text)
    except UsageError as problem:
        raise UsageError(problem.message, f"{problem.hint}, or {AUTO}") from None


def keep_count(budget: float, units: int) -> int:
    """K = max(1, floor(budget * units + 0.5)), at most `units`."""
    return min(units, max(1, math.floor(budget * units + 0.5)))


def spread(keep: int, pairs: int) -> list[int]:
    """Divides `keep` tokens among equal frame pairs; each gets the mean, rounded down or up. Sums to `keep`.

    This is the method of largest remainder. All remainders are equal; they are resolved at even distances and not in favour of the
    first frame pairs. So even with fewer tokens than frame pairs the whole clip is covered.
    """
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


def apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `weights`, by largest remainder, with a limit for each share.

    Excess above a limit goes to the others, in proportion again; if only weights of zero are left, evenly. Ties go by index.

    Args:
        total: the number to divide.
        weights: at least 0 each.
        most: the limit of each share.

    Returns:
        The shares. They sum to `total`, or to the sum of `most` if that is less.
    """
    counts, quotas = [0] * len(most), {}
    open_ = [i for i, limit in enumerate(most) if limit > 0]
    while open_:
        left, whole = total - sum(counts), sum(Fraction(weights[i]) for i in open_)
        quotas = {i: left * (Fraction(weights[i]) / whole if whole else Fraction(1, len(open_))) for i in open_}
        full = [i for i in open_ if quotas[i] >= most[i]]
        if not full:
            break
        for i in full:
            counts[i] = most[i]
        open_ = [i for i in open_ if i not in full]
    for i in open_:
        counts[i] = math.floor(quotas[i])
    missing = total - sum(counts)
    for i in sorted(open_, key=lambda i: (counts[i] - quotas[i], i))[:missing]:
        counts[i] += 1
    return counts
