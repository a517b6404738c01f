"""Text that is a result: to stdout, or to a file that was asked for."""

import os
import sys

from evoprune.errors import UsageError
from evoprune_cli.render import encodable


def check_writable(path: str | None) -> None:
    """Better now than when everything is measured."""
    if path is None:
        return
    folder = os.path.dirname(os.path.abspath(path))
    if (
        os.path.isdir(path)
        or not os.path.isdir(folder)
        or not os.access(path if os.path.exists(path) else folder, os.W_OK)
    ):
        raise UsageError(f"cannot write {path}", "name a file in a folder that is there and can be written")


def print_text(text: str) -> None:
    """To stdout, in what characters it can take."""
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
