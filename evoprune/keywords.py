"""Options as fields of dataclasses, and as keywords of functions. Mistyped ones are named with what would be right. No torch."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature, cleandoc, signature
from itertools import chain, repeat
from numbers import Integral, Real
from os import PathLike
from textwrap import wrap
from types import NoneType, UnionType
from typing import Any, TypeVar, get_args, get_origin

from evoprune.errors import UsageError

T = TypeVar("T")
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
    """What the command line and the documentation say of an option."""

    help: str  # of the command line, and of Python where `python` says nothing else
    flags: tuple[str, ...] = ()  # how it is typed; if there are none, by its name
    words: tuple[str, ...] = ()  # its values, for help and completion; those in capitals stand for any others: FILE, N
    metavar: str | None = None  # what help shows for its value
    least: int | None = None  # the range of its value
    most: int | None = None
    env: str | None = None  # the variable that sets it
    typed: Any = None  # the type of what is typed, of which `parse` makes the value; None for the field's
    unless_typed: Any = None  # the default of the command line; None for the field's
    parse: Callable[[Any], Any] | None = None
    python: str | None = None
    changes_answers: bool = True  # whether answers depend on it, so that outputs record it


def option(default: Any, help: str, *flags: str, **more: Any) -> Any:
    """A field of a dataclass of options. `more`: of `Option`."""
    return field(default=default, metadata={OPTION: Option(help, flags, **more)})


def from_keywords(given: Mapping[str, Any], *declared: type) -> list:
    """One object of each of `declared`, made of the keywords that are its fields.

    Raises TypeError: a keyword that is a field of none of them. UsageError: a bad value.
    """
    known = [f.name for each in declared for f in fields(each)]
    _check_known(given, known, known)
    return [each(**{f.name: given[f.name] for f in fields(each) if f.name in given}) for each in declared]


def _check_known(given: Iterable[str], known: Collection[str], options: Sequence[str]) -> None:
    """Raises TypeError, with the options that there are, for a keyword that is not known."""
    if unknown := [name for name in given if name not in known]:
        raise TypeError(f"unknown option {unknown[0]!r}; known: {', '.join(options)}")


def names_options(function: Callable[..., T]) -> Callable[..., T]:
    """Decorates a function that is called with options by name: the TypeError for one that does not exist names those that do.

    The fields of a parameter whose type is a dataclass of options are keywords of their own: in the signature, in the
    documentation, and in calls, which may also give the object by the parameter's name. If the parameter may be positional, so may
    its first field.
    """
    written = list(signature(function).parameters.values())
    dataclasses = {p.name: p.annotation for p in written if is_dataclass(p.annotation)}
    groups = {name: each for name, each in dataclasses.items() if all(OPTION in f.metadata for f in fields(each))}
    parameters = []
    for p in written:
        kinds = chain([p.kind], repeat(Parameter.KEYWORD_ONLY))  # the first field as the parameter, the others by name
        made = zip(fields(p.annotation) if p.name in groups else (), kinds, strict=False)
        parameters += [Parameter(f.name, kind, default=f.default, annotation=f.type) for f, kind in made] or [p]
    known = [p.name for p in parameters if p.kind in (Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    options = [p.name for p in parameters if p.default is not Parameter.empty]
    first = [p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)]
    places = {p.name: i for i, p in enumerate(written) if p.name in groups and p.kind is not Parameter.KEYWORD_ONLY}

    @wraps(function)
    def checked(*args: Any, **given: Any) -> T:
        _check_known(given, {*known, *groups}, options)
        if len(args) > len(first):
            more = ", ".join(map(brief, args[len(first) :]))
            raise TypeError(f"options are given by name: which is {more}? known: {', '.join(options)}")
        for name, group in groups.items():
            own = {f.name: given.pop(f.name) for f in fields(group) if f.name in given}
            place = places.get(name, len(args))
            if place < len(args):
                args = (*args[:place], group(**{first[place]: args[place]}, **own), *args[place + 1 :])
            elif name not in given:
                given[name] = group(**own)
        return function(*args, **given)

    checked.__signature__ = Signature(parameters, return_annotation=signature(function).return_annotation)
    checked.__doc__ = documented(function.__doc__, groups.values())
    return checked


def documented(text: str | None, groups: Iterable[type]) -> str | None:
    """A docstring with the options of `groups` below it."""
    lines = []
    for each in (f for group in groups for f in fields(group)):
        said = each.metadata[OPTION]
        words = f" ({'|'.join(said.words)})" if said.words else ""
        lines += wrap(f"{each.name}{words}: {said.python or said.help}", 100, subsequent_indent="    ")
    return "\n".join([cleandoc(text or ""), "", "Options:", *(f"    {line}" for line in lines)]) if lines else text


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
