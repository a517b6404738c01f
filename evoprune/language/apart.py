"""Work on what comes from an untrusted source, in a process of its own under limits, which is ended if need be."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import evoprune

PATIENCE_S = 60.0  # for the whole process, which is the only limit if the system is no Unix
MEMORY_BYTES = 2**29
# Not in a program that was frozen into one file: its executable is no Python.
POSSIBLE = bool(sys.executable) and not hasattr(sys, "frozen")


def apart(work: Callable[[str], Any], request: str, seconds: int, needs: str, stack_bytes: int | None = None) -> Any:
    """Return what a function of a module makes of a text, as plain data for JSON. Where no process is possible, it works here.

    Args:
        seconds: limit on CPU time and on the clock, after `needs`, the modules that the function imports, are imported.
        stack_bytes: what the function may use of the stack; None for what the system gives.

    Raises:
        ValueError: it takes too much time or memory; the message says so.
        OSError: no process can be started.
    """
    if not POSSIBLE:
        return work(request)
    # As the processes that read videos: an editable install is found by a hook that they do not have.
    paths = [*map(os.path.abspath, sys.path), str(Path(evoprune.__file__).parents[1])]
    program = (
        f"import sys; sys.path[:] = {list(dict.fromkeys(paths))}; import {needs}; from evoprune.language import apart; "
        f"from {work.__module__} import {work.__name__}; apart.main({work.__name__}, {seconds}, {stack_bytes})"
    )
    try:
        done = subprocess.run(  # noqa: S603 (this Python, and a program of our own)
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", program],
            input=request.encode(),
            capture_output=True,
            timeout=PATIENCE_S,
            check=False,
            start_new_session=True,  # Ctrl-C is for this process
        )
    except subprocess.TimeoutExpired as problem:
        raise ValueError("it does not come to an end") from problem
    with suppress(ValueError):
        return json.loads(done.stdout)
    if done.returncode < 0:  # by a signal: of the limit on CPU time, of the one on the stack, or of the system
        raise ValueError(f"it does not come to an end within {seconds} s, or takes too much memory")
    said = done.stderr.decode(errors="replace")[-2000:]
    raise RuntimeError(f"the process of {work.__module__} failed: {said}")


def main(work: Callable[[str], Any], seconds: int, stack_bytes: int | None) -> None:
    """Runs the other process: reads a request from stdin, writes an answer to stdout, under limits where there are any."""
    request = sys.stdin.read()
    with suppress(ImportError):  # not a Unix
        import resource

        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        limits = [
            (resource.RLIMIT_CPU, int(used) + seconds),
            (resource.RLIMIT_AS, MEMORY_BYTES),
            (resource.RLIMIT_CORE, 0),
        ]
        if stack_bytes is not None:
            limits.append((resource.RLIMIT_STACK, stack_bytes))
        for kind, limit in limits:
            _, hard = resource.getrlimit(kind)
            if hard != resource.RLIM_INFINITY:
                limit = min(limit, hard)
            with suppress(OSError, ValueError):
                resource.setrlimit(kind, (limit, limit))
        # On a busy machine a process gets less CPU time than the clock says.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    print(json.dumps(work(request)), flush=True)
