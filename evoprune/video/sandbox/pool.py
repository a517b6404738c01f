"""The worker processes that wait for their next video."""

import atexit
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from evoprune.errors import OutOfMemory
from evoprune.video.sandbox.process import WorkerProcess

# How many processes are kept for later videos.
MAX_IDLE = 2

_idle: list[WorkerProcess] = []
_lock = threading.Lock()


def start_idle() -> None:
    """Start a process unless one is idle, without waiting for it. If it cannot be started, `borrow` raises later."""
    if not _idle:
        with suppress(OSError), _lock:
            _idle.append(WorkerProcess())


def _take() -> WorkerProcess | None:
    """An idle process that is alive. What ended one that idled is not the next video's fault."""
    while True:
        with _lock:
            worker = _idle.pop() if _idle else None
        if worker is None or worker.alive():
            return worker
        worker.end()


@contextmanager
def borrow(path: str) -> Iterator[WorkerProcess]:
    """A process for one video, idle or new. It is kept afterwards unless a request is unanswered; then it is ended."""
    try:
        worker = _take() or WorkerProcess()
    except OSError as error:
        message = f"cannot start the process that reads videos: {error.strerror}"
        raise OutOfMemory(message, "close other programs", stage="read") from error
    worker.path = path
    try:
        yield worker
    finally:
        with _lock:
            kept = not worker.busy and len(_idle) < MAX_IDLE
            if kept:
                _idle.append(worker)
        if not kept:
            worker.end()


@atexit.register
def end_all() -> None:
    """End the idle processes. Borrowed ones end with this process."""
    with _lock:
        ended, _idle[:] = list(_idle), []
    for worker in ended:
        worker.end()


def _forget() -> None:
    """In a forked copy of this process: the workers belong to the original."""
    global _lock, _idle
    _lock, _idle = threading.Lock(), []


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
