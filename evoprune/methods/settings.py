"""The settings of a method: their ranges, and how they are made of texts, as on a command line."""

import math
from dataclasses import Field, fields
from typing import Annotated, Any, get_args

from evoprune.errors import UsageError

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
        value, open_low, open_high = getattr(method, name), interval[0] == "(", interval[-1] == ")"
        if not ((low < value if open_low else low <= value) and (value < high if open_high else value <= high)):
            finite = math.isfinite(value) or high < math.inf
            wrong.append(f"{name}={value:g} is not {_worded(low, high, interval) if finite else 'a finite number'}")
    if wrong:
        raise ValueError("; ".join(wrong))


def _worded(low: float, high: float, interval: str) -> str:
    """An interval, with its ends as numbers, in words."""
    above, below = "above" if interval[0] == "(" else "at least", "below" if interval[-1] == ")" else "at most"
    if high == math.inf:
        return f"{above} {low:g}"
    ends = above == "at least" and below == "at most"
    return f"from {low:g} to {high:g}" if ends else f"{above} {low:g} and {below} {high:g}"


def from_args(method: type, args: dict[str, Any]) -> Any:
    """A method with settings as texts; other values count as their texts. Raises UsageError: no such setting, or a wrong value."""
    known, values = {f.name: f for f in fields(method)}, {}
    for name, text in args.items():
        if name not in known:
            raise UsageError(f"method {method.name} has no argument {name!r}", settings_hint(method))
        values[name] = _parsed(method, known[name], str(text))
    try:
        instance = method(**values)
        if wrong := [name for name, value in values.items() if value != value]:  # NaN is no number to any method
            raise ValueError(f"{wrong[0]}=nan is not a number")
    except ValueError as error:
        raise UsageError(f"method {method.name}: {error}", settings_hint(method)) from None
    return instance


def settings_hint(method: type, name: str | None = None) -> str:
    """A hint that lists the settings, or that shows how the one called `name` is given."""
    known = {f.name: f"{f.name}={f.default}" for f in fields(method)}
    if name in known:
        return f"a setting has a value: {method.name}:{known[name]}"
    return f"its arguments and defaults: {', '.join(known.values()) or 'none'}"


def _parsed(method: type, setting: Field, text: str) -> Any:
    """The value of a setting given as text, in the type of its default; of one without, in its first type.

    A type with a function `read` is read from the file that the text names.
    """
    if setting.default is None and text == "None":
        return None
    number = type(setting.default) if setting.default is not None else get_args(setting.type)[0]
    if hasattr(number, "read"):
        return number.read(text)
    try:
        return {"true": True, "1": True, "false": False, "0": False}[text.lower()] if number is bool else number(text)
    except (KeyError, ValueError):
        problem = f"method {method.name}: {setting.name}={text!r} is not {number.__name__}"
        raise UsageError(problem, settings_hint(method)) from None
