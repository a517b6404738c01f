"""Declares command options, formats them for `--help` and `--help-all`, and completes them in the shell.

A command is a function with a keyword parameter for each of its own options. It also names the pipeline options that it accepts,
which are generated from the dataclasses that define them.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from copy import copy
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass, replace
from functools import wraps
from inspect import Parameter, Signature, signature
from itertools import takewhile
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from evoprune.bundled import DEMOS
from evoprune.errors import UsageError
from evoprune.methods import Budget, MethodText
from evoprune.session import PipelineOptions
from evoprune.signatures import named
from evoprune.util import OPTION, Option, kinds_of, words_of
from evoprune_cli.terminal import GLUE, only_answers_on_stdout
from evoprune_cli.typed import Typed, remember, typed

# Shell completion. Typer offers the returned words that start with the typed text. If there aren't any, the shell offers files.
# Typer identifies the parameters of a completion function by their types and by the name `incomplete`.


def one_of(*words: str) -> dict[str, Any]:
    """Return the metavar and completion settings for an option with fixed values. Uppercase words (FILE, N) are placeholders."""
    names = [word.partition("[")[0] for word in words if word[0].islower()]  # "cuda" for "cuda[:N]"

    def complete(incomplete: str) -> list[str]:
        if "FILE" in words and not incomplete:
            return []
        return names

    return {"metavar": "|".join(words), "autocompletion": complete}


def list_of(*names: str) -> dict[str, Any]:
    """Return the metavar and completion settings for an option that accepts a comma-separated list of names."""
    return {"metavar": "LIST", "autocompletion": lambda incomplete: _after_commas(incomplete, lambda last: names)}


def _after_commas(typed: str, complete: Callable[[str], Iterable[str]]) -> list[str]:
    """Complete the last name in a comma-separated list. Names already in the list are not offered again."""
    before = typed[: typed.rfind(",") + 1]
    return [before + name for name in complete(typed[len(before) :]) if name not in before.split(",")]


def _methods(typed: str) -> list[str]:
    return MethodText(typed).completions()


def _budget_lists(context: typer.Context, incomplete: str) -> list[str]:
    """Complete a list of budgets. `eval` accepts all budgets; other commands don't accept the automatic budgets."""
    budgets = ALL_BUDGETS if context.info_name == "eval" else Budget.PRESETS
    return _after_commas(incomplete, lambda last: budgets)


ALL_BUDGETS = (*Budget.PRESETS, *Budget.AUTOS)
BUDGETS = {"metavar": "LIST", "autocompletion": _budget_lists}
METHODS = {"metavar": "LIST", "autocompletion": lambda incomplete: _after_commas(incomplete, _methods)}
COMPLETED = {  # settings of pipeline options whose values can't be derived from the field type
    "model": {"metavar": "ID|DIR|demo", "autocompletion": lambda incomplete: [*DEMOS]},
    "budget": {"metavar": "SHARE|PRESET|auto", "autocompletion": lambda incomplete: [*ALL_BUDGETS]},
    "method": {"metavar": "NAME", "autocompletion": _methods},
}

# Declaring options.


def option(declared: Any, names: str, text: str, panel: str | None = None, **settings: Any) -> Any:
    """Declare an option as a type annotation.

    For example, `names` can be "-o --output FILE". `panel` is a section of the full help text.
    """
    *flags, last = names.split()
    if last.startswith("-"):
        flags.append(last)
    else:
        settings["metavar"] = last
    return Annotated[declared, typer.Option(*flags, help=text, rich_help_panel=panel, **settings)]


def argument(declared: Any, metavar: str, text: str) -> Any:
    """Declare a positional argument as a type annotation."""
    return Annotated[declared, typer.Argument(metavar=metavar, help=text, show_default=False)]


