"""The ranges of a method's numbers, and how an error names the ones that are outside."""

import math


def check_ranges(method: object, **ranges: str) -> None:
    """Checks numbers of a method.

    Args:
        method: the object whose attributes they are.
        ranges: for each name an interval such as "[0, 1]" or "(0, inf)"; a round bracket excludes the end.

    Raises:
        ValueError: it names each number that is outside, NaN included, and its range.
    """
    wrong = []
    for name, interval in ranges.items():
        low, high = map(float, interval[1:-1].split(","))
        value, open_low, open_high = getattr(method, name), interval[0] == "(", interval[-1] == ")"
        if not ((low < value if open_low else low <= value) and (value < high if open_high else value <= high)):
            finite = math.isfinite(value) or high < math.inf
            wrong.append(f"{name}={value:g} is not {_worded(low, high, interval) if finite else 'a finite number'}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """An interval, with its ends as numbers, in words."""
    above = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"
    if high == math.inf:
        return above
    closed = interval[0] == "[" and interval[-1] == "]"
    return (
        f"from {low:g} to {high:g}"
        if closed
        else f"{above} and {'below' if interval[-1] == ')' else 'at most'} {high:g}"
    )
