"""How many visual tokens a budget keeps, and how they are spread over the frame pairs. No tensors, no torch."""

import math
from collections.abc import Sequence
from fractions import Fraction
from math import prod

from evoprune.errors import UsageError
from evoprune.util import did_you_mean


class Preset(float):
    """A budget with a name: the share of a video's tokens, and `still`, that of one frame pair, which no other repeats.

    It equals no number, because the two differ in what they keep of pictures.
    """

    def __new__(cls, name: str, video: float, still: float):
        made = super().__new__(cls, video)
        made.name, made.still = name, still
        return made

    def __reduce__(self):
        return Preset, (self.name, float(self), self.still)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Preset) and self.name == other.name

    def __ne__(self, other: object) -> bool:  # a float has one of its own
        return not self == other

    def __hash__(self) -> int:
        return hash(self.name)

    def __str__(self) -> str:
        return self.name

    def __format__(self, spec: str) -> str:
        return self.name


PRESETS = {
    "full": 1.0,
    "high": Preset("high", 0.4, 0.7),
    "balanced": Preset("balanced", 0.25, 0.5),
    "fast": Preset("fast", 0.1, 0.3),
}
# With the accuracy that they keep in the worst of the demo's worlds and weights, and the speed of the first token against Hugging
# Face at 3B dimensions, fp32 (results/frontier.md).
IN_WORDS = "high (0.4; accuracy 97.9%, 2.0x as fast), balanced (0.25; 97.1%, 2.8x), fast (0.1; 94.9%, 4.4x)"
DEFAULT = "balanced"
# Under AUTO the content decides how many tokens are kept (`Method.automatic`), between these shares.
AUTO, AUTO_LEAST, AUTO_MOST = "auto", 0.05, 0.5
AUTO_INFLECTION = "auto:inflection"  # from the curve of a method's scores (methods/selecting.py)
AUTOS = (AUTO, AUTO_INFLECTION)


def parse_budget(text: str | float, names: Sequence[str] = ()) -> float | str:
    """The share to keep, from a preset's name, a number in (0, 1] or a percentage; other `names` unchanged. Raises UsageError."""
    if text in names or isinstance(text, Preset):  # which another object parsed before
        return text
    if isinstance(text, str) and text in PRESETS:
        return PRESETS[text]
    percent = isinstance(text, str) and text.rstrip().endswith("%")
    value = _number(text.rstrip()[:-1]) / 100 if percent else _number(text)
    if 0 < value <= 1:
        return value
    raise _refused(text, names)


def parse_budget_or_name(text: str | float) -> float | str:
    """As `parse_budget`, but returns "auto" and "auto:inflection" unchanged."""
    return parse_budget(text, AUTOS)


def _number(text: str | float) -> float:
    try:
        return float(text)
    except (TypeError, ValueError):
        return math.nan


def _refused(text: str | float, names: Sequence[str]) -> UsageError:
    if text in AUTOS and text not in names:
        hint = f"give a share of tokens such as 0.25; {text} works with VideoQA, and with commands that ask or evaluate"
        return UsageError(f"budget {text!r} does not work here", hint)
    percent, also = _number(text), f", or {', '.join(names[:-1])} or {names[-1]}" if names else ""
    meant = f"did you mean {percent / 100:g} (or {percent:g}%)? " if 1 < percent <= 100 else ""
    hint = f"give a number above 0 and up to 1 (0.25 or 25% for a quarter), or one of {', '.join(PRESETS)}{also}"
    meant = meant or did_you_mean(str(text), (*PRESETS, *names))
    return UsageError(f"budget {text!r} is not a share of tokens to keep", meant + hint)


def plain(budget: float | str) -> float | str:
    """A budget as records hold it: a number, or a name."""
    return budget.name if isinstance(budget, Preset) else budget


def share_for(budget: float, grid: tuple[int, int, int]) -> float:
    """The share of one input: `grid` is (T, H, W) in units."""
    return budget.still if isinstance(budget, Preset) and grid[0] == 1 else float(budget)


def keep_tokens(budget: float, grid: tuple[int, int, int]) -> int:
    """K of one input: `grid` is (T, H, W) in units."""
    return keep_count(share_for(budget, grid), prod(grid))


def share_of(budget: float, grids: Sequence[tuple[int, int, int]]) -> float:
    """The share of all units of several inputs that `keep_tokens` keeps, for methods that know only one share."""
    if not isinstance(budget, Preset):
        return budget
    return sum(keep_tokens(budget, grid) for grid in grids) / sum(map(prod, grids))


def largest_share(budget: float) -> float:
    """The largest share of any input that a budget keeps."""
    return max(budget, budget.still) if isinstance(budget, Preset) else budget


def keep_count(budget: float, units: int) -> int:
    """K = max(1, floor(budget * units + 0.5)), at most `units`."""
    return min(units, max(1, math.floor(budget * units + 0.5)))


def spread(keep: int, pairs: int) -> list[int]:
    """Divides `keep` tokens among equal frame pairs; each gets the mean, rounded down, or up at even distances over the clip."""
    return [(i + 1) * keep // pairs - i * keep // pairs for i in range(pairs)]


def apportion(total: int, weights: Sequence[float], most: Sequence[int]) -> list[int]:
    """Divides `total` in proportion to `weights` (at least 0), by largest remainder, with a limit (`most`) for each share.

    Excess above a limit goes to the others, in proportion again; if only weights of zero are left, evenly. Ties go by index.
    The shares sum to `total`, or to the sum of `most` if that is less.
    """
    counts, quotas = [0] * len(most), {}
    open_ = [i for i, limit in enumerate(most) if limit > 0]
    while open_:
        left, weight = total - sum(counts), sum(Fraction(weights[i]) for i in open_)
        quotas = {i: left * (Fraction(weights[i]) / weight if weight else Fraction(1, len(open_))) for i in open_}
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