def command(*names: str, short: str, **changed: dict[str, Any]) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Return a decorator for command functions that adds pipeline options, `--debug` and `--help-all`.

    A command function either has a keyword parameter for each of its own arguments, or a single parameter whose type is a dataclass
    with a field for each of them. The decorator replaces the argument `options` with one command-line option for each of `names`.
    The function gets the typed values as `PipelineArguments`, and parses them itself, so invalid values are reported like all other
    errors in the command. All other pipeline options keep their defaults.

    Args:
        names: The pipeline options that the command accepts: names of fields of the dataclasses in `PipelineOptions`.
        short: The parameter names listed in the short help.
        changed: Overrides for the fields' `Option` settings, by field name.

    Raises:
        ValueError: If there is no such option.
    """
    offered = named(PipelineOptions.KINDS, names)
    declared = {name: replace(each.metadata[OPTION], **changed.get(name, {})) for name, (_, each) in offered.items()}
    pipeline = [_parameter(kind.PANEL, each, declared[name]) for name, (kind, each) in offered.items()]

    def decorate(function: Callable[..., int]) -> Callable[..., int]:
        own_parameters = list(signature(function).parameters.values())
        kind = own_parameters[0].annotation if own_parameters else None
        if is_dataclass(kind):
            own_parameters = [_own_parameter(field) for field in _own_fields_first(kind)]

        @wraps(function)
        def run(debug: bool, help_all: bool, **given: Any) -> int:
            if names:
                resumed = given.get("resume") and given.get("data", "") is None  # the earlier run specifies the model
                typed = {name: given.pop(name) for name in declared}
                given["options"] = PipelineArguments(declared, typed, check_model=not resumed)
            return function(kind(**given)) if is_dataclass(kind) else function(**given)

        parameters = [each for own in own_parameters for each in (pipeline if own.name == "options" else [own])]
        run.__signature__ = Signature([*parameters, *COMMON_PARAMETERS])
        run.__annotations__ = {}
        run.short = short.split()
        run.names = names
        return run

    return decorate


def _own_fields_first(kind: type) -> list[Field]:
    """Return the fields of a dataclass, with those of its base classes at the end, as they are listed in the help."""
    inherited = {name for base in kind.__mro__[1:] for name in getattr(base, "__annotations__", {})}
    return sorted(fields(kind), key=lambda field: field.name in inherited)


def _own_parameter(field: Field) -> Parameter:
    """Convert a field of a command's own dataclass to a Typer command parameter."""
    default = Parameter.empty if field.default is MISSING else field.default
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=field.type)


def _flags(name: str, declared: Option) -> str:
    """Return a field's command-line flags, separated by spaces, with the long form last."""
    return " ".join(declared.flags) or f"--{name.replace('_', '-')}"


def _parameter(panel: str, field: Any, declared: Option) -> Parameter:
    """Convert a field of an options dataclass to a Typer command parameter."""
    default = field.default if declared.unless_typed is None else declared.unless_typed
    kind = declared.typed
    if kind is None:
        kind = str if str in kinds_of(field.type) else field.type
    if default is None:
        kind = kind | None
    how = {"metavar": declared.metavar}
    if words := declared.words or words_of(field.type):
        how = one_of(*words)
    annotation = option(
        kind,
        _flags(field.name, declared),
        declared.help,
        panel,
        envvar=declared.env,
        min=declared.least,
        max=declared.most,
        show_default=default != "",
        **COMPLETED.get(field.name, how),
    )
    return Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


@dataclass(frozen=True)
class PipelineArguments:
    """The typed values of a command's pipeline options, by name, before they are parsed.

    Attributes:
        check_model: Whether to look for a local model.
    """

    declared: dict[str, Option]
    typed: dict[str, Any]
    check_model: bool

    def sources(self) -> dict[str, str]:
        """Return where the values that are not defaults come from, by name: "COMMANDLINE" or "ENVIRONMENT"."""
        sources = {name: typed().source(name) for name in self.typed}
        return {name: source for name, source in sources.items() if source in ("COMMANDLINE", "ENVIRONMENT")}

    def parse(self) -> PipelineOptions:
        """Return the options.

        Raises:
            UsageError: If a value is invalid.
            ModelError: If `check_model` is True, and the model is neither a folder nor a hub ID.
        """
        try:
            parsers = {name: option.parse for name, option in self.declared.items() if option.parse}
            options = PipelineOptions.of(
                **self.typed | {name: parse(self.typed[name]) for name, parse in parsers.items()}
            )
        except UsageError as problem:
            problem.message = _as_typed(problem.message, self.declared)
            raise
        if self.check_model and options.model.model:  # empty if `inspect` describes only this machine or a video
            options.model.local_folder()  # check the model before the imports, which take seconds
        return options


def _as_typed(message: str, declared: dict[str, Option]) -> str:
    """Replace the Python names of options in an error message with the corresponding command-line flags."""

    def typed(found: re.Match) -> str:
        name = found[0]
        return _flags(name, declared[name]).split()[-1].partition("/")[0] if name in declared else name

    return re.sub(
        r"^\w+(?= (is|and|needs)\b)|(?<= and )\w+(?= (exclude|cannot be combined)\b)|(?<= needs )\w+$", typed, message
    )


