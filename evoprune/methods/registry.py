"""The registry of pruning methods, which looks up a method by its name.

The registry contains the core methods and all methods that packages register as entry points in the `evoprune.methods` group,
including those of evoprune.contrib. Only `MethodText.parts` parses user-supplied text. Importing this module does not import torch.
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
from evoprune.util import did_you_mean, shorten

if TYPE_CHECKING:
    from evoprune.methods.base import Method

# Entry point groups. Methods that act inside the language model have their own group, so they can be identified without being
# loaded.
GROUPS = ("evoprune.methods", "evoprune.language_methods")
# The default method and its baselines, which are always available. All other methods, including evoprune.contrib, are entry points.
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
# Paper names of methods that have a different name here, reduced to letters and digits.
PAPER_NAMES = {"mmgvid": "mmg", "streamingassistant": "adjacent", "pdrop": "pyramiddrop"}
RESIZING = ("downscale", "subsample")  # this project's input methods (class `InputMethod`)
REUSE = "reuse"  # the prefix for selectors, as in reuse+divprune
OWN = "evoprune"  # the distribution that provides this project's entry points
SHOWN = 200  # maximum number of characters of a method in an error message
LONGEST_TEXT = 8192  # maximum length of a method with its settings, one of which may be a path of 4096 characters
_NUMBER = re.compile(r"=[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?(?=[:+]|$)")  # matches a numeric value of a setting


class Named(NamedTuple):
    """A method as specified by the user, in the form NAME:SETTING=VALUE:SETTING=VALUE."""

    text: str  # full text, including the settings
    name: str
    settings: tuple[tuple[str, str | None], ...]  # (setting, value) pairs; the value is None if there is no equals sign


@dataclass(frozen=True)
class MethodText:
    """One or more methods as specified by the user, joined with plus signs. Only `members` imports torch."""

    DEFAULT: ClassVar[str] = "evoprune"

    text: str

    @property
    def parts(self) -> list[Named]:
        """The methods in the text, split at plus signs. A plus sign inside a number such as 1e+1 is not a separator.

        Raises:
            UsageError: If the text is longer than `LONGEST_TEXT`.
        """
        if len(self.text) > LONGEST_TEXT:
            problem = f"the method {shorten(self.text, SHOWN)!r} has {len(self.text):,} characters"
            raise UsageError(problem, f"use at most {LONGEST_TEXT:,}; evoprune methods lists the methods")
        hidden = _NUMBER.sub(lambda match: match[0].replace("+", "\0"), self.text)
        found = []
        for part in hidden.split("+"):
            written = part.replace("\0", "+")
            name, *settings = written.split(":")
            pairs = (setting.partition("=") for setting in settings)
            found.append(Named(written, name, tuple((key, value if equals else None) for key, equals, value in pairs)))
        return found

    def check(self) -> None:
        """Check that the methods exist and can be combined in this order.

        Because plug-ins are not loaded, this check does not detect all errors.

        Raises:
            UsageError: If a method does not exist, or if the methods cannot be combined in this order.
        """
        text = self.text
        names = [each.name for each in self.parts]
        if _is_list(text):
            text = shorten(text, SHOWN)
            hint = f"to compare several: evoprune eval --method {text}; --compare shows one next to the unpruned model"
            raise UsageError(f"{text!r} is a list, but only one method can be used here", hint)
        if names == [REUSE]:
            raise UsageError(f"{REUSE} must be followed by a method that selects", f"for example {REUSE}+divprune")
        for name in names:
            if name != REUSE and name not in available():
                raise _unknown(name)
        # Maps the names of this project's entry points to whether the method acts inside the language model.
        own = {name: entry.group == GROUPS[1] for name, entry in _plugins().items() if _is_own(entry)}
        *before, last = names
        if len(names) > 3 or REUSE in names[1:] or any(own.get(name) for name in before):
            raise impossible(text)
        after_core = before and before[0] in CORE and (len(before) > 1 or last in CORE or own.get(last) is False)
        if after_core or (before == [REUSE] and own.get(last)):
            raise impossible(text)  # methods from other packages are checked in `MethodChain.parse`

    def members(self) -> "list[Method]":
        """Create the methods with their settings.

        Raises:
            UsageError: If a method or a setting does not exist, or if a value is invalid.
        """
        self.check()
        return [_instantiate(each) for each in self.parts]

    def completions(self) -> list[str]:
        """Return shell completions: the text up to its last plus sign, followed by each valid next method name."""
        before = self.text.removesuffix(self.parts[-1].text)
        texts = [before + name for name in available() if MethodText(before + name)._is_possible]
        if self.text and f"{REUSE}+".startswith(self.text) and not any(text.startswith(self.text) for text in texts):
            return MethodText(f"{REUSE}+").completions()  # reuse requires a selector
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
        """Whether any method in the text may make inputs smaller. True for all plug-ins, because they are not loaded here."""
        own = available(plugins=False)
        return any(each.name in RESIZING or not (each.name == REUSE or each.name in own) for each in self.parts)

    def plugin_code(self) -> dict[str, str]:
        """Return a hash of each plug-in method's source code, keyed by method name.

        Raises:
            UsageError: If a method cannot be loaded.
        """
        hashes = {}
        for name in (each.name for each in self.parts):
            if (entry := _plugins().get(name)) and not _is_own(entry):
                files = _code_files(entry, Path(inspect.getfile(_load(entry))))
                hashes[name] = hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]
        return hashes


def available(plugins: bool = True) -> list[str]:
    """Return the names of all methods: the core methods, then evoprune.contrib, then plug-ins.

    Args:
        plugins: Whether to include methods from other packages. They are not loaded, so they may be broken.
    """
    return [*CORE, *(name for name, entry in _plugins().items() if plugins or _is_own(entry))]


def _is_list(text: str) -> bool:
    """Return True if `text` is a comma-separated list of methods. Commas in setting values do not count."""
    later = {MethodText(part.strip()).parts[0].name for part in text.split(",")[1:]}
    return any("," in each.name for each in MethodText(text).parts) or not later.isdisjoint((*available(), REUSE))


def _unknown(name: str) -> UsageError:
    letters = _letters(name)
    known = (*available(), REUSE)
    same = [each for each in known if _letters(each) == letters]
    near = did_you_mean(name, same or known, 3)
    if letters in PAPER_NAMES:
        near = f"{PAPER_NAMES[letters]} is based on it; "
    if len(available(plugins=False)) == len(CORE):  # the checkout was installed before these entry points were added
        near = "the methods of evoprune.contrib are not installed: reinstall evoprune with pip; "
    return UsageError(f"unknown pruning method {shorten(name, SHOWN)!r}", f"{near}evoprune methods lists them all")


def _letters(name: str) -> str:
    """Convert a name to lowercase, and remove all characters except letters and digits."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def impossible(text: str) -> UsageError:
    """Return the error for methods that cannot be combined in the order given in `text`."""
    kinds = "NAME is a method that selects, or NAME+INNER, where INNER acts inside the language model"
    return UsageError(
        f"methods cannot be combined as {shorten(text, SHOWN)!r}", f"use {REUSE}+NAME or ipcv+NAME, where {kinds}"
    )


