"""A worker thread that runs blocking jobs one at a time, so the event loop is never blocked."""

from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextvars import Context
from queue import SimpleQueue
from threading import Thread
from typing import Any, Self

from evoprune.video import Scope

END_S = 1.0  # how long to wait for the last job at shutdown, in seconds; clients kill the server after 2 s

Report = Callable[[float, str], None]


class Job:
    """A function that runs in a worker thread, together with its result and progress.

    Attributes:
        future: The function's result.
        progress: The completed fraction of the work, from 0 to 1 and never decreasing, and the name of the current step.
    """

    def __init__(self, work: Callable[[Report], Any]):
        self.future: Future = Future()
        self.progress = (0.0, "waiting for the model")
        self._work = work
        self._scope = Scope()

    def run(self) -> None:
        """Run the function in the current thread unless the job has been stopped."""
        if not self.future.set_running_or_notify_cancel():
            return
        self._scope.enter()
        try:
            self._report(0.0, "starting")
            self.future.set_result(self._work(self._report))
        except BaseException as problem:
            self.future.set_exception(problem)

    def stop(self) -> None:
        """Cancel the job if it is waiting. A running job fails the next time it reads a file or reports progress."""
        self.future.cancel()
        self._scope.stop()

    def _report(self, done: float, what: str) -> None:
        if self._scope.stopped:
            raise CancelledError
        self.progress = (max(done, self.progress[0]), what)


class Worker:
    """A thread that runs jobs in submission order. All jobs are stopped when the context ends."""

    def __init__(self) -> None:
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._unfinished: list[Job] = []
        self._thread = Thread(target=self._run, name="evoprune-mcp", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for job in list(self._unfinished):
            job.stop()
        self._jobs.put(None)
        self._thread.join(END_S)

    @property
    def busy(self) -> bool:
        """Whether the thread is still running. A job may outlive the context because model loading can't be interrupted."""
        return self._thread.is_alive()

    def submit(self, work: Callable[[Report], Any]) -> Job:
        """Add a function to the queue. It receives a callback that reports progress and raises CancelledError after `Job.stop`."""
        job = Job(work)
        self._unfinished.append(job)
        self._jobs.put(job)
        return job

    def _run(self) -> None:
        while job := self._jobs.get():
            Context().run(job.run)
            self._unfinished.remove(job)
