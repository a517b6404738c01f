"""Parallel evaluation in several processes with one model each, because one process leaves most cores idle with small models."""

import multiprocessing
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from evoprune.backend import Host, keep_freed_memory
from evoprune.errors import EvopruneError, EvopruneWarning, OutOfMemory, process_error

Work = Callable[[Any], list[dict]]

_work: Work | Exception  # the function that runs this process's jobs, or the exception raised by `start`


def map_in_processes(start: Callable[[], Work], jobs: Iterable[Any], processes: int) -> Iterator[list[dict]]:
    """Run jobs in several processes, and yield their results in order. Closing the iterator early kills the processes.

    Exceptions raised by `start` or by a job are re-raised.

    Args:
        start: A function that is called once in each process and returns the function that runs a job. `start` and the jobs must be
            picklable.
        jobs: The arguments for the function that runs a job.

    Raises:
        OutOfMemory: If the system ran out of memory and killed a process.
        EvopruneError: If a process crashed or was killed.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads don't survive a fork
    others = set(multiprocessing.active_children())
    killed = Host().oom_kills()
    pool = ProcessPoolExecutor(processes, context, _begin, (start,))
    try:
        # `pool.map` is not an option, because it cancels the remaining jobs after a failure. In Python 3.11, the thread that cleans
        # up a broken pool crashes if a job was canceled, leaving the other processes neither terminated nor joined.
        try:
            results = [pool.submit(_do, job) for job in jobs]
        except OSError as problem:
            raise process_error("start another process", problem) from problem
        for result in results:
            yield result.result()
    except BaseException as problem:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        if not isinstance(problem, BrokenProcessPool):
            raise
        if Host().oom_kills() > killed:
            hint = "use fewer processes (--processes) or a smaller model"
            raise OutOfMemory(f"out of memory: the system killed one of {processes} processes", hint) from problem
        hint = "a run with one process (--processes 1) shows more"
        raise EvopruneError(f"one of {processes} processes crashed or was killed", hint) from problem
    finally:
        pool.shutdown()


def _begin(start: Callable[[], Work]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    sys.stdout = sys.stderr  # the parent prints answers to stdout
    Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", EvopruneWarning)  # the parent has already shown these warnings
    keep_freed_memory()
    try:
        _work = start()
    except Exception as problem:  # if raised here, the pool would print a traceback and be marked as broken
        _work = problem


def _end_with_parent() -> None:
    """Exit this process as soon as its parent exits, even if the parent was killed and could not clean up."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do(job: Any) -> list[dict]:
    if isinstance(_work, Exception):
        raise _work
    return _work(job)
