"""What is printed, write by write."""

import io

from evoprune.report import Report
from evoprune_cli.terminal import print_json


class Writes(io.RawIOBase):
    """Notes each write that reaches the system."""

    def __init__(self):
        self.made = []

    def writable(self) -> bool:
        return True

    def write(self, content) -> int:
        self.made.append(bytes(content))
        return len(content)


def test_a_long_record_is_one_write(monkeypatch):
    """Processes that share a file, as under `xargs -P`, keep their lines whole."""
    raw = Writes()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(io.BufferedWriter(raw), encoding="utf-8"))
    print_json(Report(question="?" * 20_000))
    assert len(raw.made) == 1 and raw.made[0].endswith(b"}\n")
