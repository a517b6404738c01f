"""What was found for a model and is kept for each user: its tuned setting and its recipe.

Files are named by the fingerprint of the weights (`loading.weights.files_fingerprint`), so that they belong to those weights
wherever they lie. And what options of pruning mean for a model, with that in the place of "tuned". No torch until then.
"""

import json
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Generic, TypeVar

from evoprune import methods
from evoprune.errors import EvopruneError, UsageError, first_line
from evoprune.keywords import check_types
from evoprune.methods.budget import AUTO, AUTO_INFLECTION, TUNED, parse_budget
from evoprune.model.rules import read_object
from evoprune.session.options import PruneOptions

if TYPE_CHECKING:
    from evoprune.methods.chain import Pipeline
    from evoprune.methods.operation_plans import Recipe

ALL = "all"
UNFINISHED = ".tmp"  # what the names of files end with while they are written
T = TypeVar("T")


def folder(kind: str = "config") -> Path:
    """EVOPRUNE_CONFIG_DIR, or `evoprune` where this user's settings are; or the same of `kind` "cache"."""
    standard = os.path.join(os.environ.get(f"XDG_{kind.upper()}_HOME") or f"~/.{kind}", "evoprune")
    return Path(os.path.expanduser(os.environ.get(f"EVOPRUNE_{kind.upper()}_DIR") or standard))


def write_file(path: Path, content: Callable[[BinaryIO], None]) -> None:
    """Writes a file completely or not at all. Raises OSError, and what `content` does."""
    handle, temporary = tempfile.mkstemp(suffix=UNFINISHED, dir=path.parent)
    try:
        with open(handle, "wb") as file:
            content(file)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


@dataclass(frozen=True)
class Shelf(Generic[T]):
    """The files of one kind."""

    name: str  # of their folder
    schema: str  # the name of their format, with its version
    # What a file holds: a dataclass of plain values, which refuses what cannot be: UsageError or ValueError.
    kind: type[T]
    what: str  # what a file is called in messages
    again: str  # the command that makes a new one

    def find(self, fingerprint: str) -> T | None:
        """What is kept for these weights; None for nothing. Raises UsageError if its file is damaged or cannot be read."""
        path = self.path(fingerprint)
        try:
            content = read_object(path)
            if content.get("schema") != self.schema:
                raise ValueError(f"its schema is not {self.schema}")
            names = [field.name for field in fields(self.kind)]
            if missing := [name for name in names if name not in content]:
                raise ValueError(f"it has no {missing[0]}")
            return self.kind(**{name: content[name] for name in names})
        except FileNotFoundError:
            return None
        except OSError as problem:
            raise _cannot("read", path, problem) from problem
        except (ValueError, EvopruneError) as problem:
            hint = f"remove it: evoprune inspect --forget-tuned {fingerprint[:12]}; or tune again: {self.again}"
            raise UsageError(f"the {self.what} {path} is damaged: {first_line(problem)}", hint) from problem

    def every(self) -> list[tuple[str, T | UsageError]]:
        """All fingerprints with a file, and what it holds; of a damaged one the error. The newest come first."""
        found: list[tuple[str, T | UsageError]] = []
        for name in sorted(path.stem for path in self.path("").parent.glob("*.json")):
            try:
                if re.fullmatch("[0-9a-f]{64}", name) and (kept := self.find(name)):
                    found.append((name, kept))
            except UsageError as problem:
                found.append((name, problem))
        return sorted(found, key=lambda pair: getattr(pair[1], "created_utc", ""), reverse=True)

    def facts(self, kept: Sequence[tuple[str, T | UsageError]]) -> list[dict[str, Any]]:
        """Fingerprints and values, but for recipes; of a `damaged` one the error, and None for its values."""
        names = [field.name for field in fields(self.kind) if field.type not in (dict, list)]
        return [
            {"fingerprint": fingerprint}
            | {name: getattr(each, name, None) for name in names}
            | {"damaged": each.message if isinstance(each, UsageError) else None}
            for fingerprint, each in kept
        ]

    def save(self, fingerprint: str, kept: T) -> Path:
        """Writes a file in the place of an earlier one; returns its path. Raises UsageError if it cannot be written."""
        path = self.path(fingerprint)
        try:
            _write(path, json.dumps({"schema": self.schema} | asdict(kept), indent=1) + "\n")
        except OSError as problem:
            raise _cannot("write", path, problem) from problem
        return path

    def remove(self, fingerprint: str) -> None:
        """Deletes a file. Raises UsageError if there is none, or it cannot be deleted."""
        try:
            self.path(fingerprint).unlink()
        except OSError as problem:
            raise _cannot("remove", self.path(fingerprint), problem) from problem

    def path(self, fingerprint: str) -> Path:
        """Where the file for these weights is, or would be."""
        return folder() / self.name / f"{fingerprint}.json"


