"""An evaluation's videos shared out over processes, each with a model of its own: a small model leaves most cores idle."""

import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evoprune.evaluation.run import Evaluation, Settings

_evaluation: "Evaluation"  # of this process


def shown(settings: "Settings", jobs: Iterable[Any], folder: str, processes: int) -> Iterator[list[dict]]:
    """The samples of each job, in the order of the jobs. Closed early, it kills the processes, which have nothing to lose.

    Args:
        settings: of the evaluation.
        jobs: what `Evaluation.show` takes.
        folder: for files that live as long as a video is shown.

    Raises:
        What loading or showing raises in a process.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (settings, folder, threads))
    try:
        yield from pool.map(_show, jobs)
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _begin(settings: "Settings", folder: str, threads: int) -> None:
    global _evaluation
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    import torch

    from evoprune.evaluation.run import Evaluation

    torch.set_num_threads(threads)
    _evaluation = Evaluation(settings, None)
    _evaluation.load()
    _evaluation.files = folder


def _show(job: Any) -> list[dict]:
    return _evaluation.show(job)
