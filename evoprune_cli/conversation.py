"""Questions about the same inputs and how their answers are printed: text or JSON on stdout, stats and warnings on stderr."""

import math
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from evoprune.report.records import Report, name_inputs
from evoprune_cli.failures import failure
from evoprune_cli.terminal import print_json, print_stats, print_stream, print_warnings, progress, tell

if TYPE_CHECKING:
    from evoprune.pipeline.answering import Answer, EncodedInputs
    from evoprune.pipeline.options import GenerationOptions

PROMPT = "> "  # before a question
Show = Callable[..., None]  # what is being done, done, total
EncodeFull = Callable[[Show], "EncodedInputs"]


class Conversation:
    """Asks about encoded inputs (of these names) and prints the answers; knows what was answered, in case it is interrupted.

    By default there are stats unless --json or -q: a block for the first answer, a line for later ones and in a conversation.

    Attributes:
        answered: questions that are done with.
    """

    def __init__(self, inputs: Sequence[str], request: Any, *, interactive: bool, several: bool):
        """`request`: of a command, with `json`, `stats`, `verbose` and `quiet`. `several`: there is more than one question."""
        self.answered = 0
        self._names, self._json, self._verbose, self._quiet = inputs, request.json, request.verbose, request.quiet
        plain = not request.json and not request.quiet
        self._echo = several and plain and sys.stderr.isatty()  # questions of the command line, on stderr
        self._stats = (plain if request.stats is None else request.stats) or (request.verbose and not request.quiet)
        self._blocks = math.inf if request.verbose or request.stats else 0 if interactive else 1  # so many, then lines
        self._generation: GenerationOptions | None = None
        self._inputs: EncodedInputs | None = None
        self._full: EncodedInputs | None = None
        self._encode_full: EncodeFull | None = None
        self._running: Answer | None = None  # the one that is being read
        self._half: Report | None = None  # of a question that has only been answered with pruning
        self._warned: set[str] = set()  # names of warnings that are printed
        self._finished = 0  # answers whose stats are printed, or are not wanted

    def begin(self, inputs: "EncodedInputs", generation: "GenerationOptions", encode_full: EncodeFull | None) -> None:
        """From now on questions can be answered. Prints the warnings, which are about the inputs and the model: before any answer.

        `encode_full`: encodes the inputs once more with nothing pruned; None where nothing is to be compared.
        """
        self._inputs, self._generation, self._encode_full = inputs, generation, encode_full
        print_warnings(inputs.report)
        self._warned = set(inputs.report.warnings)

    def answer(self, question: str, typed: bool = False, identity: str | None = None) -> None:
        """Asks, and prints the answer. `typed`: the question stands on the terminal already. `identity`: of its record."""
        if self._echo and not typed:
            tell(f"{PROMPT}{' '.join(question.split())}")
        report = self._say(self._inputs, question, "pruned").report
        report.id = identity or report.id
        if self._encode_full:
            self._half = report
            if self._full is None:  # not earlier: the first answer does not wait for it
                with progress(not self._quiet) as show:
                    self._full = self._encode_full(show)
            answer = self._say(self._full, question, "full")
            report.compare, self._half = answer.report, None
            from evoprune.pipeline.agreement import agreement, reference

            ended = answer.report.finish_reason == "stop"
            given = reference(self._full, question, answer.ids, ended, self._generation.system)
            report.agreement = agreement(given, self._inputs).record()
        self.answered += 1  # before it is printed: a record that is interrupted must not be printed twice
        self._finish(report)

    def break_off(self, problem: BaseException, unanswered: list[str]) -> None:
        """Prints what there is when something went wrong: stats, and with JSON a line for every question not answered."""
        if isinstance(problem, BrokenPipeError | SystemExit) or not unanswered:
            return
        interrupted = not isinstance(problem, Exception)
        running, self._running = self._running, None
        report = running.report if interrupted and running else None
        if self._half:
            report = report or self._failure(unanswered[0], problem)
        if report:
            report.finish_reason = "interrupt" if interrupted else "error"
        if self._half:
            self._half.compare = report
            report, self._half = self._half, None
        self.answered += len(unanswered)
        if report and interrupted:
            self._finish(report)
        elif report and self._json:
            print_json(report)
        if self._json:
            for missing in unanswered[1 if report else 0 :]:
                print_json(self._failure(missing, problem))
            problem.reported = True

    def _say(self, inputs: "EncodedInputs", question: str, label: str) -> "Answer":
        """Asks and prints one answer."""
        answer = self._running = inputs.ask(question, options=self._generation)
        new = [name for name in answer.report.warnings if name not in self._warned] if label == "pruned" else []
        print_warnings(answer.report, new)
        self._warned.update(new)
        with progress(not self._quiet) as show:
            show("reading prompt")
            first = next(answer, "")
        if self._json:
            for _ in answer:
                pass
        else:
            print_stream(chain([f"{label}: {first}" if self._encode_full else first], answer))
        self._running = None
        return answer

    def _finish(self, report: Report) -> None:
        if self._json:
            print_json(report)
        self._finished += 1
        if self._stats:
            print_stats(report, self._verbose, short=self._finished > self._blocks)

    def _failure(self, question: str, problem: BaseException) -> Report:
        """The record of a question that has no answer."""
        reason = "error" if isinstance(problem, Exception) else "interrupt"
        report = Report(question=question, finish_reason=reason, error=failure(problem))
        name_inputs(report, self._names)
        return report
