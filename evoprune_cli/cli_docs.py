"""The command-line reference, made of `--help-all`: `python -m evoprune_cli.cli_docs > docs/cli.md`.

It is formatted for 80 columns and without colour, whatever the terminal.
"""

from typer.main import get_command

from evoprune_cli.main import app
from evoprune_cli.options import full_help
from evoprune_cli.terminal import WIDTH

INTRODUCTION = """# The command line

The `--help-all` of every command. Made by `python -m evoprune_cli.cli_docs > docs/cli.md`; do not edit.
"""


def reference() -> str:
    group = get_command(app)
    above = group.make_context("evoprune", [], resilient_parsing=True, terminal_width=WIDTH - 2)
    sections = [INTRODUCTION, _section("evoprune", above.get_help())]
    for name in sorted(group.commands):
        context = group.commands[name].make_context(name, [], parent=above, resilient_parsing=True)
        sections.append(_section(context.command_path, full_help(context)))
    return "\n".join(sections)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
