"""The methods by name: the core methods, and the entry points in `evoprune.methods`, including evoprune.contrib.

Only `MethodText.parts` reads the text that users write. Importing this module imports no torch.
"""

import hashlib
import inspect
import re
from dataclasses import Field, dataclass, fields
from functools import cache
from importlib import import_module
from importlib.metadata import Distribution, EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, get_args
from warnings import warn

from evoprune.errors import EvopruneError, PluginWarning, UsageError, first_line
from evoprune.util import did_you_mean

if TYPE_CHECKING:
    from evoprune.methods.base import Method

# Entry point groups. The second one tells, before loading, that a method acts inside the language model.
GROUPS = ("evoprune.methods", "evoprune.language_methods")
# The default and its baselines, always available. All others, including evoprune.contrib, are entry points.
CORE = {
    "evoprune": "evoprune.methods.evoprune:EvoPruneMethod",
    "evoprune-paper": "evoprune.methods.evoprune_paper:EvoPrunePaper",
    "none": "evoprune.methods.baselines:Nothing",
    "random": "evoprune.methods.baselines:Random",
    "downscale": "evoprune.methods.baselines:Downscale",
    "subsample": "evoprune.methods.baselines:Subsample",
    "pool": "evoprune.methods.baselines:Pool",
    "divprune": "evoprune.methods.baselines:DivPrune",
}
# Paper names under which users look for a method, reduced to letters and digits.
PAPER_NAMES = {"idpruner": "mmr", "mmgvid": "mmg", "streamingassistant": "adjacent", "pdrop": "pyramiddrop"}
RESIZING = ("downscale", "subsample")  # this project's methods of class `InputMethod`
REUSE = "reuse"  # prefix of a selector: reuse+divprune
OWN = "evoprune"  # the distribution whose entry points are this project's
_NUMBER = re.compile(r"=[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?(?=[:+]|$)")  # a number as a setting's value


class Named(NamedTuple):
    """A method as users write it: NAME:SETTING=VALUE:SETTING=VALUE."""

    text: str  # the whole text
    name: str
    settings: tuple[tuple[str, str | None], ...]  # (setting, value) pairs; the value is None without an equals sign


@dataclass(frozen=True)
class MethodText:
    """Methods as users write them, joined by plus signs. Only `members` imports torch."""

    DEFAULT: ClassVar[str] = "evoprune"

    text: str

    @property
    def parts(self) -> list[Named]:
        """The methods in the text. A plus inside a number, such as 1e+1, does not separate."""
        hidden = _NUMBER.sub(lambda match: match[0].replace("+", "\0"), self.text)
        found = []
        for part in hidden.split("+"):
            written = part.replace("\0", "+")
            name, *settings = written.split(":")
            pairs = (setting.partition("=") for setting in settings)
            found.append(Named(written, name, tuple((key, value if equals else None) for key, equals, value in pairs)))
        return found

    def check(self) -> None:
        """Check that the methods exist and that their order is possible, as far as this is known without loading plug-ins.

        Raises:
            UsageError: A method does not exist, or the order is impossible.
        """
        text = self.text
        names = [each.name for each in self.parts]
        if _is_list(text):
            hint = f"to compare several: evoprune eval --method {text}; --compare shows one next to the unpruned model"
            raise UsageError(f"{text!r} is a list, but only one method can be used here", hint)
        if names == [REUSE]:
            raise UsageError(f"{REUSE} must be followed by a method that selects", f"for example {REUSE}+divprune")
        for name in names:
            if name != REUSE and name not in available():
                raise _unknown(name)
        # This project's entry points, and whether they act inside the language model.
        own = {name: entry.group == GROUPS[1] for name, entry in _plugins().items() if _is_own(entry)}
        *before, last = names
        if len(names) > 3 or REUSE in names[1:] or any(own.get(name) for name in before):
            raise impossible(text)
        after_core = before and before[0] in CORE and (len(before) > 1 or last in CORE or own.get(last) is False)
        if after_core or (before == [REUSE] and own.get(last)):
            raise impossible(text)  # `MethodChain.parse` checks methods of other packages

    def members(self) -> "list[Method]":
        """Return the methods, with their settings. Raises UsageError."""
        self.check()
        return [_instantiate(each) for each in self.parts]

    def completions(self) -> list[str]:
        """Return the texts that complete this one, by a method that may follow its last plus sign."""
        before = self.text.removesuffix(self.parts[-1].text)
        texts = [before + name for name in available() if MethodText(before + name)._is_possible]
        if self.text and f"{REUSE}+".startswith(self.text) and not any(text.startswith(self.text) for text in texts):
            return MethodText(f"{REUSE}+").completions()  # it is not a method by itself
        return texts

    @property
    def _is_possible(self) -> bool:
        try:
            self.check()
        except UsageError:
            return False
        return True

    @property
    def may_resize(self) -> bool:
        """Whether a method makes inputs smaller. Also True for plug-ins, which are not loaded and might do so."""
        own = available(plugins=False)
        return any(each.name in RESIZING or not (each.name == REUSE or each.name in own) for each in self.parts)

    def plugin_code(self) -> dict[str, str]:
        """Return a hash of each plug-in method's code, by method name.

        Raises:
            UsageError: A method cannot be loaded.
        """
        hashes = {}
        for name in (each.name for each in self.parts):
            if (entry := _plugins().get(name)) and not _is_own(entry):
                files = _code_files(entry, Path(inspect.getfile(_load(entry))))
                hashes[name] = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
        return hashes


