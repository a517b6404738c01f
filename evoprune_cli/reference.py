"""The command-line reference, made of what `--help` says: `python -m evoprune_cli.reference > docs/cli.md`.

Always as on a terminal of 80 columns and without colour, wherever it is made.
"""

from typer.main import get_command

from evoprune_cli.main import app
from evoprune_cli.render import WIDTH

INTRODUCTION = """# The command line

What `--help` says, of every command. Made by `python -m evoprune_cli.reference > docs/cli.md`; not to be edited.
"""


def reference() -> str:
    """What `docs/cli.md` holds."""
    group = get_command(app)
    above = group.make_context("evoprune", [], resilient_parsing=True, terminal_width=WIDTH - 2)
    parts = [INTRODUCTION, _section("evoprune", above.get_help())]
    for name in sorted(group.commands):
        context = group.commands[name].make_context(name, [], parent=above, resilient_parsing=True)
        parts.append(_section(context.command_path, context.get_help()))
    return "\n".join(parts)


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n```text\n{text.rstrip()}\n```\n"


if __name__ == "__main__":
    print(reference(), end="")
