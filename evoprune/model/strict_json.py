"""JSON that comes from elsewhere: numbers that JSON knows, levels that every reader can follow, files of bounded size."""

import json
import math
import stat
from pathlib import Path
from typing import Any

LEVELS = 100  # of lists and objects inside one another; Python itself fails at about a thousand
MAX_BYTES = 2**26  # of a settings file


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: no JSON; NaN, an infinite number or one that is too large; or more than `LEVELS` levels.
    """
    deep = ValueError(f"it is nested deeper than {LEVELS} levels")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_real)
    except RecursionError:
        raise deep from None
    level = [value]
    for _ in range(LEVELS):
        level = [inner for each in level for inner in _inside(each)]
        if not level:
            return value
    raise deep


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a settings file.

    Raises:
        ValueError: what `loads` raises; or no object, no regular file, or more than `MAX_BYTES`. OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe, perhaps, which nobody ever writes to
        raise ValueError("it is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
    value = loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _inside(value: Any) -> list[Any]:
    """What a list or an object holds."""
    found = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [each for each in found if isinstance(each, dict | list)]


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
