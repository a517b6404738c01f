"""The options of several commands. Those of the pipeline are made of the dataclasses that define them."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import MISSING, Field, field, fields, replace
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from typing import Annotated, Any, get_args

import typer

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.keywords import OPTION, Option
from evoprune.methods.plans import PRESETS, parse_budget, parse_budget_or_name
from evoprune.session.options import PipelineOptions
from evoprune_cli import completion
from evoprune_cli.help_format import HelpAll

COMPLETED = {"model": completion.MODEL, "budget": completion.BUDGET, "method": completion.METHOD}
TYPER = "typer"  # in the metadata of a field that `own` makes
MakeOptions = Callable[[], PipelineOptions]  # makes them of what was typed; raises UsageError
Command = Callable[..., int]


def option(panel: str, declared: Any, names: str, text: str, **settings: Any) -> Any:
    """The annotation of an option of several commands, under the title `panel` in the full help. Names: "-o --output FILE"."""
    return Annotated[declared, _said(names, text, rich_help_panel=panel, **settings)]


def own(names: str, text: str, default: Any = None, **settings: Any) -> Any:
    """A field of a command's dataclass: an option of this command alone."""
    return field(default=default, metadata={TYPER: _said(names, text, **settings)})


def flag(names: str, text: str) -> Any:
    """As `own`, of a bool that is False unless it is typed."""
    return own(names, text, default=False)


def _said(names: str, text: str, **settings: Any) -> Any:
    *flags, last = names.split()
    flags, metavar = ([*flags, last], {}) if last.startswith("-") else (flags, {"metavar": last})
    return typer.Option(*flags, help=text, **metavar, **settings)


def argument(declared: Any, metavar: str, text: str) -> Any:
    """The annotation of what is no option."""
    return Annotated[declared, typer.Argument(metavar=metavar, help=text, show_default=False)]


def with_options(
    *groups: type, without: Iterable[str] = (), panels: dict[str, str] | None = None, **changed: dict[str, Any]
) -> Callable[[Callable[[Any], int]], Command]:
    """Decorates a command whose only parameter is a dataclass: its fields become options and arguments.

    The field `options`, a `MakeOptions`, so that the command reports wrong values as its other errors, becomes an option for each
    field of `groups`. Fields that are not offered have their defaults. `--debug` and `--help-all` are added.

    Args:
        without: names of fields that are not offered.
        panels: by the name of its first field, the title in the full help of fields that `own` makes.
        changed: what the command says otherwise of a field, by its name: fields of `Option`.
    """
    offered = [(group.PANEL, each) for group in groups for each in fields(group) if each.name not in without]
    said = {each.name: replace(each.metadata[OPTION], **changed.get(each.name, {})) for _, each in offered}

    def decorate(command: Callable[[Any], int]) -> Command:
        (request,) = (parameter.annotation for parameter in signature(command).parameters.values())
        parameters = []
        for parameter in _of_fields(request, panels or {}):
            pipeline = [_parameter(panel, each, said[each.name]) for panel, each in offered]
            parameters += pipeline if parameter.name == "options" else [parameter]

        @wraps(command)
        def run(debug: bool, help_all: bool, **given: Any) -> int:
            typed = {name: given.pop(name) for name in said}
            return command(request(**given, options=partial(_made, said, typed)))

        run.__signature__ = Signature([*parameters, *signature(_for_all).parameters.values()])
        run.__annotations__ = {}
        return run

    return decorate