# Options shared by several commands.

# Panel titles.
SWEEP = "Sweep (separate values by commas, or repeat the option)"
OUTPUT = "Output"
Budgets = option(
    list[str] | None,
    "-b --budget",
    "Shares of visual tokens to keep, or presets; in eval also auto and auto:inflection; "
    f"default: {','.join(list(Budget.PRESETS)[1:])}. full is always included.",
    SWEEP,
    envvar="EVOPRUNE_BUDGET",
    **BUDGETS,
)
Methods = option(
    list[str] | None,
    "--method",
    f"Pruning methods (see evoprune methods); default: {MethodText.DEFAULT}. Also NAME:SETTING=VALUE, "
    "reuse+NAME, ipcv+NAME and NAME+fastv.",
    SWEEP,
    **METHODS,
)
Json = option(bool, "--json", "Print a JSON line per question, instead of text.", OUTPUT)
JsonResults = option(bool, "--json", "Print the results as one JSON line instead of a table.", OUTPUT)
ON = "on"
OFF = "off"
History = option(
    str | None,
    "--history",
    "Whether the prompt remembers earlier questions and answers; default: on, except for the demo models, which only know "
    "single questions.",
    **one_of(ON, OFF),
)
Overwrite = option(
    bool, "--overwrite", "Replace the records in FILE; a file that contains anything else is kept.", OUTPUT
)
Quiet = option(bool, "-q --quiet", "No progress, notes or stats, only warnings.", OUTPUT)
ShowThoughts = option(
    bool, "--show-thoughts", "Print the model's thoughts to stderr as they are generated (--think on).", OUTPUT
)
Stats = option(
    bool | None,
    "--stats/--no-stats",
    "Print stage times and token counts to stderr; default: on, except with --json or -q; one line per answer after the first.",
    OUTPUT,
)
Verbose = option(bool, "-v --verbose", "Also print layers' rows, settings and versions.", OUTPUT)
Via = option(
    str | None,
    "--via",
    "Ask the server at this address, which has loaded its model, instead of loading one. auto: the one that serve --detach "
    "started, if it runs. Options for loading a model belong to the server, except -m to choose one of its models.",
    "Model",
    envvar="EVOPRUNE_VIA",
    **one_of("auto", "URL"),
)
Cache = option(
    bool,
    "--cache/--no-cache",
    "Keep encoded videos on disk (at most 2 GiB, in the folder EVOPRUNE_CACHE_DIR) and reuse them.",
    OUTPUT,
)


@dataclass(frozen=True, kw_only=True)
class AnsweringArguments:
    """The arguments that `ask` and `watch` share, which say how answers are generated and printed."""

    show_thoughts: ShowThoughts = False
    options: PipelineArguments
    json: Json = False
    stats: Stats = None
    quiet: Quiet = False
    verbose: Verbose = False


def listed(texts: Sequence[str] | None) -> list[str]:
    """Return the values of a list option. Users can separate values with commas or repeat the option.

    Raises:
        UsageError: If the option was given without any values.
    """
    parts = [part.strip() for text in texts or [] for part in text.split(",") if part.strip()]
    if texts and not parts:
        raise UsageError(f"an option's list is empty: {texts[0]!r}", "give a value; is a shell variable unset?")
    return parts


def sweep(budgets: list[str] | None, names: list[str] | None, *, named: bool = False) -> dict:
    """Return the `budgets` and `methods` for a `profile` or `eval` sweep, without duplicates.

    If `named` is True, the budgets "auto" and "auto:inflection" are also allowed.

    Raises:
        UsageError: If a budget is invalid, or a method doesn't exist.
    """
    wanted = tuple(dict.fromkeys(listed(names) or [MethodText.DEFAULT]))
    for name in wanted:
        MethodText(name).check()
    shares = (Budget.parse(text, auto=named).recorded for text in listed(budgets) or list(Budget.PRESETS)[1:])
    return {"budgets": tuple(dict.fromkeys(shares)), "methods": wanted}


# Help is plain text, so it can be piped, and a narrow terminal doesn't cut off option names. `--help` lists the most common options
# on one screen. `--help-all` lists all options, grouped by panel.

COMPLETION_WIDTH = 60  # maximum length of the help text shown by shells next to an option
EVERYTHING = "evoprune.help_all"  # key in a context's `meta` if its help lists all options


