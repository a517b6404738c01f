"""Test the documents: commands run or parse, links have targets, and docs/cli.md is up to date."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from copy import copy
from dataclasses import fields
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import typer
from typer.main import get_command

import evoprune
from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods import Budget, available
from evoprune_cli.main import COMMANDS, ParserError, app, plugged_command
from experiments import python_docs
from experiments.demo.scenes_batches import ScenesRecipe
from experiments.pictures.examples import MADE_BY, counts

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("results/*.md"))]


def test_the_transcript_of_the_readme(cli):
    """The output matches, except for times, memory and the processor."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    command, shown = re.search(r"^```text\n\$ evoprune (ask samples.*?)\n(.*?)^```", readme, re.S | re.M).groups()
    result = cli(*shlex.split(command))
    assert counts(shown) == counts(result.out + result.err), MADE_BY


@pytest.mark.full
def test_the_guide_explains_every_line_of_the_stats(cli):
    written = cli("ask", "samples/square.mp4", "What happens?", "--compare", "-v", "-b", "fast").err
    names = re.findall(r"(?m)^ *(first token|encode \+ prefill|visual tokens|(?!the\b)[a-z]+)(?![=a-z])", written)
    table = "".join(line for line in (ROOT / "docs/guide.md").read_text("utf-8").splitlines() if line.startswith("| "))
    assert {"video", "now", "compare", "kept"} <= set(names) and [n for n in names if f"`{n}`" not in table] == []


@pytest.mark.full
def test_shell_blocks_run_one_after_the_other(tmp_path):
    """The blocks run in one folder that looks like an installed clone. Each block prints one line per clip."""
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "evoprune"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m evoprune_cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "docs/guide.md").read_text(encoding="utf-8"), re.S | re.M)
    blocks = [block for block in blocks if not block.startswith("pip ")]  # environments run the installing blocks
    assert len(blocks) >= 2
    for block in blocks:
        if "jq" in block and not shutil.which("jq"):
            continue
        done = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", block],
            cwd=tmp_path,
            capture_output=True,
            timeout=300,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr.decode()
        file = re.search(r"\S+\.jsonl", block)
        lines = ((tmp_path / file[0]).read_text() if file else done.stdout.decode()).splitlines()
        clips = sorted(path.stem for path in (ROOT / "samples").glob("*.webm" if "webm" in block else "*.mp4"))
        answers = [json.loads(line)["answer"] if file else line.split("\t")[-1] for line in lines]
        digits = {"flash": "2", "pan": "5", "square": "7", "three": "9"}
        right = (
            [digits[clip] for clip in clips]
            if "Which digit" in block
            else ["no" if "webm" in block else "yes"] * len(clips)
        )
        assert sorted(answers) == sorted(right)


