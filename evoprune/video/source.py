"""The source of a video: a path, or standard input, which is copied to a file."""

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
    """A path to read the video from: `source` itself, or for `-` (a file of that name is `./-`) a copy of standard input.

    Readers seek, so standard input itself will not do. Names of files that this process has open, such as `/dev/stdin`, are
    resolved, because another process reads the video.

    Raises UsageError: standard input is a terminal. VideoError: it is closed, empty or a device, or cannot be stored.
    """
    if source.startswith(OPEN_FILES):
        resolved = os.path.realpath(source)
        if os.path.exists(source) and not os.path.exists(resolved):  # a pipe, as of <(command)
            raise VideoError(f"{source} is not a regular file", f"- reads a video from standard input: {HINT}")
        yield resolved
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
            hint = "set TMPDIR to a folder with room for the video"
            raise VideoError(f"cannot store standard input: {error.strerror or error}", hint) from error
        if not size:
            raise VideoError("standard input is empty", "did the command before the pipe fail?")
        try:
            yield path
        except VideoError as problem:  # the user does not know the temporary file
            problem.message = problem.message.replace(path, "standard input")
            raise


def _is_endless(stdin: BinaryIO) -> bool:
    """Whether standard input is a device, such as /dev/zero, which may never end. /dev/null does end."""
    try:
        found = os.fstat(stdin.fileno())
    except OSError:  # not a file of the operating system
        return False
    return stat.S_ISCHR(found.st_mode) and not os.path.samestat(found, os.stat(os.devnull))
