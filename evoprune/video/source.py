"""Where a video comes from: a path, or standard input."""

import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from evoprune.errors import UsageError, VideoError

STDIN = "-"
OPEN_FILES = ("/dev/stdin", "/dev/fd/", "/proc/self/")
CHUNK_BYTES = 2**20
HINT = "pipe a video into it, e.g. evoprune ask - QUESTION < video.mp4"


@contextmanager
def local_file(source: str, stdin: BinaryIO | None = None) -> Iterator[str]:
    """A path to read the video from: `source` itself, or for `-` a temporary file that holds all of standard input.

    The temporary file is there because videos are not read from front to back only; it is deleted in the end. Names of files that
    this process has open, such as `/dev/stdin`, become their true ones, because it is another process that reads videos.

    Args:
        source: a path, or `-` (a file of that name is `./-`).
        stdin: what to read for `-`; the process's standard input by default.

    Raises:
        UsageError: standard input is a terminal.
        VideoError: standard input is closed, empty or a device, or cannot be stored.
    """
    if source.startswith(OPEN_FILES):
        yield os.path.realpath(source)
        return
    if source != STDIN:
        yield source
        return
    stdin = stdin or getattr(sys.stdin, "buffer", None)
    if stdin is None or stdin.closed:
        raise VideoError("standard input is closed", HINT)
    if stdin.isatty():
        raise UsageError("- means standard input, which is a terminal", HINT)
    if _is_endless(stdin):
        raise VideoError("standard input is a device, not a video", HINT)
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="evoprune-"))
            path = os.path.join(folder, "stdin")
            with open(path, "wb") as file:
                shutil.copyfileobj(stdin, file, CHUNK_BYTES)
                size = file.tell()
        except OSError as error:
            reason = error.strerror or error
            raise VideoError(
                f"cannot store standard input: {reason}", "set TMPDIR to a folder with room for the video"
            ) from error
        if not size:
            raise VideoError("standard input is empty", "did the command before the pipe fail?")
        try:
            yield path
        except VideoError as problem:  # nobody knows that file
            problem.message = problem.message.replace(path, "standard input")
            raise


def _is_endless(stdin: BinaryIO) -> bool:
    """Whether it is a device such as /dev/zero, of which there may be no end; /dev/null has one."""
    try:
        found = os.fstat(stdin.fileno())
    except OSError:  # it is no file of the system's
        return False
    return stat.S_ISCHR(found.st_mode) and not os.path.samestat(found, os.stat(os.devnull))
