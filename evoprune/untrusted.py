"""Reads untrusted JSON files: parses them strictly and checks each value against a rule. See also `worker_environment`.

Model folders are trusted no more than videos. Each value used by evoprune has a rule, so an invalid value is reported as soon as it
is read and can't cause a crash or an infinite loop later. The rules are annotations on dataclass fields, and `pick` creates such a
dataclass from a file's entries.
"""

import json
import math
import os
import reprlib
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any, Self, TypeVar, get_type_hints

from evoprune.errors import LFS, LFS_HINT, ModelError
from evoprune.util import shorten

MAX_LEVELS = 100  # maximum nesting depth of lists and objects; Python itself fails at about 1,000
MAX_BYTES = 2**26  # maximum size of a settings file, in bytes
# Environment variables for processes that handle untrusted files: where the system's libraries are, the encoding of paths, the
# time zone, temporary folders, and settings of libraries for computing, memory, and video. Names ending in `_` are prefixes.
PASSED_ON = (
    "PATH", "LD_", "DYLD_", "SYSTEMROOT", "SYSTEMDRIVE", "WINDIR", "LANG", "LANGUAGE", "LC_", "TZ", "TZDIR", "TMPDIR",
    "TEMP", "TMP", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "BLIS_", "NPY_", "MALLOC_", "GLIBC_TUNABLES", "DECORD_",
)  # fmt: skip
MAX_VALUES = 1000  # maximum number of values in a list, as many as the layers of a model

T = TypeVar("T")


def worker_environment() -> dict[str, str]:
    """Return the environment for a process that handles untrusted files: this process's variables that are in `PASSED_ON`.

    All other variables are left out, because many contain passwords, keys, and tokens that the process has no use for.
    """
    prefixes = tuple(name for name in PASSED_ON if name.endswith("_"))
    return {name: value for name, value in os.environ.items() if name in PASSED_ON or name.startswith(prefixes)}


@dataclass(frozen=True)
class Rule:
    """A check for a value from an untrusted file, with a description of the allowed values for error messages."""

    what: str  # description of the allowed values, phrased to follow "is not"
    holds: Callable[[Any], bool]

    def check(self, value: Any, name: str) -> Any:
        """Check a value against the rule and return it. Lists are returned as tuples.

        Args:
            value: The value.
            name: The value's name for the error message.

        Raises:
            ValueError: If the value breaks the rule.
        """
        if not self.holds(value):
            raise ValueError(f"{name} is {shorten(reprlib.repr(value), 120)}, not {self.what}")
        return tuple(value) if isinstance(value, list) else value

    def __or__(self, other: Self) -> Self:
        """Return a rule that accepts any value accepted by either rule."""
        return type(self)(f"{self.what}, or {other.what}", lambda v: self.holds(v) or other.holds(v))

    @classmethod
    def whole(cls, low: int, high: int) -> Self:
        """Return a rule that accepts integers from `low` to `high`."""
        return cls(f"a whole number from {low:,} to {high:,}", lambda v: type(v) is int and low <= v <= high)

    @classmethod
    def number(cls, low: float, high: float) -> Self:
        """Return a rule that accepts integers and floats from `low` to `high`."""
        return cls(f"a number from {low:g} to {high:g}", lambda v: type(v) in (int, float) and low <= v <= high)

    @classmethod
    def list_of(cls, rule: Self, length: int | None = None) -> Self:
        """Return a rule that accepts lists in which each element satisfies `rule`.

        Args:
            length: The required length, or None to accept at most `MAX_VALUES` elements.
        """
        what = f"a list of {length} values" if length else f"a list of at most {MAX_VALUES:,} values"

        def holds(value: Any) -> bool:
            if not isinstance(value, list | tuple):
                return False
            fits = len(value) == length if length else len(value) <= MAX_VALUES
            return fits and all(map(rule.holds, value))

        return cls(f"{what}, each {rule.what}", holds)

    @classmethod
    def set_of(cls, rule: Self, most: int) -> Self:
        """Return a rule that accepts lists of at most `most` different elements, each satisfying `rule`."""
        return cls(
            f"a list of at most {most} different values, each {rule.what}",
            lambda v: isinstance(v, list | tuple) and all(map(rule.holds, v)) and len(set(v)) <= most,
        )


