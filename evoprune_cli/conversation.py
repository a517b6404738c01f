"""Questions to one video and how their answers are shown: text or JSON on stdout, stats and warnings on stderr."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evoprune.report import Report, VideoFacts
from evoprune_cli.failures import failure
from evoprune_cli.render import encodable, note, print_json, print_stats, print_warning, progress

if TYPE_CHECKING:
    from evoprune.pipeline.answering import EncodedVideo

Show = Callable[..., None]  # what is being done, done, total


@dataclass(frozen=True)
class Output:
    """What is shown: records instead of text, the stats block, more in it, neither progress nor notes."""

    json: bool
    stats: bool
    verbose: bool
    quiet: bool


class Conversation:
    """Asks an encoded video and prints what comes of it; keeps track of what was answered, in case it is broken off.

    Args:
        video: its name.
        output: what is shown.
        generation: arguments of `EncodedVideo.ask`.

    Attributes:
        session: the video, once it is encoded.
        encode_full: encodes it once more with nothing pruned; None where nothing is to be compared.
        answered: questions that are done with.
    """

    def __init__(self, video: str, output: Output, generation: dict):
        self.session: EncodedVideo | None = None
        self.encode_full: Callable[[Show], EncodedVideo] | None = None
        self.answered = 0
        self._video, self._output, self._generation = video, output, generation
        self._full: EncodedVideo | None = None
        self._half: Report | None = None  # of a question that has only been answered with pruning
        self._warned = False
        self._complete: set[str] = set()  # reports that are not about a running answer

    def answer(self, question: str, last: bool) -> None:
        """Asks, and prints the answer; with the `last` one the warnings, which are the same for every question, once."""
        self._say(self.session, question, "pruned")
        report = self.session.report
        if self.encode_full:
            self._half = report
            if self._full is None:  # not earlier: the first answer does not wait for it
                with progress(not self._output.quiet) as show:
                    self._full = self.encode_full(show)
            self._say(self._full, question, "full")
            report.compare, self._half = self._full.report, None
        self.answered += 1  # before it is printed: an interrupted record is better lost than there twice
        self._finish(report, last)

    def break_off(self, problem: BaseException, unanswered: list[str]) -> None:
        """What there is when something went wrong: the stats so far, and with JSON a line for every question not answered."""
        if isinstance(problem, BrokenPipeError | SystemExit) or not unanswered:
            return
        json, interrupted, question = self._output.json, not isinstance(problem, Exception), unanswered[0]
        report = None
        if self._half:
            report, self._half = self._half, None
            begun = interrupted and self._begun(self._full)
            report.compare = self._full.report if begun else self._failure(question, problem)
            report.compare.finish_reason = "interrupt" if interrupted else "error"
        elif interrupted and self._begun(self.session):
            report = self.session.report
            report.finish_reason = "interrupt"
        self.answered += len(unanswered)
        self._complete |= {session.report.id for session in (self.session, self._full) if session}
        if report and interrupted:
            self._finish(report, last=True)
        elif report and json:
            print_json(report)
        if json:
            for missing in unanswered[1 if report else 0 :]:
                print_json(self._failure(missing, problem))
            problem.told = True

    def _begun(self, session: "EncodedVideo | None") -> bool:
        """Whether the latest report is about an answer that has not come to its end."""
        return bool(session and session.report.question is not None and session.report.id not in self._complete)

    def _say(self, session: "EncodedVideo", question: str, label: str) -> None:
        pieces = session.ask(question, **self._generation)
        with progress(not self._output.quiet) as show:
            show("reading prompt")
            first = next(pieces, "")
        _print_answer(f"{label}: {first}" if self.encode_full else first, pieces, silent=self._output.json)
        self._complete.add(session.report.id)

    def _finish(self, report: Report, last: bool) -> None:
        if self._output.json:
            print_json(report)
        if last and not self._warned:
            self._warned = True
            for name in report.warnings:
                print_warning(name, report.video)
        if self._output.stats:
            note()
            print_stats(report, self._output.verbose)

    def _failure(self, question: str, problem: BaseException) -> Report:
        """The record of a question that has no answer."""
        reason = "error" if isinstance(problem, Exception) else "interrupt"
        return Report(
            question=question, video=VideoFacts(path=self._video), finish_reason=reason, error=failure(problem)
        )


def _print_answer(first: str, rest: Iterator[str], silent: bool) -> None:
    """Streams the answer; the closing newline comes even when it is cut short."""
    if silent:
        for _ in rest:
            pass
        return
    try:
        print(encodable(first, sys.stdout), end="", flush=True)
        for piece in rest:
            print(encodable(piece, sys.stdout), end="", flush=True)
    finally:
        print(flush=True)
