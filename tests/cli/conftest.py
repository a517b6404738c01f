"""Run the command line inside this process, so that tests do not import torch again."""

import fcntl
import functools
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import termios
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

from evoprune_cli import main
from evoprune_cli.main import run
from tests.cli.screen import Screen
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny
from tests.video.files import write_video

ROOT = Path(__file__).parents[2]

# Typer would rebuild the parser for every call.
typer.main.get_command = functools.cache(typer.main.get_command)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def record(self) -> dict:
        """The only JSON line on stdout."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class Stdin(io.StringIO):
    """Standard input, a terminal or not. Fails the test if it is read although it must not be."""

    def __init__(self, content: str | bytes | None, terminal: bool):
        super().__init__(content if isinstance(content, str) else "")
        self.readable_text, self.terminal = isinstance(content, str), terminal
        if isinstance(content, bytes):
            self.buffer = io.BytesIO(content)

    def isatty(self) -> bool:
        return self.terminal

    def read(self, *args) -> str:
        assert self.readable_text, "stdin was read"
        return super().read(*args)


@contextmanager
def restored():
    """Restore everything that the program sets for its process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    hook, threads = sys.excepthook, torch.get_num_threads()
    try:
        yield
    finally:
        sys.excepthook = hook
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def the_process_is_restored():
    with restored():
        yield


@pytest.fixture(autouse=True)
def the_users_cache_is_not_used(monkeypatch):
    """This comes before the fixtures of the test modules, some of which set a cache of their own."""
    monkeypatch.delenv("EVOPRUNE_CACHE_DIR", raising=False)


@pytest.fixture
def cli(monkeypatch, capfd):
    """A function that runs a command, as in `cli("ask", ..., stdin="text")`, and returns exit code, stdout and stderr.

    Without `stdin`, a command that reads stdin fails the test. If `terminal` is True, stdin is a terminal. If `columns` is given,
    stderr is a terminal of that width. `encoding` is the encoding of stdout and stderr.
    """
    for name in ("EVOPRUNE_MODEL", "EVOPRUNE_BUDGET", "EVOPRUNE_DEBUG", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(main, "plugged", lambda: {})  # other packages with commands may be installed here

    def call(
        *args: str,
        stdin: str | bytes | None = None,
        terminal: bool = False,
        columns: int | None = None,
        encoding: str = "utf-8",
    ) -> Result:
        screen = Screen(columns) if columns else None
        capfd.readouterr()
        with (
            monkeypatch.context() as patch,
            open(1, "w", encoding=encoding, closefd=False) as out,
            open(screen.end if screen else os.dup(2), "w", encoding=encoding, errors="backslashreplace") as err,
        ):
            patch.setattr(sys, "argv", ["evoprune", *map(str, args)])
            patch.setattr(sys, "stdin", Stdin(stdin, terminal))
            patch.setattr(sys, "stdout", out)
            patch.setattr(sys, "stderr", err)
            with pytest.raises(SystemExit) as stop:
                run()
        written = screen.finish() if screen else None
        out, err = capfd.readouterr()
        if screen:
            assert err == ""
            err = written
        return Result(stop.value.code or 0, out, err)

    with restored():
        yield call


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model with random weights in the hub's file layout."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="session")
def endless(tiny_folder, tmp_path_factory):
    """A model that never ends its turn."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": []}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def keyboard():
    """`keyboard(*args, stdout)` runs the command at its own terminal, and returns its screen and its process."""
    started = []

    def at_it():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def start(*args, stdout=subprocess.PIPE):
        screen = Screen(100)
        process = subprocess.Popen(
            [sys.executable, "-m", "evoprune_cli", *map(str, args)],
            bufsize=0,  # unbuffered, so that the pipe holds everything there is to read
            stdin=screen.end,
            stdout=screen.end if stdout is None else stdout,
            stderr=screen.end,
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")}
            | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"},
            start_new_session=True,
            preexec_fn=at_it,
        )
        os.close(screen.end)
        started.append(process)
        return screen, process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def photo(tmp_path):
    Image.effect_mandelbrot((150, 90), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.fixture(scope="session")
def foreign(tmp_path_factory):
    """A clip of noise, unknown to the demo models."""
    noise = np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8)
    return write_video(tmp_path_factory.mktemp("foreign") / "foreign.mp4", noise, fps=6)
