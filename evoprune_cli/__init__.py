"""The command-line interface: parses arguments, calls evoprune, and prints the results.

Torch is imported only by commands that need it.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune_cli.cli_docs import reference
    from evoprune_cli.running import load, prepare
    from evoprune_cli.terminal import progress, tell

__all__ = [
    "load",
    "prepare",
    "progress",
    "reference",
    "tell",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "cli_docs": ["reference"],
        "running": ["load", "prepare"],
        "terminal": ["progress", "tell"],
    },
)
