"""Temporary files for inputs that are not files. Readers need files, because they seek and run in a separate process."""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from evoprune.errors import VideoError, named

PREFIX = "evoprune-"
LOCK = ".evoprune-lock"  # file in each temporary folder that is locked by the process using the folder


@contextmanager
def temporary_file(chunks: Iterable[bytes], name: str, file_name: str = "input") -> Iterator[str]:
    """Write bytes to a temporary file and yield its path. Error messages show `name` instead of the path.

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
    """Create a temporary folder that only the current user can read, yield its path, and delete the folder on exit.

    If this process is killed, the next process that calls this function deletes the folder. It finds the folder unlocked, because
    the operating system releases the lock no matter how a process ends. Windows has no such locks.

    Args:
        prefix: Prefix of the folder's name. It must begin with `PREFIX`.
    """
    _delete_abandoned(Path(tempfile.gettempdir()))
    while True:
        folder = tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True)
        with folder, open(os.path.join(folder.name, LOCK), "wb") as lock:
            with suppress(ImportError, OSError):  # Windows; a file system without locks
                import fcntl

                fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock.fileno()).st_nlink:  # otherwise another process deleted the folder before it was locked
                yield folder.name
                return


def _delete_abandoned(parent: Path) -> None:
    """Delete temporary folders of this user that were left behind by processes that have ended."""
    for folder in parent.glob(f"{PREFIX}*"):
        # No lock file, a lock that is held, or a folder that has just been deleted.
        with suppress(ImportError, OSError):
            import fcntl

            if folder.lstat().st_uid == os.getuid() and not folder.is_symlink():
                with open(folder / LOCK, "rb+") as lock:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    shutil.rmtree(folder, ignore_errors=True)
