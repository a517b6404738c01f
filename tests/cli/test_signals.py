"""Send SIGINT and SIGTERM at many moments of `ask`, `batch` and `eval`, and check exit codes, leftover processes and files.

`python -m tests.cli.test_signals ask|batch|eval FOLDER COUNT` performs the runs. A moment is a call of one of this program's
functions in the main thread. The first run counts the moments, and every other run gets a signal at one of COUNT evenly spread
moments. If the command can resume, the last of these runs is then resumed. Every run is a fork of this process, which has already
imported everything. The process prints one JSON object per run.
"""

import atexit
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cli.apart import records_of

# A run and its result.


CLIPS = ["samples/square.mp4", "samples/three.mp4"]
QUICK = ["-m", "demo", "-n", "2", "--frames", "4"]
EVAL = ["eval", "--data", "samples/questions.jsonl", "--limit", "2", "-b", "0.5", "--method", "random", *QUICK]
BATCH = ["batch", *CLIPS, "-Q", "What happens?", "-Q", "Why?", *QUICK, "-o", "{}/out.jsonl"]

COMMANDS = {
    "ask": (["ask", CLIPS[0], "What colour is the square?", "-Q", "Why?", *QUICK], None),
    "batch": (BATCH, [*BATCH, "--resume"]),
    "eval": ([*EVAL, "-o", "{}/run"], [*EVAL, "--resume", "{}/run"]),
}

SIGNALS = ("SIGINT", "SIGTERM")
MARK = "EVOPRUNE_MOMENT"  # in the environment of a run and the processes it starts
OURS = tuple(f"{Path(__file__).parents[2] / package}{os.sep}" for package in ("evoprune", "evoprune_cli"))


def main(command: str, folder: Path, count: int) -> None:
    import torch

    import evoprune_cli.main  # noqa: F401

    torch.set_num_threads(1)
    words, again = COMMANDS[command]
    moments = tell(run(folder / "whole", words))
    for how in SIGNALS:
        for number in range(count):
            place = folder / how / str(number)
            moment = moments * 97 * (2 * number + 1) // (200 * count)  # moments differ between runs
            tell(run(place, words, how, moment), how, moment)
        if again:
            tell(run(place, again))


def tell(found: dict, how: str | None = None, moment: int | None = None) -> int:
    print(json.dumps({"signal": how, "moment": moment} | found), flush=True)
    return found["moments"]


def run(folder: Path, words: list[str], how: str | None = None, moment: int = 0) -> dict:
    """Return the moments that passed before the signal, the exit code, the output, and the processes left over."""
    folder.mkdir(parents=True, exist_ok=True)
    end, start = os.pipe()
    os.environ[MARK] = str(folder)
    pid = os.fork()
    if pid == 0:
        copy(folder, [word.replace("{}", str(folder)) for word in words], how, moment, start)
    os.close(start)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with open(end) as file:
        said = file.read()
    err = (folder / "err").read_text()
    return {"folder": str(folder), "moments": int(said or 0), "code": code, "err": err, "left": left(str(folder))}


def copy(folder: Path, words: list[str], how: str | None, moment: int, counted: int) -> None:
    """Run the command and end this process."""
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["evoprune", *words]
    from evoprune_cli.__main__ import start

    moments, code = 0, 1

    def look(frame, event, _):
        nonlocal moments
        if event == "call" and frame.f_code.co_filename.startswith(OURS):
            moments += 1
            if moments == moment:
                sys.setprofile(None)
                os.kill(os.getpid(), signal.Signals[how])

    try:
        sys.setprofile(look)
        start()
    except SystemExit as stop:
        sys.setprofile(None)
        code = stop.code or 0
    finally:
        os.write(counted, str(moments).encode())
        atexit._run_exitfuncs()  # after an interruption, the last of them ends the process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def left(mark: str, patience_s: float = 20.0) -> list[str]:
    """Return the processes of a run that are still alive after a while."""
    until = time.monotonic() + patience_s
    while True:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={mark}\0".encode() in (place / "environ").read_bytes():
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:  # gone, or another user's
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


# The tests.


ROOT = Path(__file__).parents[2]
CODES = {None: 0, "SIGINT": -signal.SIGINT, "SIGTERM": 143}
RECORDS = {"batch": "out.jsonl", "eval": "run/samples.jsonl"}
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


def check(command: str, folder: Path, count: int) -> None:
    """Check signals at `count` moments, and the whole runs: undisturbed ones, and ones that were interrupted and resumed."""
    runs = records_of("tests.cli.test_signals", command, str(folder), str(count))
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
    """No process is left, no traceback is printed, and every file has whole lines or a whole document."""
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


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
