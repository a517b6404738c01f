"""Files that are written completely or not at all. All functions may raise OSError."""

import glob
import os
import secrets
from pathlib import Path

OPEN_FILES = ("/dev/", "/proc/self/fd/")  # written to as they are given, such as the pipe of >(gzip > x)
_NAME, _ANY = "{}.evoprune-{}.tmp", "[0-9a-f]" * 8


def replace(path: str, content: bytes) -> None:
    """Writes a file completely or not at all."""
    number, unfinished = create(path)
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def append(number: int, content: bytes, regular: bool = True) -> None:
    """Appends to an open file. To a `regular` one it appends all of the content or nothing, which is on the disk afterwards."""
    size, rest = os.fstat(number).st_size, memoryview(content)
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
        if regular:
            os.fsync(number)
    except BaseException:
        if regular:
            os.ftruncate(number, size)
        raise


def create(path: str) -> tuple[int, str]:
    """Creates an unfinished file for `path`, to read and to append to: its descriptor, and its name, which no file had before."""
    name = _NAME.format(path, secrets.token_hex(4))
    return os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666), name


def remove_left_overs(path: str) -> None:
    """Removes the unfinished files for `path` that killed programs left; no program may be writing one."""
    for name in glob.glob(_NAME.format(glob.escape(path), _ANY)):
        Path(name).unlink(missing_ok=True)
