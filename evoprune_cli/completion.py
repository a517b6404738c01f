"""Completion at TAB. Scripts and protocol are Typer's; the names that an option accepts come from where they are defined.

At each TAB the shell's script runs `evoprune` with the line in environment variables, and offers the lines that are printed. Where
there are none it offers files.
"""

import os
from collections.abc import Callable, Iterable
from functools import partial
from typing import Annotated, Any

import shellingham  # comes with Typer
import typer
from typer import completion

from evoprune import methods
from evoprune.bundled import DEMOS
from evoprune.errors import UsageError
from evoprune.methods.plans import AUTOS, PRESETS
from evoprune.methods.registry import REUSE

PROGRAM = "evoprune"
VARIABLE = "_EVOPRUNE_COMPLETE"  # what a script asks for: complete_bash, or source_bash for the script itself
SHELLS = tuple(shell.value for shell in completion.Shells)
BY_HAND = f"{VARIABLE}=source_bash {PROGRAM} prints the script of bash; others: {', '.join(SHELLS[1:])}"


def prepare() -> None:
    """Makes ready what Typer needs to answer a script; without a request it does nothing.

    Raises UsageError: no shell or no request that Typer knows.
    """
    if not is_requested():
        return
    request = os.environ[VARIABLE]
    action, _, shell = request.partition("_")
    if shell == "source":  # click's order of the two
        action, shell = shell, action
    if action not in ("source", "complete"):
        raise UsageError(f"{VARIABLE}={request} is unknown", BY_HAND)
    _check(shell)
    if (action, shell) == ("complete", "bash"):
        _rejoin_option()
    os.environ[VARIABLE] = f"{action}_{shell}"
    os.environ["COLUMNS"] = "1000"  # rich would fold help at the terminal's width, and fish offers every line
    completion.completion_init()


def is_requested() -> bool:
    """Whether a script asks for something, so that this is no command of a user."""
    return bool(os.environ.get(VARIABLE))


def _rejoin_option() -> None:
    """Drops the equals sign of `--method=divprune` from the words, of which bash makes three."""
    try:
        words, current = os.environ["COMP_WORDS"].split("\n"), int(os.environ["COMP_CWORD"])
    except (KeyError, ValueError) as problem:
        raise UsageError(f"{VARIABLE}=complete_bash needs COMP_WORDS and COMP_CWORD", BY_HAND) from problem
    if words[current - 1 : current] == ["="] and words[current - 2].startswith("--"):
        del words[current - 1]
        os.environ |= {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(current - 1)}


def _check(shell: str) -> None:
    if shell not in SHELLS:
        raise UsageError(f"no completion for the shell {shell!r}", BY_HAND)


def _install(shell: str) -> str:
    try:
        _, path = completion.install(shell, PROGRAM)
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot install the completion of {shell}: {problem}", BY_HAND) from problem
    return f"{shell} completion installed in {path}; it works in shells that start from now on"


def _option(name: str, act: Callable[[str], str], text: str) -> Any:
    """An option that prints what `act` says about the shell that called, found among the parents of this process, and exits."""

    def run(context: typer.Context, wanted: bool) -> None:
        if not wanted or context.resilient_parsing:
            return
        try:
            shell, _ = shellingham.detect_shell()
        except shellingham.ShellDetectionFailure as problem:
            raise UsageError("cannot detect which shell this is", BY_HAND) from problem
        _check(shell)
        typer.echo(act(shell))
        raise typer.Exit

    return Annotated[bool, typer.Option(name, is_eager=True, callback=run, help=text)]


InstallCompletion = _option("--install-completion", _install, "Install completion at TAB for this shell.")
_script = partial(completion.get_completion_script, prog_name=PROGRAM, complete_var=VARIABLE)
ShowCompletion = _option("--show-completion", lambda shell: _script(shell=shell), "Print its script instead.")


def one_of(*words: str) -> dict[str, Any]:
    """The metavar and the completion of an option that takes one of these. Words in capitals are no values: FILE, N."""
    names = [word.partition("[")[0] for word in words if word[0].islower()]  # of "cuda[:N]", "cuda"
    # Where nothing is offered, the shell offers files.
    return _completed("|".join(words), lambda typed: [] if "FILE" in words and not typed else names)


def list_of(*names: str) -> dict[str, Any]:
    """The same of an option that takes several, with commas between them."""
    return _completed("LIST", _after_commas(lambda last: names))


def _completed(metavar: str, complete: Callable[[str], Iterable[str]]) -> dict[str, Any]:
    return {"metavar": metavar, "autocompletion": lambda incomplete: list(complete(incomplete))}


def _after_commas(complete: Callable[[str], Iterable[str]]) -> Callable[[str], list[str]]:
    """Completes the last name of a list, behind those that are there; none twice."""

    def complete_last(typed: str) -> list[str]:
        before = typed[: typed.rfind(",") + 1]
        return [before + name for name in complete(typed[len(before) :]) if name not in before.split(",")]

    return complete_last


def _methods(typed: str) -> list[str]:
    """What may follow the last `+`."""
    before = typed[: typed.rfind("+") + 1]
    found = [before + name for name in methods.available() if _exists(before + name)]
    if typed and f"{REUSE}+".startswith(typed) and not any(name.startswith(typed) for name in found):
        return _methods(f"{REUSE}+")  # it is no method alone
    return found


def _exists(method: str) -> bool:
    try:
        methods.check(method)
    except UsageError:
        return False
    return True


def _budget_lists(context: typer.Context, incomplete: str) -> list[str]:
    """In `eval` of all budgets, elsewhere of those that are numbers."""
    return _after_commas(lambda last: ALL_BUDGETS if context.info_name == "eval" else PRESETS)(incomplete)


ALL_BUDGETS = (*PRESETS, *AUTOS)
MODEL = _completed("ID|DIR|demo", lambda typed: DEMOS)
BUDGET = _completed("SHARE|PRESET|auto", lambda typed: ALL_BUDGETS)
METHOD = _completed("NAME", _methods)
BUDGETS = {"metavar": "LIST", "autocompletion": _budget_lists}
METHODS = _completed("LIST", _after_commas(_methods))
