"""The interactive prompt of `ask` and `watch`: reads typed questions and executes the prompt's own commands."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from evoprune.errors import UsageError
from evoprune.util import shown
from evoprune_cli import options as opt
from evoprune_cli.terminal import note, print_error, stdout, tell

if TYPE_CHECKING:
    from evoprune.session import Chat, Session

PROMPT = "> "  # printed before each question
HELP = "type a question and press Enter; q or Ctrl-D: quit; Ctrl-C: stop an answer; /help: show this line"
HELP_CHAT = f"{HELP}; /new: clear the conversation; /undo: remove the last question"
HELPS = ("/help", "help", "?")
ENDS = ("exit", "quit", "q", "/exit", "/quit", "/q", "/bye")


def check_history(
    history: str | None, prompt: bool, compare: bool = False, hint: str = "leave it out, or add -i"
) -> None:
    """Raise UsageError if --history can't be combined with the other options. `prompt` is True for an interactive prompt."""
    if history not in (None, opt.ON, opt.OFF):
        raise UsageError(f"--history {history} is unknown", f"use {opt.ON} or {opt.OFF}")
    if history and not prompt:
        raise UsageError("--history applies only to questions at a prompt", hint)
    if history == opt.ON and compare:
        raise UsageError("--compare applies only to single questions", "leave out --compare or --history on")


def why_single_questions(history: str | None, session: "Session", compare: bool = False) -> str | None:
    """Return the reason why prompt questions are independent of each other, or None if they form a conversation."""
    if history:
        return None if history == opt.ON else "--history off"
    if compare:
        return "--compare applies only to single questions"
    if session.pruning.method.reads_question:
        return f"{session.pruning.method.name} prunes for a single question"
    if session.loaded.demo:
        return "the demo models know only single questions (use --history on to keep earlier questions)"
    return None


def typed_questions(
    twice: bool = True,
    meanwhile: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    chat: "Chat | None" = None,
) -> Iterator[str]:
    """Yield the questions typed at a prompt, one per line, until Ctrl-D or a command such as "q" ends the prompt.

    This function also executes all other prompt commands, such as /new. Empty lines are skipped.

    Args:
        twice: Whether Ctrl-C must be pressed twice in a row to quit, because the first press may have been intended to stop an
            answer.
        meanwhile: Returns a context manager that is active while the prompt waits for input.
        chat: The conversation for /new and /undo.

    Raises:
        KeyboardInterrupt: If the user presses Ctrl-C at the prompt.
    """
    with contextlib.suppress(ImportError):  # without readline, users can still type but not edit
        import readline  # editing and history for `input`  # noqa: F401
    warned = False
    while True:
        try:
            with _output_on_stderr(), meanwhile():
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
            note("\nto quit: q or Ctrl-D, or Ctrl-C again")
            warned = True
            continue
        warned = False
        word = line.strip().lower()
        if word in ENDS:
            return
        if word and not _runs_command(word, chat):
            yield line


def _runs_command(word: str, chat: "Chat | None") -> bool:
    """Execute a command of the prompt. Returns False if the word is a question instead."""
    if word in HELPS:
        tell(HELP_CHAT if chat else HELP)
    elif chat and word == "/new":
        chat.clear()
        tell("conversation cleared")
    elif chat and word == "/undo":
        question = chat.undo()
        tell("nothing to undo" if question is None else f"removed: {shown(question)}")
    elif word in ("/new", "/undo"):
        tell(f"nothing to {'undo' if word == '/undo' else 'clear'}: questions are independent")
    elif word.split()[:1] in (["/new"], ["/undo"], ["/help"]):
        tell(f"{word.split()[0]} must be alone on its line: nothing was done")
    elif command := re.match(r"/[\w-]*(?=\s|$)", word):
        tell(f"unknown command {command[0]}, so nothing was asked; /help lists the commands")
    elif re.match(r"--|-[a-z]", word):
        hint = "options go on the command line: quit with q, then run evoprune ask with them"
        print_error(f"{word.split()[0]} looks like an option, so nothing was asked", hint)
    else:
        return False
    return True


@contextlib.contextmanager
def _output_on_stderr() -> Iterator[None]:
    """Redirect stdout to stderr because `input` and readline print the prompt to stdout, which is reserved for answers."""
    stdout().flush()
    number = stdout().fileno()
    kept = os.dup(number)
    os.dup2(sys.stderr.fileno(), number)
    try:
        with contextlib.redirect_stdout(stdout()):  # `input` uses readline only if `sys.stdout` is the real stdout
            yield
    finally:
        stdout().flush()
        os.dup2(kept, number)
        os.close(kept)
