"""Asking on about one video: questions typed at a terminal, until there are no more."""

import contextlib
import os
import sys
from collections.abc import Iterator

from evoprune.errors import UsageError
from evoprune_cli.conversation import Conversation
from evoprune_cli.render import note, print_error

PROMPT = "> "


def check_terminal() -> None:
    """Raises: UsageError: nobody can type."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise UsageError(
            "--interactive reads questions from a terminal, and stdin is none",
            "several questions at once: -Q, repeatable",
        )


def converse(talk: Conversation, questions: list[str]) -> None:
    """Answers `questions`, and then what is typed, which is added to them.

    Ctrl-C ends an answer; where nothing is being answered, twice running, it ends the conversation.
    """
    for question in list(questions):
        _answer(talk, question)
    for question in typed():
        questions.append(question)
        _answer(talk, question)


def _answer(talk: Conversation, question: str) -> None:
    try:
        talk.answer(question, last=True)
    except KeyboardInterrupt as stop:
        talk.break_off(stop, [question])
        note()  # the terminal has shown ^C
    except UsageError as problem:
        talk.break_off(problem, [question])
        print_error(problem.message, problem.hint)


def typed() -> Iterator[str]:
    """Questions, one a line, until the input ends (Ctrl-D); empty lines are none.

    Raises:
        KeyboardInterrupt: at the prompt, twice running: the first may have been meant for an answer, or for what was typed.
    """
    with contextlib.suppress(ImportError):  # where there is none, lines are plain
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
            if warned:
                note()
                raise
            note("\nCtrl-D ends the conversation, or Ctrl-C once more")
            warned = True
            continue
        warned = False
        if line.strip():
            yield line


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """`input`, and readline below it, prompt on standard output, where only answers belong, and edit lines only on a terminal."""
    sys.stdout.flush()
    number = sys.stdout.fileno()
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, number)
        os.close(kept)
