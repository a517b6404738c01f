"""Run measurements in separate processes. When a process runs out of time, it is killed along with its children.

`Side` and `serve` are the two ends of a process that takes turns with other processes. Such a process waits while another process
works, reads each request as a line of JSON, and answers with a line of JSON.
"""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class Sampler:
    """Calls `sample` every `seconds` in a thread during a `with` block, and once more at its end."""

    def __init__(self, seconds: float):
        self._seconds = seconds
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *problem) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        ended = False
        while not ended:
            ended = self._ended.wait(self._seconds)
            self.sample()

    def sample(self) -> None:
        """Take a measurement."""
        raise NotImplementedError


class Side:
    """A process that is started by its first request and restarted by the next request if it has exited.

    Its stderr is written to a file.
    """

    def __init__(self, command: Sequence[str], log: Path):
        self._command = [*command]
        self._log = log
        self._process: subprocess.Popen | None = None
        self._lines: queue.Queue[str | None] = queue.Queue()

    @property
    def running(self) -> bool:
        return self._process is not None

    def ask(self, request: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Send a request, and return the answer, or `{"error": text}` if the process exits or does not answer within `seconds`."""
        if seconds <= 0:
            return {"error": "not started: no time was left"}
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._lines.get(timeout=seconds)
        except queue.Empty:
            self.end(kill=True)
            return {"error": f"not done in {seconds:.0f} s", "over_s": seconds}
        except BrokenPipeError:
            line = None
        if line is None:
            code = self.end()
            return {"error": f"ended with {code}: {last_line(self._log)}"}
        return json.loads(line)

    def end(self, kill: bool = False) -> int | None:
        """Terminate the process and its children. Returns the exit code, or None if the process is not running."""
        if self._process is None:
            return None
        process = self._process
        self._process = None
        if not kill:
            try:
                process.stdin.close()
                process.wait(5)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                kill = True
        if kill:
            end_group(process.pid)
        return process.wait()

    def _start(self) -> None:
        self._lines = queue.Queue()
        with self._log.open("a", encoding="utf-8") as log:
            self._process = subprocess.Popen(  # noqa: S603 (Python, and a module of ours)
                self._command,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        threading.Thread(target=_forward, args=(self._process.stdout, self._lines), daemon=True).start()


def _forward(lines, into: queue.Queue) -> None:
    """Put lines into a queue as they arrive, followed by None at end of file."""
    for line in lines:
        into.put(line)
    into.put(None)


def serve(make: Callable[[], Callable[[dict[str, Any]], dict[str, Any]]]) -> None:
    """Answer the requests on stdin, one per line, until end of file.

    Library output to stdout is redirected to stderr.

    Args:
        make: A function that is called on the first request and returns the function that answers requests. If either function
            raises an exception, the answer is an error.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    answer = None
    for line in sys.stdin:
        try:
            answer = answer or make()
            said = answer(json.loads(line))
        except Exception as problem:  # libraries may raise any exception, and it is reported as the result
            said = {"error": f"{type(problem).__name__}: {problem}".strip()[:300]}
        print(json.dumps(said), file=answers, flush=True)


def run_process(arguments: Sequence[str], log: Path, seconds: float, environment: dict[str, str] | None = None) -> str:
    """Run Python and write its output to a file.

    Returns:
        "done", "stopped" if the time limit was exceeded, or "exit code N".
    """
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(  # noqa: S603 (this Python)
            [sys.executable, *arguments],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(max(seconds, 0.1))
        except subprocess.TimeoutExpired:
            return "stopped"
        finally:
            end_group(process.pid)
            process.wait()
    return f"exit code {code}" if code else "done"


def end_group(number: int) -> None:
    """Kill a session leader along with the processes that it started."""
    try:
        os.killpg(number, signal.SIGKILL)
    except ProcessLookupError:
        return


def last_line(log: Path) -> str:
    """Return the last non-empty line of a file. If the file ends with a traceback, this is the error message."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else "it said nothing"


def limits_of(text: str, usual: dict[str, float]) -> dict[str, float]:
    """Return the time limit of each part in seconds: the defaults in `usual`, overridden by `text`, such as "table=300,first=60".

    Raises:
        ValueError: If there is no such part, or the time is not a number.
    """
    made = dict(usual)
    for each in filter(None, text.split(",")):
        name, _, number = each.partition("=")
        if name not in made:
            raise ValueError(f"no part {name!r}")
        made[name] = float(number)
    return made
