"""Generates typed dicts of the options for type checkers: `python -m evoprune_cli.keywords > evoprune/keywords.py`.

The generated file also lists the options of each method of `VideoQA`, for error messages.
"""

import textwrap
from dataclasses import fields
from inspect import Parameter, signature

from evoprune.hf import EvoPrune
from evoprune.language import GenerationOptions
from evoprune.session import FindOptions, ModelOptions, PruneOptions, StreamOptions
from evoprune.signatures import meaning, type_code
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA

KINDS = (ModelOptions, PruneOptions, SamplingOptions, GenerationOptions, StreamOptions, FindOptions, EvoPrune)
# Typed dicts for functions that accept the options of several classes.
JOINED = {"LoadKeywords": (ModelOptions, PruneOptions), "ReadAheadKeywords": (ModelOptions, SamplingOptions)}
# Typed dicts for functions that accept only some options of a class: the class of the other options, that class, and the names.
PARTS = {
    "ReadKeywords": (None, SamplingOptions, SamplingOptions.READING),
    "WatchKeywords": (StreamOptions, SamplingOptions, SamplingOptions.WATCHING),
    "SearchKeywords": (FindOptions, SamplingOptions, SamplingOptions.SEARCHING),
}
# For each class, an additional typed dict without one option, for overloads whose return type depends on that option.
WITHOUT = {GenerationOptions: ("UntypedKeywords", "schema")}
# Methods of `VideoQA` in the order of their use. If several have an option, messages name the first.
METHODS = ("load", "encode", "ask", "stream", "find")
POSITIONAL = ("model",)  # model-loading functions have a separate parameter for it
HEAD = '''"""Options of the Python functions, for type checkers, editors, and error messages. `help` shows them with their defaults.

Generated from the option classes by `python -m evoprune_cli.keywords > evoprune/keywords.py`; do not edit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    import torch
'''
WIDTH = 120


def module() -> str:
    """Generate the source code of evoprune/keywords.py."""
    return "\n\n".join(
        [
            HEAD,
            *map(_keywords, KINDS),
            *(_joined(name, kinds) for name, kinds in JOINED.items()),
            *(_part(name, *given) for name, given in PARTS.items()),
            _options(),
        ]
    )


def _name(kind: type) -> str:
    return f"{kind.__name__.removesuffix('Options')}Keywords"


def _keywords(kind: type) -> str:
    about, *_ = (kind.__doc__ or "").split("\n")
    title = f'    """{about.split(". ")[0].rstrip(".")}."""'
    if kind not in WITHOUT:
        return _class(_name(kind), "TypedDict", title, kind, [field.name for field in fields(kind)])
    name, option = WITHOUT[kind]
    others = [field.name for field in fields(kind) if field.name != option]
    base = _class(name, "TypedDict", f'    """{_name(kind)} without {option}."""', kind, others)
    return base + "\n\n" + _class(_name(kind), name, title, kind, [option])


def _class(name: str, base: str, title: str, kind: type, options: list[str]) -> str:
    """Generate a typed dict with the given options of a class. `title` is the docstring, as a line of source code."""
    lines = [f"class {name}({base}, total=False):", title, ""]
    for field in fields(kind):
        if field.name in POSITIONAL or field.name not in options:
            continue
        lines.append(f"    {field.name}: {type_code(field)}")
        lines.append(
            textwrap.fill(f'"""{meaning(kind, field)}"""', WIDTH, initial_indent="    ", subsequent_indent="    ")
        )
    return "\n".join([*lines, ""])


def _joined(name: str, kinds: tuple[type, ...]) -> str:
    return f'class {name}({", ".join(map(_name, kinds))}, total=False):\n    """The options of both."""\n'


def _part(name: str, base: type | None, kind: type, names: tuple[str, ...]) -> str:
    title = '    """Options for reading frames."""'
    if base is not None:
        title = f'    """{_name(base)}, and options for reading frames."""'
    return _class(name, _name(base) if base else "TypedDict", title, kind, list(names))


def _options() -> str:
    """Generate `OPTIONS_OF`, the names of the keyword-only arguments of each method of `VideoQA`."""
    lines = [
        "# The options of each method, for messages about options that are passed to another method.",
        "OPTIONS_OF = {",
    ]
    for method in METHODS:
        parameters = signature(getattr(VideoQA, method)).parameters.values()
        names = ", ".join(f'"{each.name}"' for each in parameters if each.kind is Parameter.KEYWORD_ONLY)
        inside = textwrap.fill(names, WIDTH, initial_indent=" " * 8, subsequent_indent=" " * 8)
        lines += [f'    "VideoQA.{method}": (', f"{inside},", "    ),"]
    return "\n".join([*lines, "}  # fmt: skip", ""])


if __name__ == "__main__":
    print(module(), end="")
