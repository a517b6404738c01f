"""Runs a batch on a running `evoprune serve` (`batch --via`). Does not import torch."""

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import islice
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any

from evoprune.report import Report
from evoprune.session import PipelineOptions
from evoprune.util import without_password
from evoprune.video import local_file
from evoprune_cli.options import PipelineArguments
from evoprune_cli.remote import LocalInput, RemoteInputs, same, set_options
from evoprune_cli.terminal import failure
from evoprune_cli.via import Busy, Server, Unusable

if TYPE_CHECKING:
    from evoprune.batch import Row, Settings, Span

IN_FLIGHT = 2  # number of inputs of a batch to ask about at the same time, so that the server reads one ahead
END = object()  # the last thing that `Asking` says


def settings_of(server: Server, arguments: PipelineArguments, pipeline: PipelineOptions) -> "Settings":
    """Return the options of a batch: those that the user has set, and otherwise the server's."""
    from evoprune.batch import Settings

    return Settings.of(**server.options | set_options(arguments, pipeline))


def answers_via(
    server: Server,
    spans: Sequence["Span"],
    settings: "Settings",
    on_failure: Callable[[Exception], None],
    progress: Callable[[str, int, int], None],
) -> Iterator[Report]:
    """Yield a record for each row, in order. For the arguments, see `evoprune.batch.answers`.

    While the server answers the questions about a video, it already reads the next one.

    Raises:
        Unusable: If the server can't be used any more.
    """
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        waiting: deque[Asking] = deque()
        left = iter(spans)
        try:
            while True:
                waiting += (Asking(server, span, settings, threads) for span in islice(left, IN_FLIGHT - len(waiting)))
                if not waiting:
                    return
                yield from waiting[0].records(on_failure, progress)
                waiting.popleft()
        finally:
            for each in waiting:
                each.stop()
            if waiting:  # the batch has failed or was stopped
                server.close()
            server.leave()


class Asking:
    """Asks the questions of a span in a thread."""

    def __init__(self, server: Server, span: "Span", settings: "Settings", threads: ThreadPoolExecutor):
        self._server = server
        self._span = span
        self._settings = settings
        self._stopped = threading.Event()
        self._said: SimpleQueue[Any] = SimpleQueue()
        threads.submit(self._run)

    def stop(self) -> None:
        self._stopped.set()

    def records(
        self, on_failure: Callable[[Exception], None], progress: Callable[[str, int, int], None]
    ) -> Iterator[Report]:
        """Yield the records of the span's rows. Raises Unusable if the server can't be used any more."""
        while (said := self._said.get()) is not END:
            if isinstance(said, Report):
                yield said
            elif isinstance(said, tuple):
                progress(*said)
            elif isinstance(said, Unusable) or not isinstance(said, Exception):
                raise said
            else:
                on_failure(said)

    def _run(self) -> None:
        try:
            self._ask()
        except BaseException as problem:
            self._said.put(problem)
        finally:
            self._said.put(END)

    def _ask(self) -> None:
        first = self._span.rows[0]
        names = [without_password(name) for name in first.inputs]
        sampling = self._settings.sampling.with_overrides(**self._span.sampling)
        usual = vars(self._settings.pruning) | vars(sampling)
        with ExitStack() as stack:
            try:
                sampling.check_one_file(len(names))
                paths = [stack.enter_context(local_file(path)) for path in first.paths]
                files = [LocalInput(path, name, sampling) for path, name in zip(paths, names, strict=True)]
                inputs = RemoteInputs(self._server, files, usual, show=self._show)
                stack.callback(inputs.close)
            except Exception as problem:
                self._fail(problem, self._span.rows)
                return
            for row in self._span.rows:
                if self._stopped.is_set():
                    return
                try:
                    report = self._answer(inputs, row)
                except Unusable:
                    raise
                except Exception as problem:
                    self._fail(problem, [row])
                else:
                    self._said.put(self._settings.complete(report, row))

    def _answer(self, inputs: RemoteInputs, row: "Row") -> Report:
        from evoprune.language import Turn

        earlier = Turn.to_messages(row.earlier) if row.earlier else None
        options = vars(row.generation(self._settings.generation))
        while True:
            try:
                answer = inputs.answer(row.prompt, ignored, same, earlier, options)
                for _ in answer:
                    pass
                return answer.report
            except Busy as problem:
                if self._stopped.wait(problem.retry_s):
                    raise

    def _show(self, *step: Any) -> None:
        if len(step) == 3:
            self._said.put(step)

    def _fail(self, problem: Exception, rows: Sequence["Row"]) -> None:
        self._said.put(problem)
        for row in rows:
            self._said.put(self._settings.failed(row, failure(problem)))


def ignored(text: str) -> None:
    pass