TEXT = Rule("a string", lambda v: isinstance(v, str))
YES_OR_NO = Rule("true or false", lambda v: isinstance(v, bool))
OBJECT = Rule("an object", lambda v: isinstance(v, dict))


def section(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the JSON object stored under a name in another object, or an empty dict if it is missing or null.

    Raises:
        ValueError: If the value isn't an object.
    """
    value = content.get(name)
    if value is None:
        return {}
    return OBJECT.check(value, name)


def checked(cls: type, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check and return the entries of `content` that correspond to a dataclass's fields. Null values are skipped.

    Args:
        cls: A dataclass with rule-annotated fields.
        content: A JSON object from a settings file.
        where: The prefix for entry names in error messages.

    Raises:
        ValueError: If an entry violates its rule.
    """
    prefix = f"{where}." if where else ""
    return {
        name: rule.check(content[name], f"{prefix}{name}")
        for name, rule in rules_of(cls).items()
        if content.get(name) is not None
    }


def pick(cls: type[T], content: Mapping[str, Any], where: str) -> T:
    """Create a dataclass instance from the entries of `content` that correspond to its fields. For the arguments, see `checked`.

    Raises:
        ValueError: If an entry violates its rule, or if a required entry is missing.
    """
    entries = checked(cls, content, where)
    for field in fields(cls):
        if field.name not in entries and field.default is MISSING:
            raise ValueError(f"{where} has no {field.name}")
    return cls(**entries)


@cache
def rules_of(cls: type) -> dict[str, Rule]:
    """Return the rules in a dataclass's field annotations, by field name."""
    hints = get_type_hints(cls, include_extras=True)
    annotated = {name: getattr(hint, "__metadata__", (None,))[0] for name, hint in hints.items()}
    return {name: rule for name, rule in annotated.items() if isinstance(rule, Rule)}


def loads(text: str | bytes, once: bool = False, levels: int = MAX_LEVELS) -> Any:
    """Parse a JSON text strictly.

    Args:
        text: The JSON text.
        once: Whether to reject objects with duplicate names. If False, the last value is used, as in Python's own parser.
        levels: The maximum nesting depth of lists and objects.

    Raises:
        ValueError: If the text isn't valid JSON, is nested deeper than `levels`, or contains NaN, infinity, or a number that is
            too large.
    """

    def refuse(word: str) -> None:
        raise ValueError(f"{word} is not a valid JSON number")

    def finite(number: str) -> float:
        if math.isinf(value := float(number)):
            raise ValueError(f"the number {number[:20]} is too large")
        return value

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
            raise ValueError(f"the field {twice[:40]} appears twice")
        return value

    try:
        hook = unique if once else None
        value = json.loads(text, parse_constant=refuse, parse_float=finite, object_pairs_hook=hook)
    except RecursionError:
        raise _too_deep(levels) from None
    check_levels(value, levels)
    return value


def check_levels(value: Any, levels: int = MAX_LEVELS) -> None:
    """Raise ValueError if a parsed JSON value is nested more than `levels` levels deep."""
    level = [[value]]
    for _ in range(levels + 1):
        inside = chain.from_iterable(map(_values, level))
        level = [inner for inner in inside if isinstance(inner, dict | list)]
        if not level:
            return
    raise _too_deep(levels)


def _too_deep(levels: int) -> ValueError:
    return ValueError(f"it is nested more than {levels} levels deep")


def _values(outer: dict | list) -> Iterable[Any]:
    """Return the top-level values of an object or list."""
    if isinstance(outer, dict):
        return outer.values()
    return outer


def check_fetched(path: Path) -> None:
    """Check that a file is not a git-lfs pointer to a file that hasn't been downloaded.

    Raises:
        ModelError: If the file is a git-lfs pointer.
    """
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(LFS)) == LFS:
                raise ModelError(f"{path} is a git-lfs pointer", LFS_HINT)


def read_object(path: Path) -> dict[str, Any]:
    """Read a settings file and return the JSON object it contains.

    Raises:
        ValueError: If the path isn't a regular file, the file exceeds `MAX_BYTES`, or its contents aren't a JSON object accepted by
            `loads`.
        OSError: If the file can't be read.
    """
    if not stat.S_ISREG(path.stat().st_mode):  # for example, reading from a pipe without a writer would block forever
        raise ValueError("it is not a regular file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"it is larger than {MAX_BYTES // 2**20} MiB")
    value = loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value
