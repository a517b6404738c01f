"""Process untrusted input in a separate process, with limits on CPU time, wall-clock time, and memory."""

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
from evoprune.untrusted import worker_environment

TIMEOUT_S = 60.0  # timeout for the entire process, which is the only limit on non-Unix systems
MEMORY_BYTES = 2**29
# Whether a separate process can be started. False in programs frozen into a single file, because their executable isn't a Python
# interpreter.
POSSIBLE = bool(sys.executable) and not hasattr(sys, "frozen")


def run_isolated(
    work: Callable[[str], Any], request: str, seconds: int, needs: str, stack_bytes: int | None = None
) -> Any:
    """Call `work(request)` in a separate process with resource limits, and return its result.

    If `POSSIBLE` is False, the function runs in the current process instead.

    Args:
        work: A module-level function whose result can be serialized to JSON.
        request: The string to pass to `work`.
        seconds: Limit on both the CPU time and the wall-clock time of `work`, excluding the time to import `needs`.
        needs: Comma-separated names of modules used by `work`, which are imported before the limits apply.
        stack_bytes: Limit on the stack size. None means the system default.

    Raises:
        ValueError: If `work` exceeds the time or memory limit.
        RuntimeError: If the process fails for another reason.
        OSError: If the process cannot be started.
    """
    if not POSSIBLE:
        return work(request)
    # Pass all import paths, because -S disables the import hook for editable installs. The worker processes for reading videos do
    # the same.
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
            env=worker_environment(),
            start_new_session=True,  # so that Ctrl-C interrupts only the parent process
        )
    except subprocess.TimeoutExpired as problem:
        raise ValueError("it does not finish") from problem
    with suppress(ValueError):
        return json.loads(done.stdout)
    if done.returncode < 0:  # killed by a signal from a limit, the timer, or the system
        raise ValueError(f"it does not finish within {seconds} s, or takes too much memory")
    said = done.stderr.decode(errors="replace")[-2000:]
    raise RuntimeError(f"the process of {work.__module__} failed: {said}")


def main(work: Callable[[str], Any], seconds: int, stack_bytes: int | None) -> None:
    """Read a request from stdin, call `work` with resource limits, and write its result to stdout as JSON.

    This is the main function of the separate process. On non-Unix systems, it doesn't set any limits.
    """
    request = sys.stdin.read()
    if sys.platform != "win32":
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
        # Limit the wall-clock time as well, because on a busy machine a process gets less CPU time than wall-clock time
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds)
    print(json.dumps(work(request)), flush=True)
