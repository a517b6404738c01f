"""`ask --interactive`: questions about the same inputs, typed at a terminal."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator, Sequence

from evoprune.errors import UsageError
from evoprune.text import listed
from evoprune_cli.conversation import PROMPT, Conversation
from evoprune_cli.terminal import note, print_error, tell

HELP = "a question and Enter: the answer; q or Ctrl-D: the end; Ctrl-C: stops an answer; /help: this line"
HELPS, ENDS = ("/help", "help", "?"), ("exit", "quit", "q", "/exit", "/quit", "/q", "/bye")
OPTION = r"--|-[a-z]"  # how a line begins that is no question


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
        elif re.fullmatch(r"/\w*", word):
            tell(f"there is no command {word}; /help lists them")
        elif re.match(OPTION, word):
            hint = "options belong to the command line: q ends the conversation, and evoprune ask begins another one with them"
            print_error(f"{word.split()[0]} looks like an option, so it is not asked", hint)
        elif word:
            yield line


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Sends stdout to stderr: `input` and readline print their prompt on stdout, which is for answers only."""
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
