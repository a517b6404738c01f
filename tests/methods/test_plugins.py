"""Methods of other packages, by entry points of a distribution that is made up for the test."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from evoprune import methods
from evoprune.errors import UsageError
from tests.methods.tokens import selected, tokens_of

MODULE = """
from dataclasses import dataclass
from typing import ClassVar
import torch
from evoprune.methods.base import Method

@dataclass(frozen=True)
class First(Method):
    "The first tokens of the video."
    name: ClassVar[str] = "first"
    acts: ClassVar[str] = "after"
    skip: int = 0

    def select(self, tokens, keep):
        return torch.arange(self.skip, self.skip + keep)
"""
ENTRIES = """[evoprune.methods]
first = extra_methods:First
absent = no_such_module:Thing
wrong = extra_methods:torch
random = extra_methods:First
with,comma = extra_methods:First
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder with an installed package that brings methods, on the path."""
    yield from _installed(tmp_path, monkeypatch, "extra_methods", MODULE, ENTRIES)


@pytest.fixture
def documented(tmp_path, monkeypatch):
    """The same with the package that docs/methods.md shows."""
    page = Path("docs/methods.md").read_text(encoding="utf-8")
    (module,) = re.findall(r"^```python\n# asked.py\n(.*?)^```", page, re.S | re.M)
    (entry,) = re.findall(r'^\[project\.entry-points\."evoprune\.methods"\]\nasked = "(.*)"$', page, re.M)
    assert module.count("\n") < 40
    yield from _installed(tmp_path, monkeypatch, "asked", module, f"[evoprune.methods]\nasked = {entry}\n")


def _installed(folder, monkeypatch, name, module, entries):
    (folder / f"{name}.py").write_text(module)
    facts = folder / f"{name}-1.2.dist-info"
    facts.mkdir()
    title = name.replace("_", "-")
    (facts / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {title}\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(entries)
    monkeypatch.syspath_prepend(folder)
    _forget()
    yield folder
    _forget()
    sys.modules.pop(name, None)


def _forget():
    methods._entry_points.cache_clear()
    methods._plugins.cache_clear()


def test_they_are_listed_after_the_built_in_ones_and_loaded_when_chosen(package):
    assert methods.available()[-3:] == ["absent", "first", "wrong"] and methods.available().count("random") == 1
    assert "extra_methods" not in sys.modules
    made = methods.get("first", {"skip": "2"})
    assert made.name == "first" and made.skip == 2
    with pytest.raises(UsageError, match="no argument 'skipp'"):
        methods.get("first", {"skipp": "2"})


def test_a_built_in_name_cannot_be_taken(package):
    assert type(methods.get("random")).__module__ == "evoprune.methods.random"


@pytest.mark.parametrize(("name", "says"), [("absent", "No module named"), ("wrong", "is not a Method")])
def test_a_broken_one_fails_only_when_it_is_chosen(package, name, says):
    with pytest.raises(UsageError, match=says) as caught:
        methods.get(name)
    assert "extra-methods 1.2" in caught.value.message and "uninstall" in caught.value.hint
    with pytest.raises(UsageError, match="no pruning method 'with,comma'"):
        methods.get("with,comma")


def test_what_inspect_says(package):
    told = methods.plugins()
    assert told["first"] == "of extra-methods 1.2"
    assert "broken" in told["absent"] and "broken" in told["wrong"]
    assert "ignored" in told["random"] and "ignored" in told["with,comma"]


def runner(folder):
    def evoprune(*args):
        code = f"import sys; sys.path.insert(0, {str(folder)!r}); from evoprune_cli.main import run; run()"
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)

    return evoprune


def test_what_the_documentation_shows_works(documented):
    """A method of under 40 lines that asks for attention and reads the question."""
    method = methods.get("asked:power=0")
    assert method.needs_after == {"attention"} and method.reads_question and method.power == 0
    asked = ("-Q", "What colour is the square?", "-Q", "Does anything move?")
    done = runner(documented)("ask", "samples/square.mp4", *asked, "--json", "-b", "0.25", "--method", "asked")
    records = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0 and [r["pruning"]["visual_tokens_kept"] for r in records] == [36, 36]
    tokens = tokens_of("random", (2, 4, 5))
    other = replace(tokens, given=tokens.given | {"question": -tokens.question})
    assert method.select(tokens, 9).tolist() != method.select(other, 9).tolist() != selected("asked", other, 9)


def test_every_command_knows_them(package):
    evoprune = runner(package)

    for command in ("ask", "profile"):
        text = " ".join(evoprune(command, "--help").stdout.split())
        assert "absent, first, wrong" in text
    asked = ("ask", "samples/square.mp4", "What colour is the square?", "--json", "-b", "0.25", "--method")
    done = evoprune(*asked, "first", "--method-arg", "skip=3")
    assert done.returncode == 0 and json.loads(done.stdout)["pruning"]["kept_per_grid"] == [21, 15, 0, 0, 0, 0]
    done = evoprune(*asked, "absent")
    assert done.returncode == 2 and "'absent' of extra-methods 1.2 cannot be loaded" in done.stderr
    done = evoprune("inspect")
    assert done.returncode == 0 and "broken: method 'absent'" in done.stdout
