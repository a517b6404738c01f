"""The ranges of the settings of a method."""

import math
from dataclasses import fields
from typing import Annotated

# Types of settings: the number's, and its range.
Share = Annotated[float, "[0, 1]"]
Part = Annotated[float, "(0, 1)"]
Cosine = Annotated[float, "[-1, 1]"]
Count = Annotated[int, "[1, inf)"]


def check_settings(method: object) -> None:
    """Checks the fields of a method whose types have a range, such as `Share`; otherwise as `check_ranges`."""
    check_ranges(method, **{f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")})


def check_ranges(method: object, **ranges: str) -> None:
    """Checks attributes of a method, by an interval each such as "[0, 1]" or "(0, inf)"; a round bracket excludes the end.

    Raises ValueError: it names each number that is outside, NaN included, and its range.
    """
    wrong = []
    for name, interval in ranges.items():
        low, high = map(float, interval[1:-1].split(","))
        value = getattr(method, name)
        outside = not low <= value <= high  # so is what is no number
        at_open_end = (value == low and interval[0] == "(") or (value == high and interval[-1] == ")")
        if outside or at_open_end:
            wanted = _worded(low, high, interval)
            if not math.isfinite(value) and high == math.inf:
                wanted = "a finite number"
            wrong.append(f"{name}={value:g} is not {wanted}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """Return an interval, with its ends as numbers, in words."""
    above = "above" if interval[0] == "(" else "at least"
    below = "below" if interval[-1] == ")" else "at most"
    if high == math.inf:
        return f"{above} {low:g}"
    if interval[0] == "[" and interval[-1] == "]":
        return f"from {low:g} to {high:g}"
    return f"{above} {low:g} and {below} {high:g}"
