"""Helpers for writing files atomically, noticing changed files, opening files below a folder, and sorting file names.

Does not import torch.
"""

import errno
import glob
import os
import secrets
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, Generic, NamedTuple, Self, TypeVar

from evoprune.errors import UsageError

# Paths with these prefixes are opened and written directly instead of being replaced atomically. For example, the shell passes such
# a path for the pipe it creates for >(gzip > x).
OPEN_FILES = ("/dev/", "/proc/self/fd/")
BINARY = getattr(os, "O_BINARY", 0)  # without it, Windows changes the ends of lines
# Name of a file while it is being written. The placeholders are the final name and eight random hexadecimal digits.
UNFINISHED = "{}.evoprune-{}.tmp"
MAX_BYTES = 2**28  # maximum size, in bytes, of a file to read into memory
# Resolution of file times in nanoseconds. Linux sets them from a clock that advances up to 10 ms at a time. Some file systems store
# only whole or even seconds.
TICK_NS = 20 * 10**6
COARSE_TICK_NS = 2 * 10**9

Value = TypeVar("Value")


def cache_folder() -> Path:
    """Return the cache folder set in EVOPRUNE_CACHE_DIR, which defaults to `evoprune` in the user's cache folder."""
    standard = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "evoprune")
    return Path(os.path.expanduser(os.environ.get("EVOPRUNE_CACHE_DIR") or standard))


class FileIdentity(NamedTuple):
    """Values that change whenever a file is modified or replaced, or an entry of a folder is added, removed, or renamed.

    The ctime changes even if a replaced or modified file has the previous file's size and mtime, as after `cp -p` or `rsync -t`.
    """

    device: int
    inode: int
    size: int
    modified_ns: int  # mtime
    changed_ns: int  # ctime

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Self:
        """Return the current identity of a file or folder. Raises OSError if it does not exist."""
        status = os.stat(path)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)

    @classmethod
    def settled(cls, path: str | os.PathLike[str]) -> Self | None:
        """Return the current identity if any later change is certain to change it.

        Returns None if the file does not exist, or was changed so recently that another change might not advance its times.
        """
        now_ns = time.time_ns()
        try:
            identity = cls.of(path)
        except (OSError, ValueError):
            return None
        tick_ns = TICK_NS if identity.changed_ns % 10**9 else COARSE_TICK_NS
        return identity if now_ns - identity.changed_ns > tick_ns else None


class FileMemo(Generic[Value]):
    """A thread-safe store of values that were computed from files or folders. A value is used until its file changes.

    Args:
        most: Maximum number of values. The least recently used values are dropped first.
    """

    def __init__(self, most: int):
        self._most = most
        self._values: OrderedDict[tuple[str, FileIdentity, Hashable], Value] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[type, tuple[int]]:
        return FileMemo, (self._most,)  # copies start empty, because a lock cannot be copied

    def get(
        self,
        path: str | os.PathLike[str],
        compute: Callable[[], Value],
        is_kept: Callable[[Value], bool] = lambda value: True,
        also: Hashable = None,
    ) -> Value:
        """Return the stored value for a file, or compute and store it.

        Args:
            also: Anything else on which the value depends.

        The value is not stored if `is_kept` returns False, if the file changes during the computation, or if the file was modified
        so recently that another change might go unnoticed.

        Raises:
            OSError: The file was deleted during the computation.
            Exception: Any exception raised by `compute`.
        """
        identity = FileIdentity.settled(path)
        if identity is None:
            return compute()
        key = os.fspath(path), identity, also
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
        value = compute()
        if is_kept(value) and FileIdentity.of(path) == identity:
            with self._lock:
                self._values[key] = value
                if len(self._values) > self._most:
                    self._values.popitem(last=False)
        return value


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


