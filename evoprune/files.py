"""Files: write them completely or not at all, even if the program crashes; limit their size; sort their names. Imports no torch."""

import glob
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO

from evoprune.errors import UsageError

OPEN_FILES = ("/dev/", "/proc/self/fd/")  # paths that are written directly, such as the pipe of >(gzip > x)
UNFINISHED = (
    "{}.evoprune-{}.tmp"  # temporary name while a file is being written: its final name and eight hexadecimal digits
)
MAX_BYTES = 2**28  # maximum size of a file that is read into memory


def read_all(file: BinaryIO, name: str, hint: str) -> bytes:
    """Return the content of an open file, which may be endless.

    Raises:
        UsageError: If the content is larger than `MAX_BYTES`.
    """
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} is larger than {MAX_BYTES // 2**20} MiB", f"split it; {hint}")
    return content


def write_file(path: str, content: bytes) -> None:
    """Write a file completely or not at all.

    Raises OSError on failure, like the functions below.
    """
    number, unfinished = create_unfinished(path)
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def append(number: int, content: bytes, regular: bool = True) -> None:
    """Append to an open file. For a `regular` file, either all of `content` is appended and synced to disk, or nothing is."""
    size = os.fstat(number).st_size
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
        if regular:
            os.fsync(number)
    except BaseException:
        if regular:
            os.ftruncate(number, size)
        raise


def create_unfinished(path: str) -> tuple[int, str]:
    """Create a temporary file for `path`, open for reading and appending. Return its file descriptor and its unique name."""
    name = UNFINISHED.format(path, secrets.token_hex(4))
    return os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666), name


def remove_unfinished(path: str) -> None:
    """Remove temporary files for `path` that killed programs have left behind. No other program may be writing `path`."""
    for name in glob.glob(UNFINISHED.format(glob.escape(path), "[0-9a-f]" * 8)):
        with suppress(FileNotFoundError):
            os.unlink(name)


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort file names by the whole numbers in them, so that frame2 comes before frame10.

    A dash is not a minus sign, and a dot separates two numbers.
    """
    from natsort import natsorted, ns  # the import takes tens of milliseconds

    return natsorted(sorted(names), alg=ns.PATH | ns.IGNORECASE)
