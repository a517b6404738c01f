"""Distributes jobs over processes that each have their own model, because a small model leaves most cores idle."""

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

_work: Work | Exception  # of this process, or the exception from its start


def map_in_processes(start: Callable[[], Work], jobs: Iterable[Any], processes: int) -> Iterator[list[dict]]:
    """Run jobs in several processes and yield their results in order. Closing the iterator early kills the processes.

    Args:
        start: called once in each process. It returns the function that runs a job. `start` and the jobs are pickled.

    Raises:
        OutOfMemory: memory ran out.
        EvopruneError: a process crashed or was killed.

    The exceptions of `start` and of jobs are raised as well.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    others = set(multiprocessing.active_children())
    killed = Host().oom_kills()
    pool = ProcessPoolExecutor(processes, context, _begin, (start,))
    try:
        # Not `pool.map`: it cancels the remaining jobs after a failure, and in Python 3.11 the thread that cleans up a broken pool
        # fails on a cancelled job. The other processes would then neither be ended nor waited for.
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
    warnings.simplefilter("ignore", EvopruneWarning)  # the parent has already printed them
    keep_freed_memory()
    try:
        _work = start()
    except Exception as problem:  # if it were raised here, the pool would print a traceback and report a broken pool
        _work = problem


def _end_with_parent() -> None:
    """End this process when its parent has ended, even if the parent was killed and could not clean up."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do(job: Any) -> list[dict]:
    if isinstance(_work, Exception):
        raise _work
    return _work(job)