# Questions that the documents' commands ask about `samples/`, and the right answers.
ASKED = {
    "What colour is the square?": "green",
    "What digit is it?": "7",
    "What happens to the square?": "pruned: appears\nfull: stays",  # at 0.05, next to the answer from all tokens
    "Which way does the green heart move?": "right",
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with the samples, so that commands that write files leave nothing in the repository."""
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_what_the_documents_ask_is_answered_right(cli, folder):
    pages = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if page.parent.name != "results")
    asked = set()
    for command in dict.fromkeys(re.findall(r'(?m)^evoprune (ask samples/.*".*".*)$', pages)):
        words = shlex.split(command, comments=True)
        result, questions = cli(*words, "-q"), [word for word in words if word in ASKED]
        assert (result.code, result.out.strip()) == (0, "\n".join(ASKED[q] for q in questions)), command
        asked |= set(questions)
    assert asked == set(ASKED)


@pytest.mark.parametrize(
    ("page", "answers"),
    [
        ("docs/guide.md", ["0.0", "6.0", "green", "7", "cyan", "green", "green", "green", "0.0", "6.0"]),
    ],
)
def test_the_demo_answers_right_in_python(capsys, folder, page, answers):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.S | re.M)
    names: dict = {}
    for block in blocks:
        if "samples/" in block:
            exec(block, names)
    assert re.sub(r"\(\d+ ms\)", " ", capsys.readouterr().out).split() == answers


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_number_of_methods_is_that_of_the_list(page):
    """A page may name some of the methods of `evoprune methods`, but any total must match that list."""
    text = page.read_text(encoding="utf-8")
    counted = re.findall(
        r"(?:\ball (?:the )?|^|- )(\d+) (?:other )?(?:pruning )?methods\b|(\d+) other methods", text, re.M
    )
    assert {int(number) for found in counted for number in found if number} <= {len(available(plugins=False))}, counted


def test_each_block_that_is_run_is_in_the_list_of_those():
    """CONTRIBUTING.md lists which command runs each block."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    listed = Counter()
    for name, count in re.findall(r"^\| `([\w/.]+\.md)`, (\d+) \| \S", text, re.M):
        listed[name] += int(count)
    found = {str(page.relative_to(ROOT)): len(re.findall("^```sh$", page.read_text("utf-8"), re.M)) for page in PAGES}
    assert {name: count for name, count in found.items() if count} == listed


def test_each_row_of_the_results_with_a_command_has_its_time():
    """Readers should know beforehand how long a command takes."""
    text = (ROOT / "results/README.md").read_text(encoding="utf-8")
    head, _, *rows = re.findall(r"^\| (.*) \|$", text, re.M)
    assert head.split(" | ")[-2:] == ["command", "time"]
    for file, _, command, time in (row.split(" | ") for row in rows):
        times = re.findall(r"\b(?:seconds|s|minutes?|min|hours?|h)\b", time)
        assert bool(times) == ("`" in command), f"{file}: {time}"


def test_the_readme_names_the_command_without_a_usual_model(cli, tmp_path):
    assert "they run the demo (`batch` needs `-m`)" in (ROOT / "README.md").read_text("utf-8")
    result = cli("batch", "samples/square.mp4", "-Q", "What happens?", "-o", tmp_path / "answers.jsonl")
    assert result.code == 2 and "no model" in result.err


def test_the_citation_names_the_version():
    for name in ("CITATION.cff", "results/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert re.search(rf"version *[:=] \{{?{re.escape(evoprune.__version__)}\b", text), name


def without_code(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Return the anchors that GitHub creates for the headings of a page."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#+ (.*)$", without_code(page), re.M):
        words = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).strip().lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        found[anchor] = found.get(anchor, -1) + 1
    return {f"{anchor}-{n}" if n else anchor for anchor, last in found.items() for n in range(last + 1)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_resolves(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page)) if "://" not in link]
    for link in links:
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_names_a_module_that_exists(page):
    for name in re.findall(
        r"python -m ((?:evoprune|evoprune_cli|experiments|tests)[\w.]*)", page.read_text(encoding="utf-8")
    ):
        path = ROOT / name.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), name


# docs/cli.md matches the output of `--help-all`.


REFERENCE = """
import sys
from evoprune_cli import main
from evoprune_cli.cli_docs import reference
main.plugged = dict  # no command of another package, as that of the server
text = reference()
assert "torch" not in sys.modules
sys.stdout.buffer.write(text.encode())
"""


def test_the_reference_is_up_to_date_whatever_the_terminal(cli):
    given = {"COLUMNS": "40", "FORCE_COLOR": "1", "EVOPRUNE_BUDGET": "0.3", "EVOPRUNE_MODEL": "other"}
    made = subprocess.run([sys.executable, "-c", REFERENCE], cwd=ROOT, env=os.environ | given, capture_output=True)
    assert made.returncode == 0, made.stderr.decode()
    text = made.stdout.decode()
    stored = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert text.count("Branch, tag or commit") == 1 and "  As in ask: --revision, " in text
    assert text == stored, "make it anew: python -m evoprune_cli.cli_docs > docs/cli.md"
    assert all(len(line) <= 80 for line in text.split("```text")[1].splitlines()) and "\x1b" not in text
    assert cli("ask", "--help-all").out.strip() in text


# Named commands are parsed, not run, so placeholders such as MODEL may stand for values.


GROUP = copy(get_command(app))
GROUP.commands = {**GROUP.commands}
for project in ROOT.glob("plugins/*/pyproject.toml"):  # they may not be installed
    entries = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["entry-points"].get(COMMANDS, {})
    for command, value in entries.items():
        GROUP.commands[command] = plugged_command(EntryPoint(command, value, COMMANDS))


def entry_points(page: Path) -> Iterator[str]:
    """Yield the methods that a page adds by entry points."""
    for block in re.findall(r"^```toml\n(.*?)^```", page.read_text(encoding="utf-8"), re.S | re.M):
        yield from tomllib.loads(block)["project"]["entry-points"]["evoprune.methods"]


ADDED = {name for page in PAGES for name in entry_points(page)}


def lines_of(text: str) -> Iterator[str]:
    """Yield the command lines of a page: fenced lines, indented lines that start with the command, and inline code."""
    for block in re.findall(r"^```(?:sh|text|console)\n(.*?)^```", text, re.S | re.M):
        yield from block.replace("\\\n", " ").splitlines()
    prose = re.sub(r"^```.*?^```", "", text, flags=re.S | re.M)
    yield from re.findall(r"^ {4}((?:\S*/)?(?:evoprune|python) .*)$", prose, re.M)
    yield from (" ".join(code.split()) for code in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def commands(line: str, start: str) -> Iterator[list[str]]:
    """Yield the arguments of commands in a shell line that start with `start`."""
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
    """Return the error in the arguments of `evoprune`, or None. A command without arguments is only a mention.

    The same applies to a command with the name of one of its options, such as `ask --via`.
    """
    name, *rest = arguments
    if name not in GROUP.commands:
        return f"no command {name!r}"
    if not rest or rest in [[flag] for option in GROUP.commands[name].params for flag in option.opts]:
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
    """Raise UsageError if a value is not among an option's listed values, or if a method or budget does not exist."""
    for value in ",".join(given).split(",") if isinstance(given, list | tuple) else str(given).split(","):
        if name == "method" and methods.MethodText(value).parts[-1].name not in ADDED:
            methods.MethodText(value).check()
        elif name == "budget":
            Budget.parse(value, auto=True)
        elif value not in choices and len(choices) > 1 and all(choice == choice.lower() for choice in choices):
            raise UsageError(f"{name}: {value!r} is none of {choices}", "")


def missing_options(arguments: list[str]) -> list[str]:
    """Return options of `python -m MODULE ...` that neither occur in the module nor come from the fields of a recipe."""
    name, *rest = arguments
    path = ROOT / name.replace(".", "/")
    source = next(file for file in (path.with_suffix(".py"), path / "__main__.py") if file.exists())
    own = rest[: rest.index("--")] if "--" in rest else rest
    known = source.read_text("utf-8")
    if "recipe_parser(__doc__, ScenesRecipe())" in known:
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
    ("line", "says"),
    [
        ("guess clip.mp4", "no command"),
        ("ask a.mp4 Who? --no-such-option", "No such option"),
        ("ask a.mp4 Who? --decoder ffmpeg", "'ffmpeg' is none of"),
        ("eval --data FILE --method evoprune,nothing-like-it", "unknown pruning method"),
        ("eval --data FILE --processes N --method evoprune,reuse+divprune:x=1", None),
    ],
)
def test_a_wrong_command_is_found(line, says):
    ((*given,),) = commands(f"$ ls | xargs .venv/bin/evoprune {line}  # a comment", "evoprune")
    found = problem(given)
    assert found is None if says is None else says in found


def test_the_page_about_python_has_every_public_name():
    """The page is generated from the signatures and docstrings, which don't mention files inside the package."""
    page = python_docs.page()
    assert (ROOT / "docs/python.md").read_text(encoding="utf-8") == page, (
        "python -m experiments.python_docs > docs/python.md"
    )
    assert re.findall(r"^## (\w+)$", page, re.M) == list(python_docs.EXAMPLES)
    assert sorted(python_docs.EXAMPLES) == sorted(evoprune.__all__)
    body = page.partition("\n## ")[2]
    assert not re.search(r"\w\.py\b", body)
    for example in python_docs.EXAMPLES.values():
        compile(example, "example", "exec")