def _of_fields(request: Any, panels: dict[str, str]) -> Iterator[Parameter]:
    panel = None
    for each in fields(request):
        annotation, panel = each.type, panels.get(each.name, panel)
        if said := each.metadata.get(TYPER):
            said.rich_help_panel = panel
            annotation = Annotated[annotation, said]
        default = Parameter.empty if each.default is MISSING else each.default
        yield Parameter(each.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _parameter(panel: str, field: Field, said: Option) -> Parameter:
    """An option of the pipeline, as Typer takes parameters of a command."""
    default = field.default if said.unless_typed is None else said.unless_typed
    declared = said.typed or (str if str in get_args(field.type) else field.type)
    annotation = option(
        panel,
        declared | None if default is None else declared,
        " ".join(_flags(field.name, said)),
        said.help,
        envvar=said.env,
        min=said.least,
        max=said.most,
        show_default=default != "",
        **COMPLETED.get(field.name) or (completion.one_of(*said.words) if said.words else {"metavar": said.metavar}),
    )
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _flags(name: str, said: Option) -> tuple[str, ...]:
    """How a field of a name is typed, the long form last."""
    return said.flags or (f"--{name.replace('_', '-')}",)


def _made(said: dict[str, Option], typed: dict[str, Any]) -> PipelineOptions:
    parse = {name: each.parse for name, each in said.items() if each.parse}
    try:
        return PipelineOptions.of(
            **{name: parse[name](value) if name in parse else value for name, value in typed.items()}
        )
    except UsageError as problem:  # which may begin with the name of a field in Python
        name = problem.message.partition(" is ")[0]
        if name in said:
            problem.message = _flags(name, said[name])[-1] + problem.message.removeprefix(name)
        raise


SWEEP = "Sweep (lists by commas or repetition)"  # the title of a panel
Budgets = option(
    SWEEP,
    list[str] | None,
    "-b --budget",
    "Shares of visual tokens kept, or presets; only in eval auto, auto:inflection; "
    f"default: {','.join(list(PRESETS)[1:])}. Full is always there.",
    envvar="EVOPRUNE_BUDGET",
    **completion.BUDGETS,
)
Methods = option(
    SWEEP,
    list[str] | None,
    "--method",
    f"Names (see evoprune methods); default: {methods.DEFAULT}. NAME:SETTING=VALUE for its settings; "
    "reuse+NAME, ipcv+NAME and NAME+fastv.",
    **completion.METHODS,
)
_output = partial(option, "Output")
Json = _output(bool, "--json", "One JSON line a question on stdout, instead of text.")
JsonResults = _output(bool, "--json", "The results as one JSON line instead of a table.")
Quiet = _output(bool, "-q --quiet", "No progress, notes or stats; warnings remain.")
Stats = _output(
    bool | None,
    "--stats/--no-stats",
    "Stage times and token counts on stderr; default: unless --json or -q, in one line from the second question on.",
)
Verbose = _output(bool, "-v --verbose", "Also print rows of every layer, settings, versions.")
Cache = _output(
    bool,
    "--cache/--no-cache",
    "Keep encoded videos on disk (at most 2 GiB) and reuse them.  [env var: EVOPRUNE_CACHE_DIR]",
)
Debug = _output(bool, "--debug", "Show the traceback of an error.  [env var: EVOPRUNE_DEBUG]")


def _for_all(*, debug: Debug = False, help_all: HelpAll = False) -> None:
    """The last options of every command. `terminal.print_traceback` and a callback of `HelpAll` read them, not the command."""


def check_choice(name: str, value: str | None, known: Iterable[str | None]) -> None:
    """Raises UsageError where an option has none of the values that it takes."""
    if value not in known:
        raise UsageError(f"{name} {value!r} is unknown", f"one of {', '.join(filter(None, known))}")


def listed(texts: list[str] | None) -> list[str]:
    """A list given by commas or by repeating the option."""
    return [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]


def sweep(budgets: list[str] | None, names: list[str] | None, args: dict[str, str], *, named: bool = False) -> dict:
    """What `profile` and `eval` go through: `budgets`, `methods` and `method_args`, each budget and method once.

    `named`: whether budgets of "auto" and "auto:inflection" are allowed. Raises UsageError: a bad budget, or no such method.
    """
    wanted = tuple(dict.fromkeys(listed(names) or [methods.DEFAULT]))
    for name in wanted:
        methods.check(name)
    shares = map(parse_budget_or_name if named else parse_budget, listed(budgets) or list(PRESETS)[1:])
    return {"budgets": tuple(dict.fromkeys(shares)), "methods": wanted, "method_args": args}
