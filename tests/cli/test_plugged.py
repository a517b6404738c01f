"""Commands of other packages: entry points of the group `evoprune.commands`."""

import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from evoprune_cli import main

ROOT = Path(__file__).parents[2]
HELP = """
import sys
from importlib.metadata import EntryPoint
from typer.main import get_command
from evoprune_cli import main
sys.path.append("plugins/serve")
main.plugged = lambda: {"serve": EntryPoint("serve", "evoprune_serve:serve", main.COMMANDS)}
context = get_command(main.app).make_context("evoprune", [], resilient_parsing=True)
assert "Serve one or several models" in context.get_help()
assert not {"torch", "starlette", "uvicorn", "pydantic"} & {*sys.modules}
"""
COMMAND = '''
from evoprune_cli import options as opt

@opt.command(short="times")
def greet(*, name: opt.argument(str, "NAME", "Whom."), times: opt.option(int, "--times", "How often.") = 1) -> int:
    """Greet somebody."""
    print("hello " * times + name)
    return 6
'''


@pytest.fixture
def plug(monkeypatch, tmp_path):
    """A function that installs `greet` of a module with this content as a command."""

    def plug(name: str, content: str) -> None:
        (tmp_path / f"{name}.py").write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))
        entry = EntryPoint("greet", f"{name}:greet", main.COMMANDS)
        monkeypatch.setattr(main, "plugged", lambda: {"greet": entry})

    return plug


def test_a_command_of_another_package_is_one_of_evoprune(cli, plug):
    plug("greeting", COMMAND)
    assert "greet" in cli("--help").out and "Greet somebody." in cli("--help").out
    assert "--times" in cli("greet", "--help").out and "--debug" in cli("greet", "--help-all").out
    done = cli("greet", "Ann", "--times", "2")
    assert (done.code, done.err.strip()) == (6, "hello hello Ann")  # stdout is for answers
    assert cli("greet", "--tims").err.splitlines()[1] == "hint: did you mean --times? see evoprune greet --help-all"


BROKEN = {"missing": "import no_such_module", "ending": "raise SystemExit(3)", "wrong": "greet = 3"}


@pytest.mark.parametrize("name", BROKEN)
def test_one_that_cannot_be_loaded_is_none_and_warns(cli, plug, name):
    plug(f"broken_{name}", BROKEN[name])
    listed = cli("--help")
    assert listed.code == 0 and "greet" not in listed.out and "warning: the command greet of" in listed.err
    done = cli("greet")
    assert done.code == 2 and "error: no such command 'greet'" in done.err


def test_the_help_of_the_server_imports_neither_it_nor_torch():
    subprocess.run([sys.executable, "-c", HELP], check=True, cwd=ROOT)


def test_a_command_of_evoprune_is_not_replaced(monkeypatch):
    entries = [EntryPoint(name, "other:thing", main.COMMANDS) for name in ("ask", "own")]
    monkeypatch.setattr(main, "entry_points", lambda group: entries)
    main.plugged.cache_clear()
    try:
        assert [*main.plugged()] == ["own"]
    finally:
        main.plugged.cache_clear()
