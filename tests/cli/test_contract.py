"""The contract of a command line in real processes: what goes to stdout, what to stderr, with and without a terminal."""

import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLIP, QUESTION, ANSWER = "samples/square.mp4", "What colour is the square?", "green"
ESCAPE = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]")


def run(*args: str, columns: int | None = None, **env: str) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr; with `columns`, stderr is a terminal that wide."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_") and k != "NO_COLOR"} | env
    command = [sys.executable, "-m", "evoprune_cli", *args]
    if columns is None:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, cwd=ROOT, env=settings)
        return done.returncode, done.stdout, done.stderr
    ours, theirs = pty.openpty()
    settings |= {"COLUMNS": str(columns), "TERM": settings.get("TERM", "xterm")}
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=theirs, cwd=ROOT, env=settings
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # Linux says so when the other end is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    out = process.stdout.read()
    return process.wait(), out, seen


@pytest.mark.parametrize(
    ("flags", "columns", "out", "err"),
    [
        ((), None, f"{ANSWER}\n", "first token"),
        (("-q",), None, f"{ANSWER}\n", None),
        (("--no-stats",), None, f"{ANSWER}\n", None),
        (("--json",), None, '"answer":"green"', None),
        (("--json", "--stats"), None, '"answer":"green"', "first token"),
        ((), 100, f"{ANSWER}\n", "first token"),
        (("-q",), 100, f"{ANSWER}\n", None),
    ],
)
def test_streams(flags, columns, out, err):
    code, stdout, stderr = run("ask", CLIP, QUESTION, *flags, columns=columns)
    assert code == 0 and out in stdout.decode()
    assert stdout.count(b"\n") == 1 and not ESCAPE.search(stdout)
    if err is None:
        assert ESCAPE.sub(b"", stderr).strip() == b""
    else:
        assert err in stderr.decode()
    if columns is None:
        assert not ESCAPE.search(stderr)


@pytest.mark.parametrize(("args", "code"), [(("ask", "no/such.mp4", QUESTION), 3), (("ask", CLIP, "a", "b"), 2)])
def test_errors_on_a_terminal(args, code):
    got, stdout, stderr = run(*args, columns=100)
    assert (got, stdout) == (code, b"") and ESCAPE.sub(b"", stderr).startswith(b"error:")


def test_colour_only_where_it_is_wanted():
    args = ("ask", "no/such.mp4", QUESTION)
    assert b"\x1b[31" in run(*args, columns=80)[2]
    assert not ESCAPE.search(run(*args, columns=80, NO_COLOR="1")[2])
    assert not ESCAPE.search(run(*args, columns=80, TERM="dumb")[2])


def test_narrow_terminal():
    _, _, stderr = run("ask", CLIP, QUESTION, columns=50, NO_COLOR="1")
    block = ESCAPE.sub(b"", stderr).decode().replace("\r", "")
    assert "first token" in block and "####" not in block


def test_a_terminal_that_knows_only_ascii(tmp_path):
    path = tmp_path / "grün.mp4"
    shutil.copy(ROOT / CLIP, path)
    code, stdout, stderr = run("ask", str(path), QUESTION, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert (code, stdout) == (0, f"{ANSWER}\n".encode())
    assert stderr.isascii() and b"gr??n.mp4" in stderr


def readme_blocks() -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.S | re.M)


@pytest.mark.parametrize("number", range(2, len(readme_blocks())))
def test_loops_of_the_readme(tmp_path, number):
    """Every shell block after the two that install, run as it stands in a folder that looks like an installed clone."""
    block = readme_blocks()[number]
    if "jq" in block and not shutil.which("jq"):
        pytest.skip("jq is not installed")
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    script = tmp_path / ".venv" / "bin" / "evoprune"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m evoprune_cli "$@"\n')
    script.chmod(0o755)
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    done = subprocess.run(["bash", "-e", "-o", "pipefail", "-c", block], cwd=tmp_path, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    written = "".join(path.read_text() for path in tmp_path.glob("*.jsonl")) + done.stdout.decode()
    clips = len(list((ROOT / "samples").glob("*.webm" if "webm" in block else "*.mp4")))
    assert len(written.splitlines()) == clips
