"""The methods by name: those of the core, and classes in the entry point group `evoprune.methods`, of evoprune.contrib too."""

import hashlib
import inspect
import re
from dataclasses import replace
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import warn

from evoprune.errors import (
    PLUGINS,
    EvopruneError,
    PluginWarning,
    UsageError,
    first_line,
    is_interruption,
    names_plugins,
)
from evoprune.methods.settings import from_args, settings_hint
from evoprune.util import did_you_mean

if TYPE_CHECKING:
    from evoprune.methods.base import Method
    from evoprune.methods.chain import MethodChain

# Entry points; what is in the second one acts inside the language model, which is known before it is loaded.
GROUPS = ("evoprune.methods", "evoprune.language_methods")
# Without these there would be nothing to compare the default with. All others, of evoprune.contrib too, are entry points.
CORE = {
    "evoprune": "evoprune.methods.evoprune:EvoPrune",
    "evoprune-paper": "evoprune.methods.evoprune_paper:EvoPrunePaper",
    "none": "evoprune.methods.baselines:Nothing",
    "random": "evoprune.methods.baselines:Random",
    "downscale": "evoprune.methods.baselines:Downscale",
    "subsample": "evoprune.methods.baselines:Subsample",
    "pool": "evoprune.methods.baselines:Pool",
    "divprune": "evoprune.methods.baselines:DivPrune",
}
DEFAULT = "evoprune"
REUSE = "reuse"  # put before a selector: reuse+divprune
OWN = "evoprune"  # the distribution whose entry points are this project's
_NUMBER = re.compile(r"=[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?(?=[:+]|$)")  # of a setting


def built_in() -> list[str]:
    """Names of this project's methods: those of the core, then those of evoprune.contrib."""
    return [*CORE, *(name for name, entry in _plugins().items() if _is_own(entry))]


def available() -> list[str]:
    """Names of the methods, this project's first. Those of other packages are not loaded, and may be broken."""
    return [*CORE, *_plugins()]


def check(text: str) -> None:
    """Raises UsageError if `text` names a method that does not exist, or an impossible order. Imports no torch."""
    names = _names(text)
    if _is_list(text):
        hint = f"to compare several: evoprune eval --method {text}; --compare shows one beside nothing pruned"
        raise UsageError(f"{text!r} is a list, and one method is taken here", hint)
    if names == [REUSE]:
        raise UsageError(f"{REUSE} needs a method that selects after it", f"for example {REUSE}+divprune")
    for name in names:
        if name != REUSE and name not in available():
            raise _unknown(name)
    own = {
        name: entry.group == GROUPS[1] for name, entry in _plugins().items() if _is_own(entry)
    }  # whether it acts inside
    *before, last = names
    if len(names) > 3 or REUSE in names[1:] or any(own.get(name) for name in before):
        raise _impossible(text)
    after_core = before and before[0] in CORE and (len(before) > 1 or last in CORE or own.get(last) is False)
    if after_core or (before == [REUSE] and own.get(last)):
        raise _impossible(text)  # what entry points of other packages are, only `parse` knows


def _names(text: str) -> list[str]:
    """The names in `text`, without settings."""
    return [name.partition(":")[0] for name in _split(text)]


def _split(text: str) -> list[str]:
    """The methods in `text`, with their settings. A plus in a setting's number, as in 1e+1, separates none."""
    hidden = _NUMBER.sub(lambda match: match[0].replace("+", "\0"), text)
    return [part.replace("\0", "+") for part in hidden.split("+")]


def _is_list(text: str) -> bool:
    """Whether a comma separates methods. One in the value of a setting does not."""
    later = {_names(part.strip())[0] for part in text.split(",")[1:]}
    return any("," in name for name in _names(text)) or not later.isdisjoint((*available(), REUSE))


def _unknown(name: str) -> UsageError:
    """The error for a name that no method has."""
    plain, known = _plain(name), (*available(), REUSE)
    same = [each for each in known if _plain(each) == plain]
    follows = {entry.name: entry.value for entry in entry_points(group="evoprune.known_as")}
    near = f"{follows[plain]} follows it; " if plain in follows else did_you_mean(name, same or known, 3)
    if len(built_in()) == len(CORE):  # a checkout that was installed before these were entry points
        near = "the methods of evoprune.contrib are not installed: pip install evoprune again; "
    return UsageError(f"no pruning method {name!r}", f"{near}evoprune methods lists them all")


