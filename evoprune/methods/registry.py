"""The pruning methods by name: this package's own, and those that other packages add.

A package adds a method by an entry point of the group `evoprune.methods`, whose name is the method's and whose object is a subclass
of `Selector`, `Merger` or `InputMethod` (methods/base.py). It is loaded when it is selected.
"""

import re
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from evoprune.errors import EvopruneError, UsageError, first_line

if TYPE_CHECKING:
    from evoprune.methods.base import Method

GROUP = "evoprune.methods"
_REGISTRY = {
    "evoprune": "evoprune.methods.evoprune:EvoPrune",
    "evoprune-merge": "evoprune.methods.evoprune_merge:EvoPruneMerge",
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
REUSE = "reuse"  # put before a selector: reuse+divprune


def available() -> list[str]:
    """Names of the methods, this package's own first."""
    return [*_REGISTRY, *_plugins()]


def known(text: str) -> bool:
    """Whether every method that `text` names exists; settings are not checked."""
    names = [name.partition(":")[0] for name in text.split("+")]
    return names[-1] in available() and all(name == REUSE for name in names[:-1])


def get(text: str, args: dict[str, str] | None = None) -> "Method":
    """The method that `text` names.

    Args:
        text: `NAME`, or `NAME:SETTING=VALUE:...`, or two of these joined by `+` in the order in which they act:
            `reuse+divprune`.
        args: further settings, as texts; those in `text` win. Not for a combination, whose settings stand in `text`.

    Raises:
        UsageError: no such method or combination, a setting that it does not have, or a broken method of another package.
    """
    *before, last = text.split("+")
    if not before:
        if last.partition(":")[0] == REUSE:
            raise UsageError(f"{REUSE} stands before a method that selects", f"for example {REUSE}+divprune")
        return _one(last, args)
    if args:
        raise UsageError(f"settings of {text} must stand in its name", f"for example {REUSE}:threshold=5+mmr:lam=0.7")
    return _combined(text, before, last)


def _combined(text: str, before: list[str], last: str) -> "Method":
    from dataclasses import replace

    from evoprune.methods.base import Selector
    from evoprune.methods.reuse import Reuse

    name, settings = _split(before[0])
    selector = _one(last, None)
    if len(before) > 1 or name != REUSE or not isinstance(selector, Selector):
        raise UsageError(
            f"methods cannot be combined as {text!r}", f"{REUSE}+NAME puts reuse in time before a method that selects"
        )
    return replace(Reuse.from_args(settings), then=selector)


def _split(text: str) -> tuple[str, dict[str, str]]:
    """`NAME:SETTING=VALUE:...` as a name and its settings."""
    name, *settings = text.split(":")
    if wrong := [setting for setting in settings if "=" not in setting]:
        raise UsageError(f"method {name}: {wrong[0]!r} is not NAME=VALUE", "for example evoprune:reuse=5")
    return name, dict(setting.split("=", 1) for setting in settings)


def _one(text: str, args: dict[str, str] | None) -> "Method":
    name, settings = _split(text)
    settings = (args or {}) | settings
    if name in _REGISTRY:
        module, _, cls = _REGISTRY[name].partition(":")
        return getattr(import_module(module), cls).from_args(settings)
    if name in _plugins():
        return _load(_plugins()[name]).from_args(settings)
    raise UsageError(f"no pruning method {name!r}", f"one of {', '.join(available())}")


def plugins() -> dict[str, str]:
    """For each entry point of other packages, by its name: whose it is, and whether it works. Loads them."""
    found = {}
    for entry in _entry_points():
        state = f"of {_package(entry)}"
        if _plugins().get(entry.name) is not entry:
            state += ", ignored: the name is taken or not valid"
        else:
            try:
                _load(entry)
            except EvopruneError as problem:
                state += f", broken: {problem.message}"
        found[f"{entry.name} ({_package(entry)})" if entry.name in found else entry.name] = state
    return found


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(sorted(entry_points(group=GROUP), key=lambda entry: (entry.name, _package(entry))))


@cache
def _plugins() -> dict[str, EntryPoint]:
    """By name, without names that are taken or that a list of names could not hold."""
    made = {}
    for entry in _entry_points():
        if entry.name not in (*_REGISTRY, REUSE) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            made.setdefault(entry.name, entry)
    return made


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _load(entry: EntryPoint) -> type["Method"]:
    from evoprune.methods.base import Method

    try:
        found = entry.load()
    except Exception as problem:  # another package's module may raise anything when it is imported
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise _broken(entry, f"cannot be loaded ({reason})") from problem
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise _broken(entry, f"is not a Method: {entry.value}")
    return found


def _broken(entry: EntryPoint, what: str) -> UsageError:
    hint = "repair or uninstall that package, or choose another --method"
    return UsageError(f"method {entry.name!r} of {_package(entry)} {what}", hint)
