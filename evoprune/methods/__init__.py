"""The pruning methods, by name. Listing them imports neither torch nor the methods themselves."""

from importlib import import_module
from typing import TYPE_CHECKING

from evoprune.errors import UsageError

if TYPE_CHECKING:
    from evoprune.methods.base import Method

# `evoprune` is the best this project has; for now that is the paper's method.
_REGISTRY = {
    "evoprune": "evoprune.methods.evoprune_paper:EvoPrunePaper",
    "evoprune-paper": "evoprune.methods.evoprune_paper:EvoPrunePaper",
    "none": "evoprune.methods.none:Nothing",
    "random": "evoprune.methods.random:Random",
}
DEFAULT = "evoprune"


def available() -> list[str]:
    """Names of the registered methods."""
    return list(_REGISTRY)


def get(name: str, args: dict[str, str] | None = None) -> "Method":
    """The method called `name`, with settings given as texts.

    Raises:
        UsageError: no such method, or a setting it does not have.
    """
    if name not in _REGISTRY:
        raise UsageError(f"no pruning method {name!r}", f"one of {', '.join(_REGISTRY)}")
    module, _, cls = _REGISTRY[name].partition(":")
    return getattr(import_module(module), cls).from_args(args or {})