def _write(path: Path, text: str) -> None:
    """Writes a file in a folder that only this user may read. Raises OSError."""
    folder().mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.mkdir(mode=0o700, exist_ok=True)
    write_file(path, lambda file: file.write(text.encode()))


def _cannot(do: str, path: Path, problem: OSError) -> UsageError:
    hint = "make room or give rights there, or name another folder in EVOPRUNE_CONFIG_DIR"
    return UsageError(f"cannot {do} {path}: {problem.strerror}", hint)


@dataclass(frozen=True)
class Tuned:
    """A tuned setting, and what was measured when it was found. Raises UsageError: a value that cannot be."""

    method: str  # with its settings, as `--method` takes it
    budget: float
    model: str  # the model's name at that time, for people
    created_utc: str  # ISO date and time
    agree: float  # the agreement that was asked for
    agreement: float  # what was measured
    low: float  # the lower end of its 95% interval
    first_token: float  # time to the first token as a share of that with nothing pruned
    videos: int  # that were measured, as the questions
    questions: int
    version: str  # of evoprune

    def __post_init__(self):
        check_types(self)
        methods.parse(self.method)
        parse_budget(self.budget)
        try:
            datetime.fromisoformat(self.created_utc)
        except ValueError as problem:
            what = f"created_utc {self.created_utc!r} is no date and time"
            raise UsageError(what, "give it in ISO format") from problem
        for name in ("agree", "agreement", "low"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} is {getattr(self, name)}, not a share", "give a number from 0 to 1")
        if not self.first_token > 0 or min(self.videos, self.questions) < 1:
            raise UsageError("first_token, videos and questions must be above 0", "give what was measured")

    @property
    def origin(self) -> dict[str, Any]:
        """What reports say of where a method and budget come from: `pruning.tuned`."""
        return {name: getattr(self, name) for name in ("created_utc", "agree", "low", "videos", "questions")}


@dataclass(frozen=True)
class KeptRecipe:
    """A recipe of operation pruning, and what was measured when it was found. Raises UsageError, ValueError: what cannot be."""

    recipe: dict  # the fields of a `Recipe`, as plain data
    kl: list  # after each step, the mean of KL(unpruned || pruned) in nats a token; None for a step that was not measured
    agree: list  # after each step, the share of tokens at which the first choice is the unpruned model's; None as with `kl`
    model: str
    created_utc: str
    videos: int  # that were measured, as what follows
    questions: int
    tokens: int  # of all full answers
    version: str

    def __post_init__(self):
        check_types(self)
        datetime.fromisoformat(self.created_utc)
        if min(self.videos, self.questions, self.tokens) < 1:
            raise ValueError("videos, questions and tokens must be above 0")
        steps = len(self.made().steps)
        for values in (self.kl, self.agree):
            known = [value for value in values if value is not None] if isinstance(values, list) else None
            numbers = known is not None and all(isinstance(value, int | float) and value >= 0 for value in known)
            if not numbers or len(values) != steps:
                raise ValueError("kl and agree must hold a number of at least 0, or null, for each step")

    def made(self) -> "Recipe":
        """The recipe itself. Raises ValueError if it cannot be one."""
        from evoprune.methods.operation_plans import Recipe

        try:
            steps = tuple(tuple(tuple(each) for each in step) for step in self.recipe["steps"])
            return Recipe(**self.recipe | {"weights": tuple(self.recipe["weights"]), "steps": steps})
        except (KeyError, TypeError) as problem:
            raise ValueError(f"it holds no recipe: {problem}") from problem


