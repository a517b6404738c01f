"""The pruning methods, by name: this package's own, and those that other packages bring along.

A package adds a method by an entry point of the group `evoprune.methods`, whose name is the method's and whose object is a
subclass of `methods.base.Method`. It is loaded when it is chosen. Listing methods imports neither torch nor the methods.
"""

import re
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from evoprune.errors import EvopruneError, UsageError, first_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

    from evoprune.methods.base import Method

GROUP = "evoprune.methods"
_REGISTRY = {
    "evoprune": "evoprune.methods.evoprune:EvoPrune",
    "evoprune-paper": "evoprune.methods.evoprune_paper:EvoPrunePaper",
    "tome": "evoprune.methods.tome:ToMe",
    "none": "evoprune.methods.none:Nothing",
    "random": "evoprune.methods.random:Random",
    "downscale": "evoprune.methods.downscale:Downscale",
    "subsample": "evoprune.methods.subsample:Subsample",
    "pool": "evoprune.methods.pool:Pool",
    "divprune": "evoprune.methods.divprune:DivPrune",
    "evs": "evoprune.methods.evs:Evs",
    "evs-nofloor": "evoprune.methods.evs:EvsNoFloor",
    "mmr": "evoprune.methods.mmr:Mmr",
    "scope": "evoprune.methods.scope:Scope",
    "visionzip": "evoprune.methods.visionzip:VisionZip",
    "vispruner": "evoprune.methods.vispruner:VisPruner",
    "cdpruner": "evoprune.methods.cdpruner:CdPruner",
    "dart": "evoprune.methods.dart:Dart",
    "vidcom2": "evoprune.methods.vidcom2:VidCom2",
    "mmg": "evoprune.methods.mmg:Mmg",
    "fastvid": "evoprune.methods.fastvid:FastVid",
    "prunevid": "evoprune.methods.prunevid:PruneVid",
    "holitom": "evoprune.methods.holitom:HoliTom",
    "flashvid": "evoprune.methods.flashvid:FlashVid",
}
DEFAULT = "evoprune"


def available() -> list[str]:
    """Names of the methods, this package's own first."""
    return [*_REGISTRY, *_plugins()]


def known(name: str) -> bool:
    """Whether there is a method of that name, settings in it aside."""
    return name.partition(":")[0] in available()


def get(name: str, args: dict[str, str] | None = None) -> "Method":
    """The method called `name`, with settings given as texts.

    Args:
        name: may bring settings of its own, so that lists of methods can hold variants: `evoprune-paper:critical=0.2:block=4`.
        args: settings; those in the name come before them.

    Raises:
        UsageError: no such method, a setting it does not have, or a method of another package that does not work.
    """
    name, *inline = name.split(":")
    if wrong := [text for text in inline if "=" not in text]:
        raise UsageError(f"method {name}: {wrong[0]!r} is not NAME=VALUE", "for example evoprune-paper:critical=0.2")
    args = (args or {}) | dict(text.split("=", 1) for text in inline)
    if name in _REGISTRY:
        module, _, cls = _REGISTRY[name].partition(":")
        return getattr(import_module(module), cls).from_args(args)
    if name in _plugins():
        return _load(_plugins()[name]).from_args(args)
    raise UsageError(f"no pruning method {name!r}", f"one of {', '.join(available())}")


def plugins() -> dict[str, str]:
    """What is to be said of each entry point of other packages, by its name: whose it is, and whether it works. Loads them."""
    told = {}
    for entry in _entry_points():
        said = f"of {_package(entry)}"
        if _plugins().get(entry.name) is not entry:
            said += ", ignored: the name is taken or not one"
        else:
            try:
                _load(entry)
            except EvopruneError as problem:
                said += f", broken: {problem.message}"
        told[f"{entry.name} ({_package(entry)})" if entry.name in told else entry.name] = said
    return told


@cache
def _entry_points() -> tuple["EntryPoint", ...]:
    from importlib.metadata import entry_points

    return tuple(sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _package(entry))))


@cache
def _plugins() -> dict[str, "EntryPoint"]:
    """By name; a name that is taken, or that a list of names could not hold, is left out."""
    made = {}
    for entry in _entry_points():
        if entry.name not in _REGISTRY and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            made.setdefault(entry.name, entry)
    return made


def _package(entry: "EntryPoint") -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _load(entry: "EntryPoint") -> type["Method"]:
    from evoprune.methods.base import Method

    try:
        found = entry.load()
    except Exception as problem:  # whatever somebody else's module does when it is imported
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise _broken(entry, f"cannot be loaded ({reason})") from problem
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise _broken(entry, f"is not a Method: {entry.value}")
    return found


def _broken(entry: "EntryPoint", what: str) -> UsageError:
    hint = "repair or uninstall that package, or choose another --method"
    return UsageError(f"method {entry.name!r} of {_package(entry)} {what}", hint)
