"""Helpers for writing files atomically, reading files with a size limit, and sorting file names. Does not import torch."""

import glob
import os
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import BinaryIO

from evoprune.errors import UsageError

# Paths with these prefixes are opened and written directly instead of being replaced atomically. For example, the shell passes such
# a path for the pipe it creates for >(gzip > x).
OPEN_FILES = ("/dev/", "/proc/self/fd/")
# Name of a file while it is being written. The placeholders are the final name and eight random hexadecimal digits.
UNFINISHED = "{}.evoprune-{}.tmp"
MAX_BYTES = 2**28  # maximum size, in bytes, of a file to read into memory


def read_all(file: BinaryIO, name: str, hint: str) -> bytes:
    """Read an open file into memory, up to a size limit because pipes and devices may never reach end of file.

    Args:
        name: The file name for the error message.
        hint: Advice to append to the error's hint.

    Raises:
        UsageError: If the contents exceed `MAX_BYTES`.
    """
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} is larger than {MAX_BYTES // 2**20} MiB", f"split it; {hint}")
    return content


def write_file(path: str, content: bytes) -> None:
    """Write a file atomically: the contents go to a temporary file, which then replaces `path`.

    Raises:
        OSError: If the file can't be written.
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
    """Append bytes to an open file, and sync it to disk if it is a regular file.

    Args:
        number: The file descriptor.
        content: The bytes to append.
        regular: Whether this is a regular file. If so, a failed append is rolled back, so the file never ends with a partial write.

    Raises:
        OSError: If the bytes can't be written.
    """
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
    """Create a temporary file that will replace `path` when complete, and open it for reading and appending.

    Returns:
        The temporary file's descriptor and its unique name.

    Raises:
        OSError: If the file can't be created.
    """
    name = UNFINISHED.format(path, secrets.token_hex(4))
    return os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666), name


def remove_unfinished(path: str) -> None:
    """Delete leftover temporary files from programs that were killed while writing `path`.

    The caller must ensure that no other program is writing `path`.
    """
    for name in glob.glob(UNFINISHED.format(glob.escape(path), "[0-9a-f]" * 8)):
        with suppress(FileNotFoundError):
            os.unlink(name)


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort file names by the integers they contain, so frame2 comes before frame10.

    Dashes are not treated as minus signs, and dots separate two numbers.
    """
    from natsort import natsorted, ns  # imported here because the import takes tens of milliseconds

    return natsorted(sorted(names), alg=ns.PATH | ns.IGNORECASE)
