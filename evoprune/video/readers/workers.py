"""Runs jobs in parallel threads and yields their results in job order, regardless of the number of threads."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import Generic, TypeVar

from evoprune.video.readers import ffmpeg

Job = TypeVar("Job")
Item = TypeVar("Item")
Tools = Callable[[], AbstractContextManager[Callable[[Job], Iterator[Item]]]]

POLL_S = 0.5  # interval at which the progress of all threads is checked


def in_order(jobs: Sequence[Job], tools: Tools, threads: int, room: int) -> Iterator[Item]:
    """Run jobs and yield their items in job order.

    If a job raises an exception, all items before it are yielded, the exception is raised, and the other jobs are stopped. Closing
    the iterator stops the threads.

    Args:
        tools: A function that returns a context manager, called once per thread. The thread enters the context before its first
            job. The context manager yields a function that takes a job and returns the job's items.
        threads: Maximum number of threads. If 1, the calling thread does the work itself whenever an item is requested.
        room: Maximum total number of finished items waiting to be yielded.
    """
    if threads > 1 and len(jobs) > 1:
        yield from _WorkerPool(jobs, tools, room).run(min(threads, len(jobs)))
        return
    with tools() as work:
        for job in jobs:
            yield from work(job)


class _Stopped(BaseException):
    """Raised inside worker threads after the consumer has closed the iterator."""


class _WorkerPool(Generic[Job, Item]):
    """A pool of threads that share a list of jobs. A single condition variable guards the shared state."""

    def __init__(self, jobs: Sequence[Job], tools: Tools, room: int):
        self._jobs = jobs
        self._tools = tools
        self._room = room
        self._changed = threading.Condition()
        self._taken = 0  # number of jobs that threads have taken
        self._head = 0  # index of the job whose items are yielded next
        self._made: list[deque[Item]] = [deque() for _ in jobs]  # each job's finished items waiting to be yielded
        # For each job, True if it is complete, or the exception raised by the job.
        self._ended: list[BaseException | bool] = [False] * len(jobs)
        self._waiting = 0  # total number of waiting items
        self._stopped = False
        self._busy: set[threading.Thread] = set()
        self._silent: set[threading.Thread] = set()  # busy threads without any progress since the last heartbeat

    def run(self, threads: int) -> Iterator[Item]:
        members = [threading.Thread(target=self._serve, name="evoprune-read", daemon=True) for _ in range(threads)]
        try:
            for member in members:
                member.start()
            for job in range(len(self._jobs)):
                while item := self._next(job):
                    yield item[0]
        finally:
            with self._changed:
                self._stopped = True
                self._changed.notify_all()
            for member in members:
                if member.ident is not None:  # the thread has been started
                    member.join()

    def _next(self, job: int) -> tuple[Item] | None:
        """Wait for a job's next item. Returns the item as a one-element tuple, or None if the job has no more items."""
        with self._changed:
            if job != self._head:
                self._head = job
                self._changed.notify_all()
            while not self._made[job] and not self._ended[job]:
                self._changed.wait(POLL_S)
                # Report progress only if every busy thread has made progress, so that no thread can hang unnoticed.
                if not self._silent:
                    ffmpeg.alive()
                    self._silent = set(self._busy)
            if self._made[job]:
                self._waiting -= 1
                self._changed.notify_all()
                return (self._made[job].popleft(),)
            if isinstance(problem := self._ended[job], BaseException):
                raise problem
            return None

    def _serve(self) -> None:
        ffmpeg.of_thread.alive = self._progress
        work = None
        with ExitStack() as stack:
            while (job := self._take()) is not None:
                end: BaseException | bool = True
                try:
                    work = work or stack.enter_context(self._tools())
                    for item in work(self._jobs[job]):
                        self._put(job, item)
                except _Stopped:
                    return
                except BaseException as problem:
                    end = problem
                with self._changed:
                    self._busy.discard(threading.current_thread())
                    self._silent.discard(threading.current_thread())
                    self._ended[job] = end
                    self._changed.notify_all()

    def _progress(self) -> None:
        if self._stopped:
            raise _Stopped
        self._silent.discard(threading.current_thread())

    def _take(self) -> int | None:
        with self._changed:
            if self._stopped or self._taken == len(self._jobs):
                return None
            self._busy.add(threading.current_thread())
            self._taken += 1
            return self._taken - 1

    def _put(self, job: int, item: Item) -> None:
        """Store a finished item. Blocks while the buffer is full, unless the consumer needs this item next."""
        me = threading.current_thread()
        with self._changed:
            self._busy.discard(me)
            self._silent.discard(me)
            while not self._stopped and not self._has_room(job):
                self._changed.wait()
            if self._stopped:
                raise _Stopped
            self._busy.add(me)
            self._made[job].append(item)
            self._waiting += 1
            self._changed.notify_all()

    def _has_room(self, job: int) -> bool:
        return self._waiting < self._room or (job == self._head and not self._made[job])
