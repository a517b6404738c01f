"""SIGINT and SIGTERM at many moments of `ask`, `batch` and `eval`: the exit code is right, nobody is left, and files are whole."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.interrupts import COMMANDS, SIGNALS

ROOT = Path(__file__).parents[2]
CODES = {None: 0, "SIGINT": -signal.SIGINT, "SIGTERM": 143}
RECORDS = {"batch": "out.jsonl", "eval": "run/samples.jsonl"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def runs_of(folder: Path, count: int) -> list[dict]:
    """What `moments` tells of every run."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.interrupts", str(folder), str(count)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr.decode()
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    return runs_of(tmp_path_factory.mktemp("signals"), 3)


def check(runs: list[dict], command: str, how: str, count: int) -> None:
    mine = [run for run in runs if run["command"] == command and run["signal"] == how]
    assert len({run["moment"] for run in mine}) == count
    for run in mine:
        assert (run["code"], run["moments"]) == (CODES[how], run["moment"]), run
        check_end(run)


def check_end(run: dict) -> None:
    """Nobody is left, nothing strange is said, and every file holds whole lines or a whole document."""
    assert run["left"] == [] and "Traceback" not in run["err"] and "Exception ignored" not in run["err"], run
    for path in Path(run["folder"]).rglob("*"):
        assert path.suffix not in (".new", ".tmp"), path
        if path.suffix == ".jsonl":
            content = path.read_bytes()
            assert content[-1:] in (b"", b"\n") and all(map(json.loads, content.splitlines())), path
        elif path.suffix == ".json":
            json.loads(path.read_text())


def check_whole(runs: list[dict], command: str) -> None:
    """Runs that nobody disturbed, and those that went on where another was cut short."""
    mine = [run for run in runs if run["command"] == command and run["signal"] is None]
    assert len(mine) == (1 if command == "ask" else 3)
    for run in mine:
        assert run["code"] == 0, run
        check_end(run)
    if command in RECORDS:
        lines = [len((Path(run["folder"]) / RECORDS[command]).read_bytes().splitlines()) for run in mine]
        assert lines == lines[:1] * 3 and lines[0] > 3


@pytest.mark.parametrize("how", SIGNALS)
@pytest.mark.parametrize("command", COMMANDS)
def test_signals(few, command, how):
    check(few, command, how, 3)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_is_left_can_be_gone_on_with(few, command):
    check_whole(few, command)


LOST = """
import signal, sys, time
from evoprune_cli import main

def thrown_away():
    try:
        yield
    finally:
        signal.raise_signal(signal.Signals[sys.argv[1]])

def ask(**_):
    items = thrown_away()
    next(items)
    del items  # nothing that is raised now reaches anybody
    time.sleep(float(sys.argv[2]))
    return 0

main.app = ask
main.run()
"""


@pytest.mark.parametrize("then_s", [60, 0])  # a command that would go on, and one that ends there
@pytest.mark.parametrize("how", SIGNALS)
def test_a_signal_where_nothing_can_be_raised(how, then_s):
    program = "import signal; signal.signal(2, signal.default_int_handler)\n" + LOST
    command = [sys.executable, "-c", program, how, str(then_s)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.Signals[how], b"", b"")  # `run` alone


@pytest.mark.slow
def test_a_hundred_moments(tmp_path):
    runs = runs_of(tmp_path, 100)
    for command in COMMANDS:
        check_whole(runs, command)
        for how in SIGNALS:
            check(runs, command, how, 100)
