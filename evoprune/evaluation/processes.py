"""Jobs shared out over processes, each with a model of its own: a small model leaves most cores idle."""

import multiprocessing
import os
import signal
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from threading import Thread
from typing import Any

from evoprune.errors import PluginWarning

Work = Callable[[Any], list[dict]]

_work: Work  # of this process


def map_in_processes(start: Callable[[], Work], jobs: Iterable[Any], processes: int) -> Iterator[list[dict]]:
    """The results of all jobs, in the order of the jobs. Closing the iterator early kills the processes.

    Args:
        start: called once in each process; returns the function that does a job. It and the jobs are pickled.
        processes: how many.

    Raises:
        BrokenProcessPool: `start` raised in a process. Whatever a job raises.
    """
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (start,))
    try:
        # Not `pool.map`: it cancels what is left after a failure, and the thread that ends a broken pool fails on a cancelled job
        # (Python 3.11). That thread would neither end the other processes nor wait for them.
        for result in [pool.submit(_do, job) for job in jobs]:
            yield result.result()
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown()


def _begin(start: Callable[[], Work]) -> None:
    global _work
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    Thread(target=_end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore", PluginWarning)  # the parent has printed them
    _work = start()


def _end_with_parent() -> None:
    """Ends this process once its parent has ended, also where that was killed and could end nothing itself."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _do(job: Any) -> list[dict]:
    return _work(job)
