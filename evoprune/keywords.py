"""Options as fields of dataclasses, which functions take as keywords. Mistyped ones are named with those that exist. No torch."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from evoprune.errors import UsageError

OPTION = "option"  # of a field's metadata
# What a declared type accepts, and what it is called.
ACCEPTED: dict[type, tuple[type, str]] = {
    float: (Real, "a number"),
    int: (Integral, "a whole number"),
    str: (str, "a text"),
    bool: (bool, "True or False"),
    dict: (Mapping, "a dict"),
    PathLike: (PathLike, "a path"),
    Callable: (Callable, "a function"),
    NoneType: (NoneType, "None"),
}
LEAST, MOST = -(2**63), 2**64 - 1  # of a whole number that torch takes, as a seed for example


def brief(value: Any) -> str:
    """A value for a message: its repr where that is short, else its class."""
    try:
        text = repr(value)
    except Exception:  # another package's class may raise anything
        text = ""
    return text if 0 < len(text) <= 60 and "\n" not in text else f"of class {type(value).__name__}"


@dataclass(frozen=True)
class Option:
    """What the command line says of an option."""

    help: str
    flags: tuple[str, ...] = ()  # how it is typed; if there are none, by its name
    words: tuple[str, ...] = ()  # its values, for help and completion; those in capitals stand for any others: FILE, N
    metavar: str | None = None  # what help shows for its value
    least: int | None = None  # the range of its value
    most: int | None = None
    env: str | None = None  # the variable that sets it
    typed: Any = None  # the type of what is typed, of which `parse` makes the value; None for the field's
    unless_typed: Any = None  # the default of the command line; None for the field's
    parse: Callable[[Any], Any] | None = None
    changes_answers: bool = True  # whether answers depend on it, so that outputs record it


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A field of a dataclass of options. `more`: of `Option`."""
    return field(default=default, metadata={OPTION: Option(help, flags, **more)})


def from_keywords(given: Mapping[str, Any], *declared: type) -> list:
    """One object of each of `declared`, dataclasses, made of the keywords that are its fields.

    Raises TypeError: a keyword that is a field of none of them. UsageError: a bad value.
    """
    check_known(given, *declared)
    return [each(**{f.name: given[f.name] for f in fields(each) if f.name in given}) for each in declared]


def check_known(given: Iterable[str], *declared: type) -> None:
    """Raises TypeError, with the options that there are, for a keyword that is a field of none of `declared`."""
    known = [f.name for each in declared for f in fields(each)]
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")


def check_types(options: Any) -> None:
    """`check_type` of each field of a dataclass, which then holds Python's own numbers, as JSON and torch's seeds need them."""
    for each in fields(options):
        object.__setattr__(options, each.name, check_type(each.name, getattr(options, each.name), each.type))


def check_type(name: str, value: Any, declared: Any) -> Any:
    """The value, as one of Python's own numbers if it is one of numpy's.

    Raises UsageError, with what is right, where it is not of the declared type, if that is in `ACCEPTED`.
    """
    types = get_args(declared) if isinstance(declared, UnionType) else [declared]
    wanted = [ACCEPTED.get(get_origin(each) or each) for each in types]
    if None in wanted:
        return value
    *first, last = (each for _, each in wanted)
    right = f"{', '.join(first)} or {last}" if first else last
    if not any(isinstance(value, each) and (each is bool or not isinstance(value, bool)) for each, _ in wanted):
        raise UsageError(f"{name} is {brief(value)}, not {right}", f"give {right}")
    if isinstance(value, Integral) and not LEAST <= value <= MOST:
        raise UsageError(f"{name} is {value}, which 64 bits cannot hold", "give a smaller number")
    if isinstance(value, Real) and not isinstance(value, int | float):
        return int(value) if isinstance(value, Integral) else float(value)
    return value
