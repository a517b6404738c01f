"""What the documents name exists: commands, options and choices of `evoprune ...` and `python -m ...` lines, and source files.

The commands are parsed, not run, so placeholders such as MODEL may stand for values. Blocks that run as they stand: test_readme.py.
"""

import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.plans import parse_budget_or_name
from evoprune_cli.main import ParserError, app
from experiments.demo.scenes_batches import ScenesRecipe
from tests.cli.test_readme import PAGES, ROOT

GROUP = get_command(app)


def entry_points(page: Path) -> Iterator[str]:
    """Methods that a page adds by entry points."""
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        yield from tomllib.loads(block)["project"]["entry-points"]["evoprune.methods"]


ADDED = {name for page in PAGES for name in entry_points(page)}


def lines_of(text: str) -> Iterator[str]:
    """The command lines of a page: fenced lines, indented lines that begin with the command, and code in prose and tables."""
    for block in re.findall(r"^```(?:sh|text|console)\n(.*?)^```", text, re.S | re.M):
        yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from re.findall(r"^ {4}((?:\S*/)?(?:evoprune|python) .*)$", prose, re.M)
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def commands(line: str, start: str) -> Iterator[list[str]]:
    """The arguments of each command of a shell line that begins with `start`."""
    if not re.search(rf"(^|[\s/(]){start} [a-z]", line) or line.startswith("Usage: "):
        return
    reader = shlex.shlex(line, posix=True, punctuation_chars=True)
    reader.whitespace_split = True
    words: list[str] = []
    for word in [*reader, ";"]:
        if set(word) <= set(reader.punctuation_chars):
            names = [re.sub("^.*/(?=.)", "", name) for name in words]
            begin = shlex.split(start)
            for at in range(len(words) - len(begin)):
                if names[at : at + len(begin)] == begin and re.match("[a-z]", words[at + len(begin)]):
                    yield words[at + len(begin) :]
                    break
            words = []
        else:
            words.append(word)


def problem(arguments: list[str]) -> str | None:
    """What is wrong with the arguments of `evoprune`; None if they are right. A command without arguments is a mention of it."""
    name, *rest = arguments
    if name not in GROUP.commands:
        return f"no command {name!r}"
    if not rest:
        return None
    above = GROUP.make_context("evoprune", [], resilient_parsing=True)
    values = ["1" if re.fullmatch("[A-Z]+", word) else word for word in rest]  # a placeholder may be a number
    try:
        given = GROUP.commands[name].make_context(name, values, parent=above).params
        for option in GROUP.commands[name].params:
            if given[option.name] and option.metavar:
                check(option.name, option.metavar.split("|"), given[option.name])
    except typer.Exit:  # --help
        return None
    except (ParserError, UsageError) as error:
        return error.message
    return None


def check(name: str, choices: list[str], given: object) -> None:
    """Raises UsageError where an option lists its values and a value is not among them, or there is no such method or budget."""
    for value in ",".join(given).split(",") if isinstance(given, list | tuple) else str(given).split(","):
        if name == "method" and value.rpartition("+")[2].partition(":")[0] not in ADDED:
            methods.registry.check(value)
        elif name == "budget":
            parse_budget_or_name(value)
        elif value not in choices and len(choices) > 1 and all(choice == choice.lower() for choice in choices):
            raise UsageError(f"{name}: {value!r} is none of {choices}", "")


def missing_options(arguments: list[str]) -> list[str]:
    """Options of `python -m MODULE ...` that are no text in the module, nor made from the fields of a recipe."""
    name, *rest = arguments
    path = ROOT / name.replace(".", "/")
    source = next(file for file in (path.with_suffix(".py"), path / "__main__.py") if file.exists())
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = source.read_text("utf-8")
    if "asdict(ScenesRecipe())" in known:
        known += " ".join(f'"--{field.name.replace("_", "-")}"' for field in fields(ScenesRecipe))
    return [word for word in own if re.match("--?[a-z]", word) and f'"{word}"' not in known]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_parses(page, capsys):
    wrong = []
    for line in lines_of(page.read_text(encoding="utf-8")):
        wrong += [f"{line}: {bad}" for given in commands(line, "evoprune") if (bad := problem(given))]
        for given in commands(line, "python -m"):
            if given[0].split(".")[0] in ("evoprune", "evoprune_cli", "experiments", "tests"):
                wrong += [f"{line}: no option {option}" for option in missing_options(given)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_source_file_that_is_named_exists(page):
    named = re.findall(r"(?<![\w/.:-])((?:[\w-]+/)+[\w-]+\.(?:py|md|svg|jsonl))", page.read_text(encoding="utf-8"))
    folders = (ROOT, ROOT / "evoprune", page.parent)
    missing = [name for name in named if not any((folder / name).exists() for folder in folders)]
    assert not [name for name in missing if not name.startswith("runs/")]


@pytest.mark.parametrize(
    ("line", "arguments"),
    [
        ("$ evoprune ask a.mp4 'Who?'  # a comment", [["ask", "a.mp4", "Who?"]]),
        ("ls *.mp4 | xargs -P 4 -I{} .venv/bin/evoprune ask {} -q > a.jsonl", [["ask", "{}", "-q"]]),
        ("while read -r a; do evoprune ask $a; done; evoprune inspect --scan", [["ask", "$a"], ["inspect", "--scan"]]),
        ("evoprune -b 0.5", []),
        ("pip install evoprune", []),
    ],
)
def test_commands_are_found_in_shell_lines(line, arguments):
    assert list(commands(line, "evoprune")) == arguments


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("guess clip.mp4", "no command"),
        ("ask a.mp4 Who? --no-such-option", "No such option"),
        ("ask a.mp4 Who? --decoder ffmpeg", "'ffmpeg' is none of"),
        ("ask a.mp4 Who? -n many", "valid integer"),
        ("ask a.mp4 Who? -b 1.5", "budget"),
        ("eval --data FILE --method evoprune,nothing-like-it", "no pruning method"),
        ("inspect VIDEO --scan", None),
        ("eval --data FILE --processes N --group open", None),
        ("eval --data FILE --method evoprune,reuse+divprune:x=1", None),
    ],
)
def test_a_wrong_command_is_found(line, says):
    found = problem(shlex.split(line))
    assert found is None if says is None else says in found


def test_a_wrong_option_of_a_module_is_found():
    assert missing_options(["experiments.kernels", "--repeat", "1", "--rounds", "2"]) == ["--rounds"]
    assert missing_options(["experiments.environments", "lowest", "--", "-n", "4"]) == []
