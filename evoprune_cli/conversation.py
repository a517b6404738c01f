"""Questions about the same inputs, given or typed at a terminal, and how their answers are printed: text or JSON on stdout."""

import contextlib
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.report import Report, name_inputs
from evoprune.text import listed
from evoprune_cli.terminal import (
    failure,
    note,
    print_error,
    print_json,
    print_stats,
    print_stream,
    print_warnings,
    progress,
    stdout,
    tell,
)

if TYPE_CHECKING:
    from evoprune.session.answering import Answer, EncodedInputs
    from evoprune.session.options import GenerationOptions

PROMPT = "> "  # before a question
HELP = "a question and Enter: the answer; q or Ctrl-D: the end; Ctrl-C: stops an answer; /help: this line"
HELPS, ENDS = ("/help", "help", "?"), ("exit", "quit", "q", "/exit", "/quit", "/q", "/bye")
OPTION = r"--|-[a-z]"  # how a line begins that is no question
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
            from evoprune.bench.agreement import agreement, reference

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
        answer = self._running = inputs.ask(question, **vars(self._generation))
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
        else:
            cut = [each for each in (report, report.compare) if each and "answer_cut" in each.warnings]
            for each in cut[:1]:
                print_warnings(each, ["answer_cut"])
        self._finished += 1
        if self._stats:
            print_stats(report, self._verbose, short=self._finished > self._blocks)

    def _failure(self, question: str, problem: BaseException) -> Report:
        """The record of a question that has no answer."""
        reason = "error" if isinstance(problem, Exception) else "interrupt"
        report = Report(question=question, finish_reason=reason, error=failure(problem))
        name_inputs(report, self._names)
        return report


def check_terminal() -> None:
    """Raises UsageError where stdin is not a terminal."""
    if sys.stdin is None or not sys.stdin.isatty():
        said = "--interactive reads questions from a terminal, and stdin is not one"
        raise UsageError(said, "several questions at once: -Q, repeatable")


def converse(talk: Conversation, questions: list[str], inputs: Sequence[str]) -> None:
    """Answers `questions`, and then each question that is typed, which is appended to them.

    Ctrl-C ends an answer; pressed twice at the prompt, the conversation. `inputs`: their names, for a greeting; empty for none.
    """
    for question in list(questions):
        answer(talk, question)
    if inputs:
        names = listed([os.path.basename(os.path.abspath(each)) for each in inputs])
        tell(f"Ask about {names}. /help for help, q or Ctrl-D to end.")
    for question in typed():
        questions.append(question)
        answer(talk, question, typed=True)


def answer(
    talk: Conversation, question: str, typed: bool = False, identity: str | None = None, goes_on: bool = True
) -> bool:
    """Answers a question; one that cannot be asked ends nothing, nor, with `goes_on`, does Ctrl-C. Whether it could be asked."""
    before = talk.answered
    try:
        talk.answer(question, typed, identity)
    except UsageError as problem:
        talk.break_off(problem, [question])
        print_error(problem.message, problem.hint)
        return False
    except BaseException as problem:
        talk.break_off(problem, [question] if talk.answered == before else [])
        if not (goes_on and isinstance(problem, KeyboardInterrupt)):
            raise
        note()  # ends the line on which the terminal printed ^C
    return True


def typed(twice: bool = True) -> Iterator[str]:
    """Questions, one a line, until the input ends (Ctrl-D) or a line says so. Empty lines are skipped, commands carried out.

    Raises KeyboardInterrupt: on Ctrl-C at the prompt, with `twice` on the second in a row: the first may have been meant for an
    answer.
    """
    with contextlib.suppress(ImportError):  # without it lines cannot be edited
        import readline  # noqa: F401 (editing and history for `input`)
    warned = False
    while True:
        try:
            with _output_on_stderr():
                line = input(PROMPT)
        except UnicodeDecodeError:
            print_error("the question is not valid text", "write it in UTF-8")
            continue
        except EOFError:
            note()
            return
        except KeyboardInterrupt:
            if warned or not twice:
                note()
                raise
            note("\nq or Ctrl-D ends the conversation, or Ctrl-C once more")
            warned = True
            continue
        warned, word = False, line.strip().lower()
        if word in ENDS:
            return
        if word in HELPS:
            tell(HELP)
        elif command := re.match(r"/[\w-]*(?=\s|$)", word):
            tell(f"there is no command {command[0]}, so it is not asked; /help lists them")
        elif re.match(OPTION, word):
            hint = "options belong to the command line: q ends the conversation, and evoprune ask begins another one with them"
            print_error(f"{word.split()[0]} looks like an option, so it is not asked", hint)
        elif word:
            yield line


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Sends stdout to stderr: `input` and readline print their prompt on stdout, which is for answers only."""
    stdout().flush()
    number = stdout().fileno()
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        with contextlib.redirect_stdout(stdout()):  # with stderr there, `input` would not use readline
            yield
    finally:
        stdout().flush()
        os.dup2(kept, number)
        os.close(kept)
