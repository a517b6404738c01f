"""Results as text: to stdout or to a file. A file that is there is replaced only if evoprune wrote it."""

import os
import stat
import sys
from collections.abc import Iterable
from pathlib import Path

from evoprune.errors import UsageError
from evoprune_cli.terminal import encodable

OPEN_FILES = ("/dev/", "/proc/self/fd/")
MARK, OVERLAY = b"evoprune", b"evoprune overlay"  # in every text that is written, and in every picture
LARGEST = 2**28  # bytes; larger files were not written here


def check_chart(path: str | None, beside: str | None = None, inputs: Iterable[str] = ()) -> None:
    """As `check_writable`, for an SVG file."""
    if path is not None and not path.startswith(OPEN_FILES) and not path.lower().endswith(".svg"):
        raise UsageError(f"--chart {path}: charts are SVG files", "name it .svg")
    check_writable(path, beside, inputs)


def check_writable(path: str | None, beside: str | None = None, inputs: Iterable[str] = ()) -> None:
    """Checks that a file can be written, before anything is measured.

    Args:
        path: the file.
        beside: a folder that will be made, with its parents.
        inputs: files and folders that are read; an empty name is none.

    Raises:
        UsageError: it cannot; it is one of the inputs, or in a folder that is one; or there is a file that evoprune did not write.
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
    if any(
        os.path.realpath(each) in (os.path.realpath(path), os.path.realpath(folder)) for each in filter(None, inputs)
    ):
        raise UsageError(f"{path} would change what is read", "name another place")
    if not _may_replace(path):
        raise UsageError(f"{path} is there, and evoprune did not write it", "name another file, or remove this one")


def _may_replace(path: str) -> bool:
    """Whether a file is missing, empty, a device or a pipe, or was written by evoprune."""
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode) or not found.st_size:
            return True
        content = Path(path).read_bytes() if found.st_size <= LARGEST else b""
        return OVERLAY in content or (b"\0" not in content and MARK in content)
    except FileNotFoundError:
        return True
    except OSError:
        return False


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
    """Raises: UsageError. What was there stays where there is no room for the new content."""
    try:
        folder = os.path.dirname(os.path.realpath(path))
        if os.path.exists(path) and not (os.path.isfile(path) and os.access(folder, os.W_OK)):
            with open(path, "wb") as file:
                file.write(content)
            return
        unfinished = f"{os.path.realpath(path)}.{os.getpid()}.tmp"
        try:
            with open(unfinished, "wb") as file:
                file.write(content)
            os.replace(unfinished, os.path.realpath(path))
        finally:
            Path(unfinished).unlink(missing_ok=True)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}", "choose another place") from problem
