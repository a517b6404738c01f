import signal
import subprocess
import sys

from experiments.speed import busy_machine
from experiments.speed.busy_machine import Asked


def test_tables(monkeypatch, capsys, tmp_path):
    """Twice the time beside busy processes, and three times the throughput at once."""
    calls = []

    def ask(code, *more):
        calls.append((code.name, more))
        return Asked(100.0 * (2 if running else 1), 200.0 * (2 if running else 1), 3.0, 1)

    running = []

    class Burner:
        def __init__(self, command):
            running.append(self)

        def kill(self):
            running.remove(self)

        def wait(self):
            pass

    monkeypatch.setattr(busy_machine, "ask", ask)
    monkeypatch.setattr(busy_machine, "available_cores", lambda: 2)
    monkeypatch.setattr(busy_machine, "seconds_of", lambda code, asks, at_once, *more: 12.0 if at_once == 1 else 4.0)
    monkeypatch.setattr(busy_machine.subprocess, "Popen", Burner)
    monkeypatch.setattr("sys.argv", ["busy_machine", "--repeat", "2", "--against", str(tmp_path)])
    busy_machine.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert rows[2] == "| this | 1 | 100 | 200 | 2.0x | 200 | 400 | 2.0x | 3.0 | 3.0 | 1.0x |"
    assert rows[-1] == f"| {tmp_path.name} | 1 | 12.0 | 4.0 | 3.00x |"
    assert len({line.count("|") for line in rows}) == 2 and not running
    assert [name for name, _ in calls[:4]] == [busy_machine.ROOT.name, tmp_path.name] * 2  # versions take turns


def test_busy_processes_end_when_the_one_that_started_them_is_killed():
    code = (
        "import os, signal\nfrom experiments.speed.busy_machine import busy_processes\n"
        "with busy_processes(1): os.kill(os.getpid(), signal.SIGKILL)"
    )
    # The busy process inherits the pipe, which is closed when both have ended.
    killed = [sys.executable, "-c", code]
    done = subprocess.run(killed, stdout=subprocess.PIPE, cwd=busy_machine.ROOT, timeout=100)
    assert done.returncode == -signal.SIGKILL
