"""Generates typed dicts of the options for type checkers: `python -m evoprune_cli.keywords > evoprune/keywords.py`."""

import textwrap
from dataclasses import fields

from evoprune.hf import EvoPrune
from evoprune.language import GenerationOptions
from evoprune.session import FindOptions, ModelOptions, PruneOptions, StreamOptions
from evoprune.signatures import meaning, type_code
from evoprune.video import SamplingOptions

KINDS = (ModelOptions, PruneOptions, SamplingOptions, GenerationOptions, StreamOptions, FindOptions, EvoPrune)
# Typed dicts for functions that accept the options of several classes.
JOINED = {"LoadKeywords": (ModelOptions, PruneOptions), "ReadAheadKeywords": (ModelOptions, SamplingOptions)}
# For each class, an additional typed dict without one option, for overloads whose return type depends on that option.
WITHOUT = {GenerationOptions: ("UntypedKeywords", "schema")}
POSITIONAL = ("model",)  # model-loading functions have a separate parameter for it
HEAD = '''"""Options of the Python functions, for type checkers and editors only. `help` shows them with their defaults.

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
    return "\n\n".join([HEAD, *map(_keywords, KINDS), *(_joined(name, kinds) for name, kinds in JOINED.items())])


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


if __name__ == "__main__":
    print(module(), end="")
