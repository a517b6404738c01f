"""The environment variables that evoprune and its plug-ins read."""

import os
from difflib import get_close_matches

from evoprune.util import shorten, switched_on
from evoprune_cli import terminal

SECRET = "EVOPRUNE_API_KEY"  # `inspect` does not print its value
VARIABLES = {
    "EVOPRUNE_MODEL": "The default of `-m`.",
    "EVOPRUNE_MODELS": "Folders in which `evoprune models` looks for models, separated by colons (on Windows, semicolons).",
    "EVOPRUNE_BUDGET": "The default of `-b`.",
    "EVOPRUNE_THREADS": "The default of `--threads`.",
    "EVOPRUNE_VIA": "The default of `--via`.",
    "EVOPRUNE_CACHE_DIR": "The folder of the disk cache (`--cache`), of quantized weights and of transcripts. "
    "The default is `evoprune` in the user's cache folder. It doesn't switch on `--cache`.",
    "EVOPRUNE_DEBUG": "1 prints the traceback of an error, like `--debug`.",
    "EVOPRUNE_PLAIN": "1 turns off kernels and CUDA graphs.",
    SECRET: "The key that clients of `evoprune serve` have to send, and that `--via` sends.",
}
SWITCHES = ("EVOPRUNE_DEBUG", "EVOPRUNE_PLAIN")


def check_variables() -> None:
    """Raise UsageError if a variable that means yes or no has another value."""
    for name in SWITCHES:
        switched_on(name)


def warn_of_unknown() -> None:
    """Print a warning for each set variable whose name begins like those of evoprune but isn't one of them."""
    for name in sorted(os.environ):
        if name.startswith("EVOPRUNE_") and name not in VARIABLES:
            near = get_close_matches(name, VARIABLES, 1)
            hint = f"did you mean {near[0]}?" if near else "docs/cli.md lists all variables"
            terminal.print_titled("warning:", f"{shorten(name, 60)} is not a variable of evoprune ({hint})")