def get(text: str) -> "Method":
    """Create a method from its text, such as `evoprune:depth=0.25`.

    Raises:
        UsageError: If the method or a setting does not exist, or if the text contains more than one method.
    """
    first, *others = MethodText(text).members()
    if others:
        raise impossible(text)
    return first


def _instantiate(named: Named) -> "Method":
    """Create a method with its settings.

    Raises:
        UsageError: If a setting is unknown, or if a value is invalid.
    """
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
    """Return a hint for an error message about a method's settings.

    If `name` is a valid setting, the hint shows how to set it. Otherwise, it lists all settings and their defaults.
    """
    known = {f.name: f"{f.name}={f.default}" for f in fields(method)}
    if name in known:
        return f"give the setting a value: {method.name}:{known[name]}"
    return f"its settings and defaults: {', '.join(known.values()) or 'none'}"


def _parsed(method: type, setting: Field, text: str) -> Any:
    """Parse a setting's value from `text`.

    The value has the same type as the setting's default or, if the default is None, the first type in the setting's annotation. If
    that type has a `read` function, `text` is the path of a file to read.
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
        kinds = {bool: "true or false", int: "a whole number"}
        problem = f"method {method.name}: {setting.name}={text!r} is not {kinds.get(number, 'a number')}"
        raise UsageError(problem, settings_hint(method)) from None


@cache
def _warn_of_ignored(name: str) -> None:
    """Warn if a plug-in method is ignored because another method has the same name.

    The function is cached, so it warns at most once per name in each process.
    """
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
    """Return the Python files that a plug-in method's module might import from its own package.

    If the module is part of a package, these are all Python files in the top-level package folder. Otherwise, they are the files
    installed together with the module.
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
    """Load the methods from all other packages, and describe the results.

    Returns:
        A description of each method, keyed by name: the package that provides it and, for unusable methods, the reason.
    """
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
    """Return the usable entry points, keyed by name. Entry points with an invalid or duplicate name are excluded."""
    entries = {}
    for entry in _entry_points():
        if entry.name not in (*CORE, REUSE) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", entry.name):
            entries.setdefault(entry.name, entry)
    return entries


def _is_own(entry: EntryPoint) -> bool:
    return entry.dist is not None and _name_of(entry.dist) == OWN


@cache
def _name_of(distribution: Distribution) -> str:
    """Return a package's name. The result is cached, because each access to the property parses the package's metadata."""
    return distribution.name


def _package(entry: EntryPoint) -> str:
    if not entry.dist:
        return "an unknown package"
    return f"{entry.dist.name} {entry.dist.version}"


def _load(entry: EntryPoint) -> type["Method"]:
    from evoprune.methods.base import Method

    try:
        loaded = entry.load()
    except (Exception, SystemExit) as problem:  # importing a module from another package may raise any exception
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