def _plain(name: str) -> str:
    """Its letters and digits, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _impossible(text: str) -> UsageError:
    kinds = "NAME is a method that selects, or NAME+INNER, where INNER acts inside the language model"
    return UsageError(f"methods cannot be combined as {text!r}", f"use {REUSE}+NAME or ipcv+NAME, where {kinds}")


@names_plugins()
def get(text: str, args: dict[str, str] | None = None) -> "Method":
    """The method `NAME:SETTING=VALUE:...`, whose settings override `args`, as texts. Raises UsageError, PluginError."""
    check(text)
    if len(_split(text)) > 1:
        raise _impossible(text)
    return _one(text, args)


@names_plugins()
def parse(text: str, args: dict[str, str] | None = None) -> "MethodChain":
    """What `text` names: methods as in `get`, joined by `+` in the order in which they act, without `args`. Raises as `get`."""
    from evoprune.methods.chain import MethodChain

    check(text)
    names = _split(text)
    if args and len(names) > 1:
        example = f"{text}:{'='.join(next(iter(args.items())))}, or {REUSE}:threshold=5+{names[-1]}"
        raise UsageError(f"settings of {text} must be part of its name", f"for example {example}")
    parts = [MethodChain.of(_one(name, args)) for name in names]
    chain = parts.pop()
    language = chain.language
    if language and not parts:
        if language.share is None:
            return chain
        name = language.name
        hint = f"the budget (-b) is the share of a method alone; or combine it: {DEFAULT}+{name}:share={language.share}"
        raise UsageError(f"method {name} has a share, and nothing acts before it", hint)
    if language:
        chain = parts.pop()
        if names[-2].partition(":")[0] == REUSE:
            raise _impossible(text)
    if parts:
        front = parts.pop().encoder
        if parts or not (front and front.combines and chain.selector):
            raise _impossible(text)
        chain = replace(chain, encoder=front)
    if language and (chain.language or not chain.members):
        raise _impossible(text)
    return replace(chain, language=language)


def _one(text: str, args: dict[str, str] | None) -> "Method":
    name, *texts = text.split(":")
    _warn_of_ignored(name)
    method = _class(name)
    if wrong := [text for text in texts if "=" not in text]:
        raise UsageError(f"method {method.name}: {wrong[0]!r} is not NAME=VALUE", settings_hint(method, wrong[0]))
    return from_args(method, (args or {}) | dict(text.split("=", 1) for text in texts))


@cache
def _warn_of_ignored(name: str) -> None:
    """Warns, once in a process, of methods of other packages that have the name of the one that is selected."""
    for entry in _entry_points():
        if entry.name == name and _plugins().get(name) is not entry:
            own = name in (*CORE, REUSE) or _is_own(_plugins()[name])
            used = "evoprune's own" if own else f"that of {_package(_plugins()[name])}"
            warn(f"{_named(entry)} is ignored: {name} is {used}; give it another name", PluginWarning, stacklevel=2)


def _class(name: str) -> "type[Method]":
    if name == REUSE:
        from evoprune.methods.evoprune import Reuse

        return Reuse
    if name in CORE:
        module, _, attribute = CORE[name].partition(":")
        return getattr(import_module(module), attribute)
    return _load(_plugins()[name])


def plugin_code(text: str) -> dict[str, str]:
    """A hash of the code of each method of another package that `text` names, by name. Raises UsageError: it cannot be loaded."""
    hashes = {}
    for name in _names(text):
        if (entry := _plugins().get(name)) and not _is_own(entry):
            files = _code_files(entry, Path(inspect.getfile(_load(entry))))
            hashes[name] = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
    return hashes


def _code_files(entry: EntryPoint, file: Path) -> list[Path]:
    """What a method's module may import of its own package: the Python files of its folder, or those installed with it."""
    folder = file.parent
    while (folder.parent / "__init__.py").exists():
        folder = folder.parent
    if (folder / "__init__.py").exists():
        return sorted(folder.rglob("*.py"))
    files = entry.dist.files or () if entry.dist else ()
    installed = [Path(str(path.locate())) for path in files if path.suffix == ".py"]
    return sorted(installed if file in installed else folder.glob("*.py"))


def plugins() -> dict[str, str]:
    """Each entry point of other packages, by name: its package, and whether it works. Loads all of them."""
    states = {}
    for entry in _entry_points():
        if _is_own(entry):
            continue
        state = f"of {_package(entry)}"
        if _plugins().get(entry.name) is not entry:
            state += ", ignored: the name is taken or not valid"
        else:
            try:
                _load(entry)
            except EvopruneError as problem:
                state += f", broken: {problem.message.removeprefix(f'{_named(entry)} ')}"
        states[f"{entry.name} ({_package(entry)})" if entry.name in states else entry.name] = state
    return states


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    entries = (entry for group in GROUPS for entry in entry_points(group=group))
    return tuple(sorted(entries, key=lambda entry: (not _is_own(entry), entry.name, _package(entry))))


@cache
def _plugins() -> dict[str, EntryPoint]:
    """The entry points by name, without names that are taken or not valid."""
    entries = {}
    for entry in _entry_points():
        if entry.name not in (*CORE, REUSE) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            entries.setdefault(entry.name, entry)
    return entries


def _is_own(entry: EntryPoint) -> bool:
    return entry.dist is not None and entry.dist.name == OWN


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "an unknown package"


def _load(entry: EntryPoint) -> type["Method"]:
    from evoprune.methods.base import Method

    try:
        loaded = entry.load()
    except BaseException as problem:  # another package's module may raise anything when it is imported
        if is_interruption(problem):
            raise
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise _broken(entry, f"cannot be loaded ({reason})") from problem
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise _broken(entry, f"is not a Method: {entry.value}")
    if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        raise _broken(entry, f"is not complete: class {loaded.__name__} has no {', '.join(missing)}")
    if loaded.name != entry.name:
        raise _broken(entry, f"has another name in its class: {loaded.__name__} needs name = {entry.name!r}")
    if "__dataclass_params__" not in vars(loaded):
        raise _broken(entry, f"is no dataclass: {loaded.__name__} needs @dataclass(frozen=True)")
    if not _is_own(entry):
        PLUGINS[loaded] = _named(entry)
    return loaded


def _broken(entry: EntryPoint, what: str) -> UsageError:
    return UsageError(f"{_named(entry)} {what}", "repair or uninstall that package, or choose another method")


def _named(entry: EntryPoint) -> str:
    return f"method {entry.name!r} of {_package(entry)}"
