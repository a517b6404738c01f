"""A private folder of files that clients have sent, each content once. Those that nobody uses go when room is needed."""

import hashlib
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evoprune_serve.errors import ApiError

PREFIX = "evoprune-serve-"
LOCK = "lock"  # a file in the folder that its process holds locked, until it ends in whatever way
CHUNK_BYTES = 2**20


@dataclass(eq=False)
class Content:
    """A file.

    `users`: how many hold it; `used_s`: when the last one began, on the clock of `time.monotonic`. `stays`: whether it may stay on
    the disk where nobody holds it, for later questions.
    """

    path: str
    digest: str
    size: int
    users: int = 1
    used_s: float = 0.0
    stays: bool = True


class Store:
    """The contents of a folder, at most `limit_bytes`. Threads may share it."""

    def __init__(self, folder: Path, limit_bytes: int):
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._contents: dict[str, Content] = {}  # by digest
        self._lock = threading.Lock()

    def add(self, data: bytes) -> Content:
        """Return the file of these bytes, in use. Raises ApiError: there is no room."""
        return self._keep(hashlib.sha256(data).hexdigest(), len(data), lambda path: Path(path).write_bytes(data))

    def add_file(self, path: str) -> Content:
        """Return a file of the same bytes, in use. The file at `path` may be moved. Raises ApiError: there is no room."""
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self._keep(digest, os.path.getsize(path), lambda place: shutil.move(path, place))

    def copy(self, file: BinaryIO) -> Content:
        """Return a file of what an open file holds, in use. Raises ApiError: there is no room."""
        digest = hashlib.sha256()
        size = 0
        with self._stored(), tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as copied:
            try:
                while chunk := file.read(CHUNK_BYTES):
                    digest.update(chunk)
                    size += len(chunk)
                    copied.write(chunk)
                copied.close()
                return self._keep(digest.hexdigest(), size, lambda place: os.replace(copied.name, place))
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(copied.name)

    def take(self, content: Content) -> bool:
        """Uses a file once more; False where it is gone."""
        with self._lock:
            if self._contents.get(content.digest) is not content:
                return False
            content.users += 1
            content.used_s = time.monotonic()
            return True

    def release(self, content: Content, stays: bool = True) -> None:
        """Uses it once less. `stays`: whether it may stay on the disk once nobody holds it."""
        with self._lock:
            content.users -= 1
            content.stays = content.stays and stays
            if not (content.users or content.stays):
                self._remove(content)

    @contextmanager
    def using(self, content: Content) -> Iterator[Content]:
        """Provide a file that somebody else holds, in use. Raises ApiError: it was let go meanwhile."""
        if not self.take(content):
            raise ApiError(404, "the file was deleted", code="not_found")
        try:
            yield content
        finally:
            self.release(content)

    def _keep(self, digest: str, size: int, write: Callable[[str], object]) -> Content:
        with self._lock:
            known = self._contents.get(digest)
            if known:
                known.users += 1
                known.used_s = time.monotonic()
                known.stays = True
                return known
            self._make_room(size)
            path = str(self._folder / digest)
            with self._stored():
                write(path)
            self._contents[digest] = Content(path, digest, size, used_s=time.monotonic())
            return self._contents[digest]

    def _make_room(self, size: int) -> None:
        """Deletes what nobody uses, the least recently used first. Raises ApiError: that is not enough."""
        total = size + sum(content.size for content in self._contents.values())
        for content in sorted(self._contents.values(), key=lambda content: content.used_s):
            if total <= self._limit_bytes:
                return
            if not content.users:
                total -= content.size
                self._remove(content)
        if total > self._limit_bytes:
            raise ApiError(507, "the server has no room for another file now", code="storage_full")

    def _remove(self, content: Content) -> None:
        """Deletes a file; with the lock."""
        del self._contents[content.digest]
        with suppress(FileNotFoundError):
            os.unlink(content.path)

    @contextmanager
    def _stored(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            raise ApiError(507, "the server cannot store a file", code="storage_full") from problem


@contextmanager
def private_folder() -> Iterator[Path]:
    """Provide a new folder that nobody else may read, which is removed in the end, as are those that killed servers left.

    Temporary files of this process are in it meanwhile.
    """
    usual = tempfile.gettempdir()
    _remove_left(Path(usual))
    folder = tempfile.mkdtemp(prefix=PREFIX)
    with open(os.path.join(folder, LOCK), "wb") as lock:
        _try_lock(lock)
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = usual
            shutil.rmtree(folder, ignore_errors=True)


def _remove_left(parent: Path) -> None:
    """Removes folders of servers of this user that have ended without removing them."""
    if sys.platform == "win32":  # which has no such locks
        return
    for folder in parent.glob(f"{PREFIX}*"):
        try:
            if folder.is_symlink() or folder.stat().st_uid != os.getuid():
                continue
            with open(folder / LOCK, "rb+") as lock:
                left = _try_lock(lock)
        except OSError:  # of another user, or just being made or removed
            continue
        if left:
            shutil.rmtree(folder, ignore_errors=True)


def _try_lock(file: BinaryIO) -> bool:
    """Locks a file until it is closed, unless another process has."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
