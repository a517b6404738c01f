"""Generates the command-line reference from `--help-all`: `python -m evoprune_cli.cli_docs > docs/cli.md`.

It is formatted for 80 columns without color, regardless of the terminal.
"""

import re
from textwrap import fill

from typer.main import get_command

from evoprune_cli.main import app
from evoprune_cli.options import full_help
from evoprune_cli.terminal import WIDTH

OPTION = r"(?m)^(?=  -)"  # start of an option's help
INTRODUCTION = """# The command line

The `--help-all` of every command. Options that `ask` has in the same words are only named; all have `--help` and `--help-all`.
Made by `python -m evoprune_cli.cli_docs > docs/cli.md`; do not edit.
"""


def reference() -> str:
    group = get_command(app)
    above = group.make_context("evoprune", [], resilient_parsing=True, terminal_width=WIDTH - 2)
    help_all = {}
    for name in sorted(group.commands):
        context = group.commands[name].make_context(name, [], parent=above, resilient_parsing=True)
        help_all[name] = full_help(context)
    panels = help_all["ask"].split("\n\n")
    explained = {" ".join(option.split()) for panel in panels for option in re.split(OPTION, panel)}
    sections = [INTRODUCTION, _section("evoprune", above.get_help())]
    for name, text in help_all.items():
        if name != "ask":
            text = _without(explained, text)
        sections.append(_section(f"evoprune {name}", text))
    return "\n".join(sections)


def _without(explained: set[str], text: str) -> str:
    """Shorten help: options explained before are only named, in one line per panel."""
    panels = []
    for panel in text.rstrip().split("\n\n"):
        heading, *options = re.split(OPTION, panel)
        kept = [option.rstrip("\n") for option in options if " ".join(option.split()) not in explained]
        same = [re.search(r"--[\w-]+", option)[0] for option in options if " ".join(option.split()) in explained]
        same = [name for name in same if name not in ("--help", "--help-all")]
        if same:
            text = "As in ask: " + ", ".join(same)
            kept.append(fill(text, WIDTH - 2, initial_indent="  ", subsequent_indent="    ", break_on_hyphens=False))
        if kept or not options:
            panels.append("\n".join([heading.rstrip("\n"), *kept]))
    return "\n\n".join(panels)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
