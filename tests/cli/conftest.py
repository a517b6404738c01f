"""Runs the command line inside this process, so that a test costs no import of torch."""

import functools
import io
import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import typer.main

from evoprune_cli.main import run
from tests.cli.screen import Screen
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny

# Typer makes the parser of every command anew for every call.
typer.main.get_command = functools.cache(typer.main.get_command)


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def record(self) -> dict:
        """The one JSON line on stdout."""
        assert self.out.endswith("\n") and self.out.count("\n") == 1, self.out
        return json.loads(self.out)


class Stdin(io.StringIO):
    """Standard input that is, or is not, a terminal; fails the test if it is read though it must not be."""

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
    """What the program sets for its process becomes what it was."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hooks, threads = (sys.excepthook, sys.unraisablehook), torch.get_num_threads()
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = hooks
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def the_process_is_restored():
    with restored():
        yield


@pytest.fixture
def cli(monkeypatch, capfd):
    """`cli("ask", ..., stdin="text")`: exit code, stdout, stderr. Without `stdin`, reading it fails the test.

    `terminal`: stdin is one. `columns`: stderr is a terminal that wide. `encoding`: of stdout and stderr.
    """
    for name in ("EVOPRUNE_MODEL", "EVOPRUNE_BUDGET", "EVOPRUNE_DEBUG", "NO_COLOR", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")

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
