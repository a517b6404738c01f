"""Saves non-file inputs to temporary files, because the readers run in a separate process and need to seek."""

import atexit
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path

from evoprune.errors import VideoError, named

PREFIX = "evoprune-"
LOCK = ".evoprune-lock"  # lock file in each temporary folder, held by the process that uses the folder


@contextmanager
def temporary_file(chunks: Iterable[bytes], name: str, file_name: str = "input") -> Iterator[str]:
    """Write bytes to a temporary file and yield its path. In error messages, the path is replaced with `name`.

    Raises:
        VideoError: The file cannot be stored.
    """
    with ExitStack() as stack:
        try:
            path = os.path.join(stack.enter_context(temporary_folder()), file_name)
            with open(path, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
        except OSError as error:
            hint = "set TMPDIR to a folder with room for it"
            raise VideoError(f"cannot store {name}: {error.strerror or error}", hint) from error
        with named({path: name}):
            yield path


@contextmanager
def temporary_folder(prefix: str = PREFIX) -> Iterator[str]:
    """Create a temporary folder that only the current user can access, yield its path, and delete the folder on exit.

    The folder is locked while it is in use. If this process is killed, the operating system releases the lock, and the next process
    that calls this function deletes the unlocked folder. On Windows, where this kind of lock is not available, the folder remains.

    Args:
        prefix: Prefix for the folder name. It must begin with `PREFIX`.
    """
    _delete_abandoned(Path(tempfile.gettempdir()))
    while True:
        path = os.path.join(tempfile.gettempdir(), f"{prefix}{secrets.token_hex(8)}")
        delete = partial(shutil.rmtree, path, ignore_errors=True)
        # Before the folder exists, so that a signal that ends this process leaves no folder behind. `tempfile.TemporaryDirectory`
        # creates the folder first.
        atexit.register(delete)
        try:
            os.mkdir(path, 0o700)
            with open(os.path.join(path, LOCK), "wb") as lock:
                if sys.platform != "win32":
                    import fcntl

                    with suppress(OSError):  # the file system may not support locking
                        fcntl.flock(lock, fcntl.LOCK_EX)
                # If there is no link, another process deleted the folder before it was locked.
                if os.fstat(lock.fileno()).st_nlink:
                    yield path
                    return
        finally:
            delete()
            atexit.unregister(delete)


def _delete_abandoned(parent: Path) -> None:
    """Delete the current user's temporary folders that were left behind by terminated processes."""
    if sys.platform == "win32":
        return
    import fcntl

    for folder in parent.glob(f"{PREFIX}*"):
        # Skip the folder if it has no lock file, is in use by another process, or has just been deleted.
        with suppress(OSError):
            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with open(folder / LOCK, "rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