def full_help(context: typer.Context) -> str:
    context.meta[EVERYTHING] = True
    return context.get_help()


def _print_full_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(full_help(context))
        raise typer.Exit


# Every command ends with these options. They are handled by `terminal.print_traceback` and by a callback, not by the command.
COMMON_PARAMETERS = [
    Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=annotation)
    for name, annotation in {
        "debug": option(bool, "--debug", "Show the traceback of an error.  [env var: EVOPRUNE_DEBUG]", OUTPUT),
        "help_all": option(bool, "--help-all", "Show all options and exit.", is_eager=True, callback=_print_full_help),
    }.items()
]


EXAMPLE = re.compile(r"^.*\bevoprune .*$(?<!\.)", re.M)  # a line of a description that is a command, not a sentence


def _continued(example: str, width: int) -> str:
    """Break a command into lines that the shell joins. Quoted arguments stay whole."""
    if len(example) <= width:
        return example
    words = re.sub(r"([\"']).*?\1", lambda quoted: quoted[0].replace(" ", GLUE), example)
    lines = textwrap.wrap(words, width - 2, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines).replace(GLUE, " ")


class Command(TyperCommand):
    """A Typer command with a short help text (`--help`) and a full help text (`--help-all`)."""

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Parse the arguments, unless the command is only used for shell completion or for generating the documentation.

        In these cases, only the option names are needed, and parsing their values would make Typer import pydantic.
        """
        if ctx.resilient_parsing:
            return []
        remember(Typed(ctx.info_name, args, ctx))
        flags = set(long_flags(self.params).values())
        for word in takewhile("--".__ne__, args):
            if f"-{word}".partition("=")[0] in flags:  # click would read -budget as -b udget
                raise UsageError(f"no such option: {word}", f"did you mean -{word}? long options have two dashes")
        return super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Run the command with stdout reserved for its answers."""
        with only_answers_on_stdout():
            return super().invoke(ctx)

    def format_help_text(self, ctx, formatter) -> None:
        """Write the description. Examples that are too long for the terminal are continued on the next line, as in a shell."""
        whole = self.help
        try:
            self.help = re.sub(EXAMPLE, lambda found: _continued(found[0], formatter.width), whole or "")
            super().format_help_text(ctx, formatter)
        finally:
            self.help = whole

    def format_options(self, ctx, formatter) -> None:
        """Write the options: for the full help, all options grouped by panel; otherwise, only the most common options."""
        everything = ctx.meta.get(EVERYTHING)
        sections = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            is_option = param.param_type_name == "option"
            if not everything and is_option:
                if param.name not in (*self.callback.short, "help"):
                    continue
                param = copy(param)
                param.help = re.sub(r"(\.) .*", r"\1", param.help or "", flags=re.DOTALL)  # only the first sentence
            if record := param.get_help_record(ctx):
                # Replace the Python type names of options with placeholders. Drop the type names of arguments.
                name = re.sub(r"^([^-\s]\S*) <.*>$", r"\1", record[0])
                name = name.replace("<str>", "TEXT").replace("<int>", "N").replace("<float>", "N")
                panel = "Arguments"
                if is_option:
                    panel = (everything and getattr(param, "rich_help_panel", None)) or "Options"
                sections.setdefault(panel, []).append((name, record[1]))
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=formatter.width // 3)  # longer names are put on a separate line

    def shell_complete(self, ctx, incomplete: str) -> list:
        """Return shell completions, each with the beginning of the option's help text."""
        items = super().shell_complete(ctx, incomplete)
        for item in items:
            item.help = textwrap.shorten(item.help or "", COMPLETION_WIDTH, placeholder="...")
        return items

    def format_epilog(self, ctx, formatter) -> None:
        if not ctx.meta.get(EVERYTHING):
            formatter.write_paragraph()
            formatter.write_text(f"All options: {ctx.command_path} --help-all")


def long_flags(params: Iterable[Any]) -> dict[str, str]:
    """Return the long flags of options by their names and by the flags' own words, such as max_new_tokens."""
    options = [param for param in params if param.param_type_name == "option" and not param.hidden]
    longest = {param.name: max(param.opts, key=len) for param in options}
    flags = [flag for param in options for flag in (*param.opts, *param.secondary_opts) if flag.startswith("--")]
    return longest | {flag[2:].replace("-", "_"): flag for flag in flags}
