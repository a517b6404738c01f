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


def check(command: str, folder: Path, count: int) -> None:
    """Signals at so many moments, and whole runs: those that nobody disturbed, and those that went on where one was cut short."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.cli.interrupts", command, str(folder), str(count)],
        cwd=ROOT,
        env={k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")} | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stderr.decode()
    runs = [json.loads(line) for line in done.stdout.splitlines()]
    for run in runs:
        assert run["code"] == CODES[run["signal"]] and run["moment"] in (None, run["moments"]), run
        check_end(run)
    for how in SIGNALS:
        assert len({run["moment"] for run in runs if run["signal"] == how}) == count
    whole = [Path(run["folder"]) for run in runs if run["signal"] is None]
    assert len(whole) == (1 if command == "ask" else 3)
    if command in RECORDS:
        lines = [len((folder / RECORDS[command]).read_bytes().splitlines()) for folder in whole]
        assert lines == lines[:1] * 3 and lines[0] > 3


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


@pytest.mark.full
@pytest.mark.parametrize("command", COMMANDS)
def test_signals_at_two_moments(tmp_path, command):
    check(command, tmp_path, 2)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_signals_at_a_hundred_moments(tmp_path, command):
    check(command, tmp_path, 100)


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


@pytest.mark.few(2)
@pytest.mark.parametrize("then_s", [60, 0])  # a command that would go on, and one that ends there
@pytest.mark.parametrize("how", SIGNALS)
def test_a_signal_where_nothing_can_be_raised(how, then_s):
    program = "import signal; signal.signal(2, signal.default_int_handler)\n" + LOST
    command = [sys.executable, "-c", program, how, str(then_s)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=50)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.Signals[how], b"", b"")  # `run` alone
