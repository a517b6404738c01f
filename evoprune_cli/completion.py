"""Completion at TAB. Scripts and protocol are Typer's; the names that an option accepts come from where they are defined.

At each TAB the shell's script runs `evoprune` with the line in environment variables, and offers the lines that are printed. Where
there are none it offers files.
"""

import os
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import shellingham  # comes with Typer
import typer
from typer import completion

from evoprune import methods
from evoprune.bundled import DEMOS
from evoprune.errors import UsageError
from evoprune.methods.registry import REUSE
from evoprune.pruning.budget import AUTOS, PRESETS, TUNED

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


def _this_shell() -> str:
    """The shell that called; found among the parents of this process."""
    try:
        shell, _ = shellingham.detect_shell()
    except shellingham.ShellDetectionFailure as problem:
        raise UsageError("cannot detect which shell this is", BY_HAND) from problem
    _check(shell)
    return shell


def _install(context: typer.Context, wanted: bool) -> None:
    if not wanted or context.resilient_parsing:
        return
    shell = _this_shell()
    try:
        _, path = completion.install(shell, PROGRAM)
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"cannot install the completion of {shell}: {problem}", BY_HAND) from problem
    typer.echo(f"{shell} completion installed in {path}; it works in shells that start from now on")
    raise typer.Exit


def _show(context: typer.Context, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        shell = _this_shell()
        typer.echo(completion.get_completion_script(prog_name=PROGRAM, complete_var=VARIABLE, shell=shell))
        raise typer.Exit


InstallCompletion = Annotated[
    bool,
    typer.Option(
        "--install-completion", is_eager=True, callback=_install, help="Install completion at TAB for this shell."
    ),
]
ShowCompletion = Annotated[
    bool, typer.Option("--show-completion", is_eager=True, callback=_show, help="Print its script instead.")
]


def one_of(*words: str) -> dict[str, Any]:
    """The metavar and the completion of an option that takes one of these. Words in capitals are no values: FILE, N."""
    names = [word.partition("[")[0] for word in words if word[0].islower()]  # of "cuda[:N]", "cuda"

    def complete(incomplete: str) -> list[str]:
        return [] if "FILE" in words and not incomplete else names  # where nothing is offered, the shell offers files

    return {"metavar": "|".join(words), "autocompletion": complete}


def list_of(*names: str) -> dict[str, Any]:
    """The same of an option that takes several, with commas between them."""

    def complete(incomplete: str) -> list[str]:
        return _after_commas(incomplete, lambda last: names)

    return {"metavar": "LIST", "autocompletion": complete}


def _models(incomplete: str) -> list[str]:
    return list(DEMOS)


def _budgets(incomplete: str) -> list[str]:
    return [*PRESETS, *AUTOS, TUNED]


def _budget_lists(context: typer.Context, incomplete: str) -> list[str]:
    """In `eval` of all budgets, elsewhere of those that are numbers."""
    return _after_commas(incomplete, _budgets if context.info_name == "eval" else lambda last: PRESETS)


def _methods(incomplete: str) -> list[str]:
    """What may follow the last `+`."""
    before = incomplete[: incomplete.rfind("+") + 1]
    found = [before + name for name in methods.available() if _exists(before + name)]
    if incomplete and f"{REUSE}+".startswith(incomplete) and not any(name.startswith(incomplete) for name in found):
        return _methods(f"{REUSE}+")  # it is no method alone
    return found


def _exists(method: str) -> bool:
    try:
        methods.check(method)
    except UsageError:
        return False
    return True


def _method_lists(incomplete: str) -> list[str]:
    return _after_commas(incomplete, _methods)


def _after_commas(incomplete: str, complete: Callable[[str], Iterable[str]]) -> list[str]:
    """Completions of the last name of a list, behind those that are there; none twice."""
    before = incomplete[: incomplete.rfind(",") + 1]
    return [before + name for name in complete(incomplete[len(before) :]) if name not in before.split(",")]


MODEL = {"metavar": "ID|DIR|demo", "autocompletion": _models}
BUDGET = {"metavar": "SHARE|PRESET|auto|tuned", "autocompletion": _budgets}
METHOD = {"metavar": "NAME", "autocompletion": _methods}
BUDGETS = {"metavar": "LIST", "autocompletion": _budget_lists}
METHODS = {"metavar": "LIST", "autocompletion": _method_lists}