def open_below(folder: Path, path: Path, is_folder: bool = False) -> int:
    """Open a regular file inside a folder for reading, without following symbolic links inside the folder.

    Unlike a check of the path before it is opened, this cannot be defeated by replacing a part of the path in between.

    Args:
        folder: The folder, without symbolic links in its path.
        path: The path of the file, which begins with `folder`.
        is_folder: Whether `path` is a folder instead. In this case, it may also be `folder` itself.

    Returns:
        The file descriptor.

    Raises:
        OSError: If there is no such file or folder, or its path contains a symbolic link.
        ValueError: If the path is not inside the folder.
    """
    parts = path.relative_to(folder).parts
    if not (parts or is_folder):
        raise ValueError(f"{path} is a folder")
    if sys.platform == "win32" or os.open not in os.supports_dir_fd:
        if not is_folder and not path.is_file():
            raise FileNotFoundError(path)
        return os.open(path, os.O_RDONLY | BINARY)
    with ExitStack() as stack:

        def opened(name: str | Path, flags: int, at: int | None = None) -> int:
            found = os.open(name, flags | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            stack.callback(os.close, found)
            return found

        found = opened(folder, os.O_DIRECTORY)
        for number, name in enumerate(parts, 1):
            inner = is_folder or number < len(parts)
            found = opened(name, os.O_DIRECTORY if inner else os.O_NONBLOCK, found)  # opening a pipe would block
        if not is_folder and not stat.S_ISREG(os.fstat(found).st_mode):
            raise FileNotFoundError(path)
        return os.dup(found)


def write_file(path: str, content: bytes) -> None:
    """Write a file atomically. See `replacing`."""
    with replacing(path) as file:
        file.write(content)


@contextmanager
def replacing(path: str | os.PathLike[str], mode: int = 0o666, through_links: bool = True) -> Iterator[BinaryIO]:
    """Context manager that writes a file atomically: a temporary file replaces `path` at the end of the block.

    A file that is replaced keeps its mode and, if possible, its owner. If the block raises an exception, nothing is replaced.

    Args:
        path: The file to write.
        mode: The mode of a new file, which is combined with the umask.
        through_links: If `path` is a symbolic link, whether to replace the link's target, which must be a regular file. Otherwise,
            the link itself is replaced, or whatever else is at `path`, except for a folder.

    Yields:
        The temporary file, opened for writing.

    Raises:
        OSError: If the file can't be written.
    """
    if through_links:
        path = os.path.realpath(path)
        if os.path.exists(path) and not os.path.isfile(path):
            raise OSError(errno.EINVAL, "not a regular file", path)
    number, unfinished = create_unfinished(path, mode)
    try:
        with open(number, "wb") as file:
            yield file
        os.replace(unfinished, path)
    except BaseException:
        with suppress(OSError):
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


def read_at(number: int, count: int, at: int) -> bytes:
    """Read `count` bytes of a file from offset `at`, or fewer at its end. Moves the file's position."""
    os.lseek(number, at, os.SEEK_SET)
    return os.read(number, count)


def create_unfinished(path: str, mode: int = 0o666, flags: int = 0) -> tuple[int, str]:
    """Create a temporary file that will replace `path` when complete, and open it for reading and writing.

    Args:
        path: The file to be replaced. If it is a regular file, the temporary file gets its mode and, if possible, its owner.
        mode: The mode of a new file, which is combined with the umask.
        flags: More flags for `os.open`.

    Returns:
        The temporary file's descriptor and its unique name.

    Raises:
        OSError: If the file can't be created.
    """
    name = UNFINISHED.format(path, secrets.token_hex(4))
    flags |= os.O_RDWR | os.O_CREAT | os.O_EXCL | BINARY
    before = None
    with suppress(FileNotFoundError):
        before = os.lstat(path)
    if before is None or not stat.S_ISREG(before.st_mode):
        return os.open(name, flags, mode), name
    number = os.open(name, flags, 0o600)
    try:
        if hasattr(os, "chown"):  # not on Windows
            with suppress(OSError):  # only root can give a file to another user, and not every file system has owners
                os.chown(name, before.st_uid, before.st_gid)
        os.chmod(name, stat.S_IMODE(before.st_mode))
    except BaseException:
        os.close(number)
        os.unlink(name)
        raise
    return number, name


def unfinished_pattern(path: str) -> str:
    """Return a glob pattern for the temporary files of `path`, which may itself be a pattern."""
    return UNFINISHED.format(path, "[0-9a-f]" * 8)


def remove_unfinished(path: str) -> None:
    """Delete leftover temporary files from programs that were killed while writing `path`.

    The caller must ensure that no other program is writing `path`.
    """
    for name in glob.glob(unfinished_pattern(glob.escape(path))):
        with suppress(FileNotFoundError):
            os.unlink(name)


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sort file names by the integers they contain, so frame2 comes before frame10.

    Dashes are not treated as minus signs, and dots separate two numbers.
    """
    from natsort import natsorted, ns  # imported here because the import takes tens of milliseconds

    return natsorted(sorted(names), alg=ns.PATH | ns.IGNORECASE)