tuned = Shelf(TUNED, "evoprune/tuned@1", Tuned, "tuned setting", "evoprune tune")
recipes = Shelf(
    "operations", "evoprune/operations@1", KeptRecipe, "recipe of operations", "evoprune tune VIDEO... --operations"
)


def matching(text: str, more: Sequence[tuple[str, Any]] = ()) -> list[tuple[str, Any]]:
    """The settings, and of `more` models without one, that a text names: "all", a model's name, or the beginning of a fingerprint.

    Raises UsageError: it names none, or more than one without being "all".
    """
    settings = [*(dict(more) | dict(tuned.every())).items()]
    if text == ALL:
        return settings
    found = [(f, s) for f, s in settings if text and (getattr(s, "model", None) == text or f.startswith(text))]
    if not found:
        raise UsageError(f"no tuned setting is named {text!r}", "evoprune inspect lists them")
    if len(found) > 1:
        several = ", ".join(fingerprint[:12] for fingerprint, _ in found)
        raise UsageError(f"{text!r} names {len(found)} tuned settings: {several}", f"name one of these, or {ALL}")
    return found


def never_tuned(model: str, weights: Callable[[], str]) -> bool:
    """Whether weights have no setting; at most once for a model, because the next call finds a mark and says no.

    `model`: `LoadedModel.fingerprint`, which costs nothing. `weights`: gives the fingerprint of the weights where there is no mark.
    """
    mark = folder() / "seen" / sha256(model.encode()).hexdigest()
    if os.path.exists(mark):  # unlike a path's own method, it raises nothing
        return False
    with suppress(OSError):  # without a mark, the next run asks again
        _write(mark, "")
    return not os.path.exists(tuned.path(weights()))


def resolve(options: PruneOptions, name: str | None, weights: Callable[[], str]) -> tuple[PruneOptions, Tuned | None]:
    """Options with the model's own method and budget in the place of "tuned", and the setting; others unchanged, and None.

    `name`: of the model, for errors. `weights`: gives the fingerprint of its weights, where it is needed; what it raises is raised.
    Raises UsageError: the model was never tuned, or its setting is damaged.
    """
    if options.budget != TUNED:
        return options, None
    if (setting := tuned.find(weights())) is None:
        hint = f"evoprune tune VIDEO... -m {name or 'MODEL'} finds one; or give a budget"
        raise UsageError(f"no tuned setting for {name or 'this model'}", hint)
    return replace(options, budget=setting.budget, method=setting.method), setting


def make_method(options: PruneOptions) -> "Pipeline":
    """The method that options name, other than those of a budget of "tuned".

    Raises UsageError: settings that it does not have, or a budget of "auto" where it cannot let the content decide.
    """
    method = methods.parse(options.method, options.method_args)
    if options.budget == AUTO_INFLECTION:
        return method.by_inflection()
    return method.automatic() if options.budget == AUTO else method


def with_recipe(method: "Pipeline", name: str | None, weights: Callable[[], str]) -> "Pipeline":
    """A method with the recipe of a model, where it follows one; others unchanged. Arguments and errors as of `resolve`."""
    inner = method.language
    if getattr(inner, "recipe", inner) is not None or inner is None:  # it follows none, or has it already
        return method
    if (kept := recipes.find(weights())) is None:
        hint = f"evoprune tune VIDEO... --operations -m {name or 'MODEL'} finds one"
        raise UsageError(f"method {inner.name} follows a recipe, and there is none for {name or 'this model'}", hint)
    return replace(method, language=replace(inner, recipe=kept.made()))


def for_model(
    options: PruneOptions, name: str | None, weights: Callable[[], str]
) -> tuple[PruneOptions, "Pipeline", Tuned | None]:
    """What options mean for a model: the options of `resolve`, the method with its recipe, the setting. Errors: theirs."""
    options, setting = resolve(options, name, weights)
    return options, with_recipe(make_method(options), name, weights), setting
