"""Keywords and values that a caller may have mistyped: what is wrong is named together with what would be right. No torch."""

from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from os import PathLike
from types import NoneType, UnionType
from typing import Any, ParamSpec, TypeVar, get_args, get_origin

from evoprune.errors import UsageError

P = ParamSpec("P")
T = TypeVar("T")
# What a declared type accepts, and what it is called.
KINDS: dict[type, tuple[type, str]] = {
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
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"of class {type(value).__name__}"


def unknown_option(name: str, known: list[str]) -> TypeError:
    """The error of a keyword that does not exist."""
    return TypeError(f"unknown option {name!r}; known: {', '.join(known)}")


def names_options(function: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function: the TypeError for a keyword that it does not have names those that it has."""
    parameters = signature(function).parameters.values()
    known = [p.name for p in parameters if p.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    options = [p.name for p in parameters if p.default is not Parameter.empty]
    first = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]

    @wraps(function)
    def checked(*args: P.args, **given: P.kwargs) -> T:
        for name in given:
            if name not in known:
                raise unknown_option(name, options)
        if len(args) > len(first):
            more = ", ".join(map(brief, args[len(first) :]))
            raise TypeError(f"options are given by name: which is {more}? known: {', '.join(options)}")
        return function(*args, **given)

    return checked


def check_types(options: Any) -> None:
    """Checks that the fields of a dataclass have the types that it declares. Fields of other types than `KINDS` are left out.

    Raises:
        UsageError: it names the field, its value, and what it should be.
    """
    for field in fields(options):
        check_type(field.name, getattr(options, field.name), field.type)


def check_type(name: str, value: Any, declared: Any) -> None:
    """Checks a value of an option, of which the declared type has kinds of `KINDS` alone. Other types are not checked.

    Raises:
        UsageError: it names the option, the value, and what it should be.
    """
    kinds = get_args(declared) if isinstance(declared, UnionType) else [declared]
    wanted = [KINDS.get(get_origin(kind) or kind) for kind in kinds]
    if None in wanted:
        return
    *first, last = (each for _, each in wanted)
    right = f"{', '.join(first)} or {last}" if first else last
    fits = any(isinstance(value, kind) and (kind is bool or not isinstance(value, bool)) for kind, _ in wanted)
    if not fits:
        raise UsageError(f"{name} is {brief(value)}, not {right}", f"give {right}")
    if isinstance(value, Integral) and not LEAST <= value <= MOST:
        raise UsageError(f"{name} is {value}, which 64 bits cannot hold", "give a smaller number")
