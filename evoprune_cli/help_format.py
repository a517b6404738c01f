"""Help as plain text, which can be piped and keeps the names of options whole on a narrow terminal.

`--help` has the options that most people need, on one screen; `--help-all` has all of them, under the titles of their panels.
"""

import re
import textwrap
from copy import copy
from typing import Annotated, ClassVar

import typer
from typer.core import TyperCommand, TyperGroup

from evoprune_cli.terminal import only_answers_on_stdout

BESIDE_NAMES = 60  # characters of help that a shell prints beside the name of an option
EVERYTHING = "evoprune.help_all"  # in the `meta` of a context whose help names every option


def full_help(context: typer.Context) -> str:
    context.meta[EVERYTHING] = True
    return context.get_help()


def _print_full_help(context: typer.Context, wanted: bool) -> None:
    if wanted:
        typer.echo(full_help(context))
        raise typer.Exit


HelpAll = Annotated[
    bool, typer.Option("--help-all", is_eager=True, callback=_print_full_help, help="Show all options and exit.")
]


class Group(TyperGroup):
    """All commands. To find the one that a line names, nothing imports pydantic."""

    def get_help_option(self, ctx):
        """With a default that is False, and not None, which Typer would convert with pydantic."""
        option = super().get_help_option(ctx)
        option.default = False
        return option


class Command(TyperCommand):
    """A command with a short and a full help."""

    common: ClassVar[tuple[str, ...]] = ()  # names of the parameters in the short help

    def parse_args(self, ctx, args: list[str]) -> list[str]:
        """Nothing where names alone are wanted, for a shell or a document: Typer would import pydantic for the values."""
        return [] if ctx.resilient_parsing else super().parse_args(ctx, args)

    def invoke(self, ctx):
        """Runs the command; stdout is then for its answers alone."""
        with only_answers_on_stdout():
            return super().invoke(ctx)

    def format_options(self, ctx, formatter) -> None:
        """Every option under the title of its panel, or the common ones in one list."""
        everything = ctx.meta.get(EVERYTHING)
        sections = {"Arguments": [], "Options": []}
        for param in self.get_params(ctx):
            argument = param.param_type_name == "argument"
            if not (everything or argument or param.name in (*self.common, "help")):
                continue
            if record := (param if everything else _brief(param)).get_help_record(ctx):
                record = _named(record[0]), record[1]
                panel = (everything and getattr(param, "rich_help_panel", None)) or "Options"
                sections.setdefault("Arguments" if argument else panel, []).append(record)
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=formatter.width // 3)  # longer names get a line of their own

    def shell_complete(self, ctx, incomplete: str) -> list:
        """The names of options for a shell, each with the beginning of its help."""
        found = super().shell_complete(ctx, incomplete)
        for item in found:
            item.help = textwrap.shorten(item.help or "", BESIDE_NAMES, placeholder="...")
        return found

    def format_epilog(self, ctx, formatter) -> None:
        if not ctx.meta.get(EVERYTHING):
            formatter.write_paragraph()
            formatter.write_text(f"All options: {ctx.command_path} --help-all")


def _named(signature: str) -> str:
    """What a parameter is called, with a word for its values in the place of a type of Python; those of arguments need none."""
    signature = re.sub(r"^([^-\s]\S*) <.*>$", r"\1", signature)
    return signature.replace("<str>", "TEXT").replace("<int>", "N").replace("<float>", "N")


def _brief(param):
    """The parameter with the first sentence of its help."""
    brief = copy(param)
    if param.param_type_name == "option":
        brief.help = re.sub(r"(\.) .*", r"\1", param.help or "", flags=re.DOTALL)
    return brief


def showing(*common: str) -> type[Command]:
    """The class of a command whose short help has the parameters of these names, and its arguments."""
    return type("Command", (Command,), {"common": common})
