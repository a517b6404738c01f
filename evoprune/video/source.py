"""Where a video comes from: a path, or standard input."""

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import BinaryIO

from evoprune.errors import UsageError, VideoError

STDIN = "-"
CHUNK_BYTES = 2**20
HINT = "pipe a video into it, e.g. evoprune ask - QUESTION < video.mp4"


@contextmanager
def local_file(source: str, stdin: BinaryIO | None = None) -> Iterator[str]:
    """A path to read the video from: `source` itself, or for `-` a temporary file that holds all of standard input.

    The temporary file is there because videos are not read from front to back only; it is deleted in the end.

    Args:
        source: a path, or `-` (a file of that name is `./-`).
        stdin: what to read for `-`; the process's standard input by default.

    Raises:
        UsageError: standard input is a terminal.
        VideoError: standard input is closed or empty, or cannot be stored.
    """
    if source != STDIN:
        yield source
        return
    stdin = stdin or getattr(sys.stdin, "buffer", None)
    if stdin is None or stdin.closed:
        raise VideoError("standard input is closed", HINT)
    if stdin.isatty():
        raise UsageError("- means standard input, which is a terminal", HINT)
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
        yield path
