"""Signatures of the public functions in type checkers, editors and `help`; and that type checkers find mistakes."""

import inspect
import json
import pydoc
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args

import pytest

import evoprune
from evoprune import keywords
from evoprune.language import GenerationOptions
from evoprune.methods import Budget
from evoprune.methods.budget import PresetName
from evoprune.session import FindOptions, ModelOptions, PruneOptions, StreamOptions
from evoprune.signatures import code, explained, meaning, takes, type_code
from evoprune.util import option
from evoprune.video import SamplingOptions
from evoprune_cli.keywords import POSITIONAL, module
from tests.typed.public import main

HERE = Path(__file__).parent
ROOT = HERE.parent.parent

# Callables with options, the classes that define the options, and the typed dict that declares them to type checkers.
TAKES: list[tuple[Callable, tuple[type, ...], str]] = [
    (evoprune.VideoQA.__init__, (PruneOptions,), "PruneKeywords"),
    (evoprune.VideoQA.load, (ModelOptions, PruneOptions), "LoadKeywords"),
    (evoprune.VideoQA.encode, (SamplingOptions,), "SamplingKeywords"),
    (evoprune.VideoQA.ask, (GenerationOptions,), "GenerationKeywords"),
    (evoprune.VideoQA.stream, (SamplingOptions, StreamOptions), "WatchKeywords"),
    (evoprune.VideoQA.find, (SamplingOptions, FindOptions), "SearchKeywords"),
    (evoprune.read_frames, (SamplingOptions,), "ReadKeywords"),
    (evoprune.EncodedInputs.ask, (GenerationOptions,), "GenerationKeywords"),
    (evoprune.Chat.ask, (GenerationOptions,), "GenerationKeywords"),
    (evoprune.VideoStream.ask, (GenerationOptions,), "GenerationKeywords"),
    (evoprune.EvoPrune, (evoprune.EvoPrune,), "EvoPruneKeywords"),
    (evoprune.apply, (evoprune.EvoPrune,), "EvoPruneKeywords"),
    (evoprune.processor_inputs, (SamplingOptions,), "SamplingKeywords"),
    (evoprune.read_ahead, (ModelOptions, SamplingOptions), "ReadAheadKeywords"),
]


# The sampling options of callables that don't accept all of them.
PARTS = {
    evoprune.VideoQA.stream: SamplingOptions.WATCHING,
    evoprune.VideoQA.find: SamplingOptions.SEARCHING,
    evoprune.read_frames: SamplingOptions.READING,
}


@pytest.mark.parametrize(("function", "kinds", "name"), TAKES, ids=[each[0].__qualname__ for each in TAKES])
def test_help_has_the_type_the_default_and_the_meaning_of_each_option(function, kinds, name):
    parameters = inspect.signature(function).parameters
    help_page = re.sub(r"\s+", " ", pydoc.render_doc(function, renderer=pydoc.plaintext).replace("\n |", "\n"))
    options = [(kind, field) for kind in kinds for field in fields(kind) if field.name not in POSITIONAL]
    if part := PARTS.get(function):
        options = [(kind, field) for kind, field in options if kind is not SamplingOptions or field.name in part]
    for kind, field in options:
        default = parameters[field.name].default
        other = field.name == "seek" and function in (evoprune.processor_inputs, evoprune.read_frames)
        assert default == ("exact" if other else field.default)
        assert f" {field.name} ({type_code(field)} = {default!r}): {meaning(kind, field)}" in help_page
    assert getattr(keywords, name).__annotations__.keys() == {field.name for _, field in options}


@pytest.mark.parametrize(("function", "kinds", "name"), TAKES, ids=[each[0].__qualname__ for each in TAKES])
def test_a_type_checker_is_told_of_the_same_options(function, kinds, name):
    if function is evoprune.EvoPrune:  # its fields are its options
        return
    annotations = dict(getattr(function, "__func__", function).__annotations__)
    annotations.pop("return", None)
    assert [*annotations.values()][-1] == f"Unpack[{name}]"


def test_the_file_for_type_checkers_is_made_of_the_options():
    stored = (ROOT / "evoprune/keywords.py").read_text(encoding="utf-8")
    assert module() == stored, "make it anew: python -m evoprune_cli.keywords > evoprune/keywords.py"


def test_types_are_written_as_code():
    declared = [field.type for kind in (PruneOptions, SamplingOptions) for field in fields(kind)]
    assert [code(kind) for kind in declared[:3]] == [
        "float | str",
        "str",
        "int",
    ]
    assert code(SamplingOptions.__annotations__["subtitles"]) == "str | PathLike[str]"


