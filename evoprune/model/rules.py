"""Rules for JSON and its values in the settings files of models. A field of a dataclass has its rule in its annotation:

    Layers = Annotated[int, whole(1, 1000)]

`pick` makes such a dataclass of the entries of a file. A model's folder is no more trusted than a video: every value that is
used has a rule, so that a bad one is named here, and does not become a crash or an endless loop later.
"""

import json
import math
import reprlib
import stat
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from evoprune.errors import LFS, LFS_HINT, ModelError

LEVELS = 100  # of lists and objects inside one another; Python itself fails at about a thousand
MAX_BYTES = 2**26  # of a settings file

T = TypeVar("T")


@dataclass(frozen=True)
class Rule:
    """What a value must be."""

    what: str  # in words, as after "is not"
    holds: Callable[[Any], bool]

    def check(self, value: Any, name: str) -> Any:
        """The value, lists as tuples. Raises ValueError, with `name`, if the rule does not hold."""
        if not self.holds(value):
            raise ValueError(f"{name} is {reprlib.repr(value)}, not {self.what}")
        return tuple(value) if isinstance(value, list) else value


def whole(low: int, high: int) -> Rule:
    """A whole number from `low` to `high`."""
    return Rule(f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high)


def number(low: float, high: float) -> Rule:
    """A number from `low` to `high`, whole or not."""
    return Rule(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)


def list_of(rule: Rule, length: int | None = None) -> Rule:
    """A list of values under another rule."""
    return Rule(
        f"a list{f' of {length}' if length else ''}, each {rule.what}",
        lambda v: isinstance(v, list | tuple) and len(v) == (length or len(v)) and all(map(rule.holds, v)),
    )


def either(one: Rule, other: Rule) -> Rule:
    """A value under one of two rules."""
    return Rule(f"{one.what}, or {other.what}", lambda v: one.holds(v) or other.holds(v))


TEXT = Rule("a text", lambda v: isinstance(v, str))
YES_OR_NO = Rule("true or false", lambda v: isinstance(v, bool))
OBJECT = Rule("an object", lambda v: isinstance(v, dict))


def section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """An object inside another one; an empty one where it is missing or null. Raises ValueError: it is no object."""
    value = content.get(name)
    return {} if value is None else OBJECT.check(value, name)


def checked(cls: type, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The entries of `content` that are fields of a dataclass with rules. Null counts as missing. Errors name `where`.NAME.

    Raises ValueError: a value is not what its rule says.
    """
    return {
        name: rule.check(content[name], f"{where}.{name}" if where else name)
        for name, rule in _rules(cls).items()
        if content.get(name) is not None
    }


def pick(cls: type[T], content: Mapping[str, Any], where: str) -> T:
    """A dataclass of the entries of `content` with the names of its fields.

    Raises ValueError: an entry is missing that has no default, or is not what its rule says.
    """
    found = checked(cls, content, where)
    for field in fields(cls):
        if field.name not in found and field.default is MISSING:
            raise ValueError(f"{where} has no {field.name}")
    return cls(**found)


@cache
def _rules(cls: type) -> dict[str, Rule]:
    """The rules of a dataclass, by the names of its fields."""
    hints = get_type_hints(cls, include_extras=True)
    found = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
    return {name: rule for name, rule in found.items() if isinstance(rule, Rule)}


def loads(text: str) -> Any:
    """The value of a JSON text.

    Raises ValueError: no JSON; NaN, an infinite number or one that is too large; or more than `LEVELS` levels.
    """
    deep = ValueError(f"it is nested deeper than {LEVELS} levels")
    try:
        value = json.loads(text, parse_constant=_refuse, parse_float=_real)
    except RecursionError:
        raise deep from None
    level = [[value]]
    for _ in range(LEVELS + 1):
        inside = chain.from_iterable(each.values() if isinstance(each, dict) else each for each in level)
        level = [each for each in inside if isinstance(each, dict | list)]
        if not level:
            return value
    raise deep


def check_fetched(path: Path) -> None:
    """Raises ModelError: git-lfs has left a pointer in the place of a file."""
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                raise ModelError(f"{path} is a git-lfs pointer", LFS_HINT)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a settings file.

    Raises ValueError: what `loads` raises; or no object, no regular file, or more than `MAX_BYTES`. OSError: it cannot be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe, perhaps, which nobody ever writes to
        raise ValueError("it is no regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it has more than {MAX_BYTES // 2**20} MiB")
    value = loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def _refuse(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _real(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise ValueError(f"the number {text[:20]} is too large")
    return value
