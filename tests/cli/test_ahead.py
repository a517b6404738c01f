"""Commands read inputs while the model loads, with the same results, errors and exit codes, and without leftovers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evoprune.session import ReadAhead, encoding

SQUARE, THREE = "samples/square.mp4", "samples/three.mp4"
ASK = ["ask", SQUARE, "What colour is the square?"]
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def no_thread_stays():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name == "evoprune-reading"]


@pytest.fixture
def made(monkeypatch):
    """Every `ReadAhead`, and the paths that the encoder reads itself."""
    begun, anew, begin, read = [], [], ReadAhead.__init__, encoding.read_chunks

    def noted(self, *how):
        begin(self, *how)
        begun.append(self)

    def read_chunks(info, *args, **how):
        anew.append(info.path)
        return read(info, *args, **how)

    monkeypatch.setattr(ReadAhead, "__init__", noted)
    monkeypatch.setattr(encoding, "read_chunks", read_chunks)
    return begun, anew


@pytest.fixture
def without(monkeypatch):
    """A function that turns off reading ahead from then on."""
    begin = ReadAhead.__init__
    return lambda: monkeypatch.setattr(
        ReadAhead, "__init__", lambda self, model, asked, *how: begin(self, model, [], *how)
    )


@pytest.fixture
def slowly(made, monkeypatch):
    """Models load only once frames are waiting. The list has the number of waiting frames per load."""
    from evoprune.bench import eval as evaluation
    from evoprune.bench import tune
    from evoprune.session import session

    begun, _ = made
    waited = []
    for place in (session, evaluation, tune):
        real = place.load_model

        def load_model(*args, real=real, **how):
            until = time.monotonic() + 20
            while not begun[-1].held_bytes and time.monotonic() < until:
                time.sleep(0.005)
            waited.append(begun[-1].held_bytes)
            return real(*args, **how)

        monkeypatch.setattr(place, "load_model", load_model)
    return waited


QUICK = ["-m", "demo", "--frames", "4"]
COMMANDS = {
    "ask": [*ASK, "--json"],
    "ask, several": ["ask", THREE, SQUARE, "What colour is the square?", "-q"],
    "batch": ["batch", SQUARE, THREE, "-Q", "What happens?", "-n", "2", *QUICK, "-o", "-"],
    "eval": ["eval", "--data", "samples/questions.jsonl", "--limit", "2", "-b", "0.5", "--method", "random", *QUICK],
    "tune": ["tune", SQUARE, "-Q", "What?", "-b", "0.25", "--time-limit", "5", *QUICK],
}


@pytest.mark.few(2)
@pytest.mark.parametrize("command", COMMANDS)
def test_frames_wait_before_the_model_is_loaded_and_are_used(cli, made, slowly, command):
    done = cli(*COMMANDS[command])
    assert done.code in (0, 6), done.err
    assert slowly and slowly[0] > 0
    first = SQUARE if command == "tune" else None
    assert made[1] == [] or (first and set(made[1]) == {first})  # tune rereads it to repeat its warm-up


def test_answers_are_those_without(cli, without):
    told = [json.loads(cli(*ASK, "--json").out)]
    without()
    told.append(json.loads(cli(*ASK, "--json").out))
    for record in told:
        for name in ("id", "created_utc", "time_ms", "rate", "memory"):
            del record[name]
        del record["inputs"][0]["time_ms"]
    assert told[0] == told[1]


def test_standard_input_is_read_ahead(cli, made):
    done = cli("ask", "-", "What colour is the square?", "-q", stdin=Path(SQUARE).read_bytes())
    assert (done.code, done.out) == (0, "green\n") and made[1] == []


def test_with_a_cache_nothing_is_read_ahead(cli, made, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("evoprune.session.ahead.read_chunks", lambda *_, **how: pytest.fail("read ahead"))
    for _ in range(2):
        assert cli(*ASK, "--cache", "-q").code == 0
    assert made[1] == [SQUARE]  # only by the first run


WRONG = {
    "model": ([*ASK, "-m", "./none"], 4),
    "folder": ([*ASK, "-m", "samples"], 4),
    "method": ([*ASK, "--method", "nothing-like-it"], 2),
    "setting": ([*ASK, "--method", "evoprune:alpha=-1"], 2),
    "missing": (["ask", "gone.mp4", "What?"], 3),
    "no video": (["ask", "README.md", "What?"], 3),
    "span": ([*ASK, "--start", "1:00"], 3),
    "engine": ([*ASK, "--device", "cuda:7"], 2),
    "batch": (["batch", SQUARE, "-Q", "What?", "-m", "./none", "-o", "-"], 4),
    "eval": (["eval", "--data", "samples/questions.jsonl", "-m", "./none"], 4),
    "tune": (["tune", SQUARE, "-m", "./none"], 4),
}


@pytest.mark.few(2)
@pytest.mark.parametrize("case", WRONG)
def test_errors_are_those_without(cli, without, case):
    words, code = WRONG[case]
    told = [cli(*words)]
    without()
    told.append(cli(*words))
    assert len({(each.code, each.out, each.err) for each in told}) == 1
    assert told[0].code == code


def test_ctrl_c_while_a_model_is_loaded(cli, made, monkeypatch):
    def interrupted(*args, **how):
        until = time.monotonic() + 20
        while not made[0][-1].held_bytes and time.monotonic() < until:
            time.sleep(0.005)
        raise KeyboardInterrupt

    monkeypatch.setattr("evoprune_cli.ask.load", interrupted)
    done = cli(*ASK)
    assert done.code == 130 and done.out == ""
    assert made[0][0].held_bytes == 0


SLOW = """
import sys, time
import evoprune_cli.ask
from evoprune.session.ahead import ReadAhead
begin = ReadAhead.__init__

def noted(self, *how):
    begin(self, *how)
    evoprune_cli.ask.ahead = self

def load(*_, **__):
    while not evoprune_cli.ask.ahead.held_bytes:
        time.sleep(0.01)
    assert "torch" not in sys.modules
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)

ReadAhead.__init__, evoprune_cli.ask.load = noted, load
from evoprune_cli.main import run
sys.argv[1:] = ["ask", "samples/square.mp4", "What?"]
run()
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_model_is_loaded_ends_it_at_once_and_all_of_it(number):
    mark = f"EVOPRUNE_MARK={os.getpid()}-{number}"
    environment = os.environ | dict([mark.split("=")])
    with subprocess.Popen([sys.executable, "-c", SLOW], cwd=ROOT, env=environment, stderr=subprocess.PIPE) as run:
        while (line := run.stderr.readline()) and b"waiting" not in line:
            pass
        assert line
        start = time.monotonic()
        run.send_signal(number)
        assert run.wait(20) == 128 + number
        assert time.monotonic() - start < 10
    until = time.monotonic() + 10
    while left := [pid for pid in os.listdir("/proc") if pid.isdigit() and mark.encode() in _environment(pid)]:
        assert time.monotonic() < until, left
        time.sleep(0.05)


def _environment(pid: str) -> bytes:
    try:
        return Path("/proc", pid, "environ").read_bytes()
    except OSError:  # it has ended, or belongs to another user
        return b""