def test_names_of_python_stand_for_the_flags_in_a_meaning():
    from dataclasses import dataclass

    @dataclass
    class Options:
        few: int = option(1, "Instead of --many, or of -m; -5 and --other and re-m stay.")
        many_s: float = option(2.0, "Seconds.", "-m", "--many", in_python="So many seconds.")

    first, second = fields(Options)
    assert meaning(Options, first) == "Instead of many_s, or of many_s; -5 and --other and re-m stay."
    assert meaning(Options, second) == "So many seconds."

    @takes(Options, few=3)
    def function(few: int, **options: Any) -> None:
        """Does nothing."""

    assert str(inspect.signature(function)) == "(few: int, *, many_s: float = 2.0) -> None"
    assert function.__doc__ == "Does nothing.\n\nOptions:\n    many_s (float = 2.0): So many seconds."
    assert explained(None, Options).endswith("\n    many_s (float = 2.0): So many seconds.")


def test_the_names_of_presets_are_those_that_there_are():
    assert list(get_args(PresetName)) == list(Budget.PRESETS) and Budget.DEFAULT in Budget.PRESETS


def public() -> Iterator[tuple[str, Callable]]:
    """Yield the public functions, and the public methods (not properties) of public classes."""
    for name in evoprune.__all__:
        value = getattr(evoprune, name)
        if isinstance(value, type):
            yield from (
                (f"{name}.{each}", getattr(value, each))
                for each in dir(value)
                if (not each.startswith("_") or each in ("__init__", "__call__", "__enter__"))
                and callable(getattr(value, each))  # Python 3.13 calls a `cached_property` a routine
                and inspect.isroutine(getattr(value, each))
                and getattr(getattr(value, each), "__module__", "").startswith("evoprune")
            )
        elif callable(value):
            yield name, value
    for name in evoprune.methods.__all__:
        value = getattr(evoprune.methods, name)
        if inspect.isroutine(value):
            yield f"methods.{name}", value


def test_every_parameter_and_result_of_a_public_function_has_a_type():
    untyped = []
    for name, function in public():
        signature = inspect.signature(function)
        parameters = [each for each in signature.parameters.values() if each.name not in ("self", "cls")]
        untyped += [f"{name}: {each.name}" for each in parameters if each.annotation is each.empty]
        if signature.return_annotation is signature.empty and not name.endswith(".__init__"):
            untyped.append(f"{name}: its result")
    assert untyped == []


# Type checkers, if they are installed, on a program and on mistakes.


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A Python with the same packages, and this checkout as an installed package, so that checkers do not report its own errors."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, symlinks=True)
    packages = Path(sysconfig.get_path("purelib", "venv", {"base": str(folder)}))
    paths = [str(ROOT), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    (packages / "checkout.pth").write_text("\n".join(dict.fromkeys(paths)), encoding="utf-8")
    return Path(sysconfig.get_path("scripts", "venv", {"base": str(folder)})) / "python"


def mypy(folder: Path, python: Path) -> list[tuple[str, int, str]]:
    """Return the file, line and text of each error that `mypy --strict` finds."""
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "--python-executable", python, *FILES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = re.findall(r"(?m)^(\S+):(\d+): error: (.*)$", done.stdout)
    return [(name, int(line), says) for name, line, says in found]


def pyright(folder: Path, python: Path) -> list[tuple[str, int, str]]:
    """Return the file, line and text of each error that Pyright finds in strict mode."""
    (folder / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}', encoding="utf-8")
    command = [sys.executable, "-m", "basedpyright", "--pythonpath", python, "--outputjson", *FILES]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = [each for each in json.loads(done.stdout)["generalDiagnostics"] if each["severity"] == "error"]
    return [(Path(each["file"]).name, each["range"]["start"]["line"] + 1, each["message"]) for each in found]


FILES = ("public.py", "wrong.py")
CHECKERS = [
    pytest.param(
        check,
        marks=pytest.mark.skipif(find_spec(package) is None, reason=f"{package} is not installed"),
        id=package,
    )
    for check, package in ((mypy, "mypy"), (pyright, "basedpyright"))
]


@pytest.mark.full
@pytest.mark.parametrize("check", CHECKERS)
def test_a_checker_finds_each_mistake_and_nothing_in_a_program(check, installed, tmp_path):
    for name in FILES:
        shutil.copy(HERE / name, tmp_path)
    found = check(tmp_path, installed)
    assert [fault for fault in found if fault[0] == "public.py"] == []
    lines = (tmp_path / "wrong.py").read_text(encoding="utf-8").splitlines()
    mistakes = {number for number, line in enumerate(lines, 1) if line.startswith("    ")}
    assert len(mistakes) > 20 and {line for _, line, _ in found} == mistakes


@pytest.mark.full
def test_the_program_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert main() == 0 and "green" in capsys.readouterr().out
