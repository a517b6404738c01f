"""Errors and signals as JSON records have them, with the exit code."""

import os
import sys
import traceback

from evoprune.errors import error_record

FROM_ENVIRONMENT = {"EVOPRUNE_MODEL": "-m", "EVOPRUNE_BUDGET": "-b"}  # with the option each sets


class Terminated(BaseException):
    """SIGTERM as an exception, so that finished results are printed and files closed."""


def failure(problem: BaseException) -> dict:
    """`errors.error_record` for everything that can end a command: also signals, and values from the environment."""
    for signal, code, name in ((KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")):
        if isinstance(problem, signal):
            return {"code": code, "type": name, "stage": None, "message": name, "hint": None}
    record = error_record(problem)
    for name, option in FROM_ENVIRONMENT.items():
        value = os.environ.get(name)
        typed = any(word in (value, f"{option}{value}") or word.endswith(f"={value}") for word in sys.argv)
        if value and not typed and repr(value) in record["message"]:
            record["hint"] = f"{record['hint'] or ''}; the value comes from {name}".lstrip("; ")
    return record


def print_traceback(problem: BaseException) -> None:
    """Where tracebacks are wanted."""
    if "--debug" in sys.argv[1:] or os.environ.get("EVOPRUNE_DEBUG", "") not in ("", "0"):
        traceback.print_exception(problem)
