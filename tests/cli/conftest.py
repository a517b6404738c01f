"""Runs the command line inside this process, so that a test costs no import of torch."""

import io
import json
import sys
from dataclasses import dataclass

import pytest

from evoprune_cli.main import run
from tests.tiny import save_tiny


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

    def __init__(self, text: str | None, terminal: bool):
        super().__init__(text or "")
        self.readable_text, self.terminal = text is not None, terminal

    def isatty(self) -> bool:
        return self.terminal

    def read(self, *args) -> str:
        assert self.readable_text, "stdin was read"
        return super().read(*args)


@pytest.fixture
def cli(monkeypatch, capfd):
    """`cli("ask", ..., stdin="text")`: exit code, stdout, stderr. Without `stdin`, reading it fails the test."""
    for name in ("EVOPRUNE_MODEL", "EVOPRUNE_BUDGET", "EVOPRUNE_DEBUG", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)

    def call(*args: str, stdin: str | None = None, terminal: bool = False) -> Result:
        monkeypatch.setattr(sys, "argv", ["evoprune", *map(str, args)])
        monkeypatch.setattr(sys, "stdin", Stdin(stdin, terminal))
        capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            run()
        out, err = capfd.readouterr()
        return Result(stop.value.code or 0, out, err)

    return call


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A tiny model with random weights in the hub's file layout."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")
