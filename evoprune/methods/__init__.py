"""The pruning methods, their base classes and their registry. Importing this imports neither torch nor the methods."""

from typing import TYPE_CHECKING

from evoprune.methods.registry import (
    DEFAULT,
    available,
    built_in,
    check,
    get,
    may_resize,
    parse_names,
    parse_setting,
    plugin_code,
    plugins,
)

if TYPE_CHECKING:
    from evoprune.methods.chain import MethodChain

__all__ = [
    "DEFAULT", "available", "built_in", "check", "get", "may_resize", "parse", "parse_names", "parse_setting", "plugin_code",
    "plugins",
]  # fmt: skip


def parse(text: str, args: dict[str, str] | None = None) -> "MethodChain":
    """Return what `text` names, as `MethodChain.parse` does."""
    from evoprune.methods.chain import MethodChain  # which loads torch

    return MethodChain.parse(text, args)
