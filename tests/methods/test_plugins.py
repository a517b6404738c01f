"""Methods of other packages, by entry points of a distribution that is made up for the test."""

import json
import subprocess
import sys

import pytest

from evoprune import methods
from evoprune.errors import UsageError

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
    (tmp_path / "extra_methods.py").write_text(MODULE)
    facts = tmp_path / "extra_methods-1.2.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: extra-methods\nVersion: 1.2\n")
    (facts / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)
    _forget()
    yield tmp_path
    _forget()
    sys.modules.pop("extra_methods", None)


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


def test_every_command_knows_them(package):
    def evoprune(*args):
        code = f"import sys; sys.path.insert(0, {str(package)!r}); from evoprune_cli.main import run; run()"
        return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)

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
