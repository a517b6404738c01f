"""The settings of a method: their ranges, from texts as on a command line, and as reports show them."""

import math
from dataclasses import Field, fields
from types import NoneType
from typing import Annotated, Any, get_args

from evoprune.errors import UsageError

# Types of settings: the number's, and its range.
Share = Annotated[float, "[0, 1]"]
Part = Annotated[float, "(0, 1)"]
Cosine = Annotated[float, "[-1, 1]"]
Count = Annotated[int, "[1, inf)"]


def check_settings(method: object) -> None:
    """Checks the fields of a method whose types have a range, such as `Share`; otherwise as `check_ranges`."""
    ranges = {f.name: f.type.__metadata__[0] for f in fields(method) if hasattr(f.type, "__metadata__")}
    check_ranges(method, **ranges)


def check_ranges(method: object, **ranges: str) -> None:
    """Checks numbers of a method.

    Args:
        method: the object whose attributes they are.
        ranges: for each name an interval such as "[0, 1]" or "(0, inf)"; a round bracket excludes the end.

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
    above = f"{'above' if interval[0] == '(' else 'at least'} {low:g}"
    if high == math.inf:
        return above
    closed = interval[0] == "[" and interval[-1] == "]"
    return (
        f"from {low:g} to {high:g}"
        if closed
        else f"{above} and {'below' if interval[-1] == ')' else 'at most'} {high:g}"
    )


def setting_fields(method: type) -> list[Field]:
    """The fields that users set: all except those that belong to a model."""
    return [f for f in fields(method) if not f.metadata]


def reported(method: object) -> dict[str, Any]:
    """The fields by name: an infinite number as a text, and a field with a `report` in its metadata as that makes it."""
    return {f.name: f.metadata.get("report", _json_number)(getattr(method, f.name)) for f in fields(method)}


def _json_number(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def from_args(kind: type, args: dict[str, Any]) -> Any:
    """A method of class `kind` with settings as texts, as on a command line; other values count as their texts.

    Raises UsageError: the method has no such setting, or a value has the wrong type or is out of range.
    """
    known = {f.name: f for f in setting_fields(kind)}
    values = {}
    for name, text in args.items():
        if name not in known:
            raise UsageError(f"method {kind.name} has no argument {name!r}", settings_hint(kind))
        values[name] = _parsed(kind, known[name], str(text))
    try:
        made = kind(**values)
    except ValueError as error:
        raise UsageError(f"method {kind.name}: {error}", settings_hint(kind)) from None
    if wrong := [name for name, value in values.items() if value != value]:  # NaN is no number to any method
        raise UsageError(f"method {kind.name}: {wrong[0]}=nan is not a number", settings_hint(kind))
    return made


def settings_hint(kind: type, name: str | None = None) -> str:
    """A hint that lists the settings, or that shows how the one called `name` is given."""
    known = {f.name: f"{f.name}={f.default}" for f in setting_fields(kind)}
    if name in known:
        return f"a setting has a value: {kind.name}:{known[name]}"
    return f"its arguments and defaults: {', '.join(known.values()) or 'none'}"


def _parsed(method: type, setting: Field, text: str) -> Any:
    """The value of a setting given as text, in the type of its default."""
    kind = type(setting.default)
    if setting.default is None:
        if text == "None":
            return None
        kind = next(kind for kind in get_args(setting.type) if kind is not NoneType)
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return kind(text)
    except (KeyError, ValueError):
        problem = f"method {method.name}: {setting.name}={text!r} is not {kind.__name__}"
        raise UsageError(problem, settings_hint(method)) from None
