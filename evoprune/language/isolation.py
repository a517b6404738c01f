"""Run work on untrusted input in a separate process with CPU, memory and time limits."""

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

TIMEOUT_S = 60.0  # timeout of the whole process; the only limit on systems other than Unix
MEMORY_BYTES = 2**29
# False in a program that was frozen into one file, because its executable is not a Python interpreter.
POSSIBLE = bool(sys.executable) and not hasattr(sys, "frozen")


def run_isolated(
    work: Callable[[str], Any], request: str, seconds: int, needs: str, stack_bytes: int | None = None
) -> Any:
    """Return `work(request)`, computed in a separate process, or in this one if `POSSIBLE` is False.

    Args:
        work: A module-level function. Its result must be serializable as JSON.
        request: The string that is passed to `work`.
        seconds: Limit on both CPU time and wall-clock time. The import of `needs` does not count.
        needs: Comma-separated modules that `work` uses, imported before the limits are set.
        stack_bytes: Limit on the stack size; None for the system's default.

    Raises:
        ValueError: If the function exceeds the time or memory limit. The error message says so.
        RuntimeError: If the process failed for another reason.
        OSError: If no process can be started.
    """
    if not POSSIBLE:
        return work(request)
    # Pass all paths, as for the processes that read videos, because -S skips the import hook that finds an editable install.
    paths = [*map(os.path.abspath, sys.path), str(Path(evoprune.__file__).parents[1])]
    program = (
        f"import sys; sys.path[:] = {list(dict.fromkeys(paths))}; import {needs}; from evoprune.language import isolation; "
        f"from {work.__module__} import {work.__name__}; isolation.main({work.__name__}, {seconds}, {stack_bytes})"
    )
    try:
        done = subprocess.run(  # noqa: S603 (this Python, and a program of our own)
            [sys.executable, "-I", "-S", "-X", "utf8", "-c", program],
            input=request.encode(),
            capture_output=True,
            timeout=TIMEOUT_S,
            check=False,
            start_new_session=True,  # Ctrl-C must reach only this process
        )
    except subprocess.TimeoutExpired as problem:
        raise ValueError("it does not finish") from problem
    with suppress(ValueError):
        return json.loads(done.stdout)
    if done.returncode < 0:  # killed by a signal: CPU limit, stack limit, timer or the system
        raise ValueError(f"it does not finish within {seconds} s, or takes too much memory")
    said = done.stderr.decode(errors="replace")[-2000:]
    raise RuntimeError(f"the process of {work.__module__} failed: {said}")


def main(work: Callable[[str], Any], seconds: int, stack_bytes: int | None) -> None:
    """Run `work` in the separate process: set limits if the system has any, read a request from stdin, and write JSON to stdout."""
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
        # The CPU limit alone is not enough: on a busy machine, a process gets less CPU time than wall-clock time.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    print(json.dumps(work(request)), flush=True)
