"""Adds a full signature and help text to functions that take option dataclasses as `**options`. Does not import torch.

Type checkers and editors get the same information from keywords.py, which `python -m evoprune_cli.keywords` generates.
"""

import re
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import Field, fields
from inspect import Parameter, cleandoc, signature
from types import NoneType
from typing import Any, Literal, TypeVar, get_args, get_origin

from evoprune.util import OPTION, parts_of

WIDTH = 100  # width of the lines in help texts, in columns
Function = TypeVar("Function", bound=Callable[..., Any])


def takes(*kinds: type, **defaults: Any) -> Callable[[Function], Function]:
    """Return a decorator for functions whose last parameter, `**options`, stands for the fields of one or more option dataclasses.

    The decorator adds each field to the function's signature as a keyword-only parameter, and to the function's docstring as a
    paragraph. Fields for which the function already declares a parameter are left out.

    Args:
        kinds: The option dataclasses.
        defaults: Default values that differ from those of the fields, by field name.
    """

    def decorate(function: Function) -> Function:
        written = signature(function)
        *own, _ = written.parameters.values()
        without = {parameter.name for parameter in own}
        options = [
            Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
            for kind in kinds
            for field in fields(kind)
            if field.name not in without
        ]
        options = [each.replace(default=defaults.get(each.name, each.default)) for each in options]
        function.__signature__ = written.replace(parameters=[*own, *options])
        function.__doc__ = explained(function.__doc__, *kinds, without=without, **defaults)
        return function

    return decorate


def explained(doc: str | None, *kinds: type, without: Iterable[str] = (), **defaults: Any) -> str:
    """Extend a docstring with a paragraph for each field of `kinds` that gives the field's name, type, default and meaning.

    Args:
        without: Names of the fields to leave out.
        defaults: Default values that differ from those of the fields, by field name.
    """
    paragraphs = [
        textwrap.fill(
            f"{field.name} ({type_code(field)} = {defaults.get(field.name, field.default)!r}): {meaning(kind, field)}",
            WIDTH,
            initial_indent="    ",
            subsequent_indent="        ",
            break_on_hyphens=False,
        )
        for kind in kinds
        for field in fields(kind)
        if field.name not in without
    ]
    return "\n".join([cleandoc(doc or ""), "", "Options:", *paragraphs]).lstrip()


def meaning(kind: type, field: Field) -> str:
    """Return an option's help text for Python users.

    Any command line flags in the text are replaced with the names of the corresponding Python keywords.
    """
    option = field.metadata[OPTION]
    if option.in_python:
        return option.in_python
    names = {f"--{each.name.replace('_', '-')}": each.name for each in fields(kind)}
    names |= {flag: each.name for each in fields(kind) for flag in each.metadata[OPTION].flags}
    return re.sub(r"(?<![\w-])--?[a-z][a-z-]*", lambda match: names.get(match[0], match[0]), option.help)


def type_code(field: Field) -> str:
    """Return the source code of an option's Python type."""
    also = field.metadata[OPTION].also
    if also:
        return f"{code(field.type)} | {also}"
    return code(field.type)


def code(declared: Any) -> str:
    """Return the source code of a type, such as `float | Literal["full", "fast"] | None`."""
    parts = parts_of(declared)
    if len(parts) > 1:
        return " | ".join(map(code, parts))
    if declared is NoneType:
        return "None"
    if get_origin(declared) is Literal:
        words = ", ".join(f'"{word}"' for word in get_args(declared))
        return f"Literal[{words}]"
    inside = ", ".join(map(code, get_args(declared)))
    name = (get_origin(declared) or declared).__name__
    return f"{name}[{inside}]" if inside else name
