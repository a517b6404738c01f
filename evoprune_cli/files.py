"""Results as text: to stdout or to a file."""

import os
import sys
from pathlib import Path

from evoprune.errors import UsageError
from evoprune_cli.terminal import encodable

OPEN_FILES = ("/dev/", "/proc/self/fd/")


def check_chart(path: str | None, beside: str | None = None) -> None:
    """As `check_writable`, for an SVG file."""
    if path is not None and not path.startswith(OPEN_FILES) and not path.lower().endswith(".svg"):
        raise UsageError(f"--chart {path}: charts are SVG files", "name it .svg")
    check_writable(path, beside)


def check_writable(path: str | None, beside: str | None = None) -> None:
    """Checks that a file can be written, before anything is measured.

    Args:
        path: the file.
        beside: a folder that will be made, with its parents.

    Raises:
        UsageError: it cannot.
    """
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if beside is not None and not os.path.exists(folder) and Path(os.path.abspath(beside)).is_relative_to(folder):
        return
    if (
        os.path.isdir(path)
        or not os.path.isdir(folder)
        or not os.access(path if os.path.exists(path) else folder, os.W_OK)
    ):
        raise UsageError(f"cannot write {path}", "name a file in a folder that exists and can be written")


def print_text(text: str) -> None:
    """Prints to stdout, with escapes for characters outside its encoding."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.replace("±", "+-")
    print(encodable(text, sys.stdout), end="", flush=True)


def write_text(path: str, text: str) -> None:
    """Raises: UsageError."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str, content: bytes) -> None:
    """Raises: UsageError."""
    try:
        with open(path, "wb") as file:
            file.write(content)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}", "choose another place") from problem