def available(plugins: bool = True) -> list[str]:
    """Return the names of all methods, this project's first: the core methods, then evoprune.contrib.

    Args:
        plugins: Include the methods of other packages, which are not loaded and may be broken.
    """
    return [*CORE, *(name for name, entry in _plugins().items() if plugins or _is_own(entry))]


def _is_list(text: str) -> bool:
    """Return True if a comma separates methods, rather than being part of a setting's value."""
    later = {MethodText(part.strip()).parts[0].name for part in text.split(",")[1:]}
    return any("," in each.name for each in MethodText(text).parts) or not later.isdisjoint((*available(), REUSE))


def _unknown(name: str) -> UsageError:
    """Return the error for a name that no method has."""
    letters = _letters(name)
    known = (*available(), REUSE)
    same = [each for each in known if _letters(each) == letters]
    near = did_you_mean(name, same or known, 3)
    if letters in PAPER_NAMES:
        near = f"{PAPER_NAMES[letters]} is based on it; "
    if len(available(plugins=False)) == len(CORE):  # a checkout installed before these became entry points
        near = "the methods of evoprune.contrib are not installed: reinstall evoprune with pip; "
    return UsageError(f"unknown pruning method {name!r}", f"{near}evoprune methods lists them all")


def _letters(name: str) -> str:
    """Return only the letters and digits of a name, in lower case."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def impossible(text: str) -> UsageError:
    """Return the error for methods that cannot be combined in this order."""
    kinds = "NAME is a method that selects, or NAME+INNER, where INNER acts inside the language model"
    return UsageError(f"methods cannot be combined as {text!r}", f"use {REUSE}+NAME or ipcv+NAME, where {kinds}")


def get(text: str) -> "Method":
    """Return the single method in `text` (`NAME:SETTING=VALUE:...`). Raises UsageError."""
    first, *others = MethodText(text).members()
    if others:
        raise impossible(text)
    return first


def _instantiate(named: Named) -> "Method":
    """Return the method with its settings. Raises UsageError for an unknown setting or a wrong value."""
    _warn_of_ignored(named.name)
    method = _class(named.name)
    if wrong := [name for name, value in named.settings if value is None]:
        raise UsageError(f"method {method.name}: {wrong[0]!r} is not NAME=VALUE", settings_hint(method, wrong[0]))
    known = {f.name: f for f in fields(method)}
    values = {}
    for name, text in named.settings:
        if name not in known:
            raise UsageError(f"method {method.name} has no setting {name!r}", settings_hint(method))
        values[name] = _parsed(method, known[name], text)
    try:
        instance = method(**values)
        if wrong := [name for name, value in values.items() if value != value]:  # no method accepts NaN
            raise ValueError(f"{wrong[0]}=nan is not a number")
    except ValueError as error:
        raise UsageError(f"method {method.name}: {error}", settings_hint(method)) from None
    return instance


def settings_hint(method: type, name: str | None = None) -> str:
    """Return a hint that lists the settings, or that shows how to give the setting `name`."""
    known = {f.name: f"{f.name}={f.default}" for f in fields(method)}
    if name in known:
        return f"give the setting a value: {method.name}:{known[name]}"
    return f"its settings and defaults: {', '.join(known.values()) or 'none'}"


def _parsed(method: type, setting: Field, text: str) -> Any:
    """Return a setting's value, parsed from `text` as the type of its default, or as its first type if the default is None.

    A type with a function `read` is read from the file that the text names.
    """
    if setting.default is None and text == "None":
        return None
    number = get_args(setting.type)[0] if setting.default is None else type(setting.default)
    if hasattr(number, "read"):
        return number.read(text)
    try:
        if number is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return number(text)
    except (KeyError, ValueError):
        problem = f"method {method.name}: {setting.name}={text!r} is not {number.__name__}"
        raise UsageError(problem, settings_hint(method)) from None


@cache
def _warn_of_ignored(name: str) -> None:
    """Warn, once per process, about plug-in methods that are ignored because another method has the same name."""
    for entry in _entry_points():
        if entry.name == name and _plugins().get(name) is not entry:
            used = "evoprune"
            if name not in (*CORE, REUSE) and not _is_own(_plugins()[name]):
                used = _package(_plugins()[name])
            warn(
                f"{_description_of(entry)} is ignored: {used} has a method {name}; give it another name",
                PluginWarning,
                stacklevel=2,
            )


def _class(name: str) -> "type[Method]":
    if name == REUSE:
        from evoprune.methods.evoprune import Reuse

        return Reuse
    if name in CORE:
        module, _, attribute = CORE[name].partition(":")
        return getattr(import_module(module), attribute)
    return _load(_plugins()[name])


def _code_files(entry: EntryPoint, file: Path) -> list[Path]:
    """Return the files that a method's module may import from its own package.

    These are the Python files in the module's top-level package folder, or the files installed with it.
    """
    folder = file.parent
    while (folder.parent / "__init__.py").exists():
        folder = folder.parent
    if (folder / "__init__.py").exists():
        return sorted(folder.rglob("*.py"))
    files = getattr(entry.dist, "files", None) or ()
    installed = [Path(str(path.locate())) for path in files if path.suffix == ".py"]
    if file in installed:
        return sorted(installed)
    return sorted(folder.glob("*.py"))


def plugins() -> dict[str, str]:
    """Return the entry points of other packages, by name, with their package and whether they work. Loads all of them."""
    states = {}
    for entry in _entry_points():
        if _is_own(entry):
            continue
        state = f"of {_package(entry)}"
        if _plugins().get(entry.name) is not entry:
            state += ", ignored: the name is taken or invalid"
        else:
            try:
                _load(entry)
            except EvopruneError as problem:
                state += f", broken: {problem.message.removeprefix(f'{_description_of(entry)} ')}"
        name = entry.name
        if name in states:
            name += f" ({_package(entry)})"
        states[name] = state
    return states


@cache
def _entry_points() -> tuple[EntryPoint, ...]:
    entries = (entry for group in GROUPS for entry in entry_points(group=group))
    return tuple(sorted(entries, key=lambda entry: (not _is_own(entry), entry.name, _package(entry))))


@cache
def _plugins() -> dict[str, EntryPoint]:
    """Return the entry points by name, without names that are taken or invalid."""
    entries = {}
    for entry in _entry_points():
        if entry.name not in (*CORE, REUSE) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            entries.setdefault(entry.name, entry)
    return entries


def _is_own(entry: EntryPoint) -> bool:
    return entry.dist is not None and _name_of(entry.dist) == OWN


@cache
def _name_of(distribution: Distribution) -> str:
    """Return the name of a package. Cached because the property parses metadata."""
    return distribution.name


def _package(entry: EntryPoint) -> str:
    if not entry.dist:
        return "an unknown package"
    return f"{entry.dist.name} {entry.dist.version}"


def _load(entry: EntryPoint) -> type["Method"]:
    from evoprune.methods.base import Method

    try:
        loaded = entry.load()
    except (Exception, SystemExit) as problem:  # importing another package's module may raise anything
        reason = f"{type(problem).__name__}: {first_line(problem)}"
        raise _broken(entry, f"cannot be loaded ({reason})") from problem
    if not (isinstance(loaded, type) and issubclass(loaded, Method)):
        raise _broken(entry, f"is not a Method: {entry.value}")
    if missing := sorted(getattr(loaded, "__abstractmethods__", ())):
        raise _broken(entry, f"is incomplete: class {loaded.__name__} has no {', '.join(missing)}")
    if loaded.name != entry.name:
        raise _broken(entry, f"has a different name in its class: {loaded.__name__} needs name = {entry.name!r}")
    if "__dataclass_params__" not in vars(loaded):
        raise _broken(entry, f"is not a dataclass: {loaded.__name__} needs @dataclass(frozen=True)")
    if not _is_own(entry):
        loaded.package = _description_of(entry)
    return loaded


def _broken(entry: EntryPoint, what: str) -> UsageError:
    return UsageError(f"{_description_of(entry)} {what}", "repair or uninstall that package, or choose another method")


def _description_of(entry: EntryPoint) -> str:
    return f"method {entry.name!r} of {_package(entry)}"
