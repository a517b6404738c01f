"""Stores files from clients in a private folder. Identical files are stored only once, and unused files are evicted."""

import errno
import hashlib
import os
import secrets
import shutil
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from evoprune.video import temporary_folder
from evoprune_serve.errors import ApiError

PREFIX = "evoprune-serve-"
CHUNK_BYTES = 2**20
BLOCK_BYTES = 4096  # size of a disk block: the space used by the smallest file
UNUSED_S = 600.0  # retention time for unused files, in seconds
FileState = tuple[int, ...]  # changes if a file is modified or replaced


def file_state(file: BinaryIO) -> FileState:
    state = os.fstat(file.fileno())
    return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns


@dataclass(eq=False)
class Content:
    """A file in the store.

    Attributes:
        users: Reference count: the number of callers using the file. The file is only evicted if this is 0.
        used_s: Time at which the last user released the file, on the `time.monotonic` clock.
        stays: Whether the file may stay on disk for later questions while it has no users.
    """

    path: str
    digest: str
    size: int
    users: int = 1
    used_s: float = 0.0
    stays: bool = True

    @property
    def disk_bytes(self) -> int:
        return -(-self.size // BLOCK_BYTES) * BLOCK_BYTES


@dataclass(eq=False)
class Link:
    """A path to an open file. `users` counts the callers using the path; the file is closed if there aren't any."""

    path: str
    file: BinaryIO
    users: int = 0


class Store:
    """A thread-safe file store in `folder`. Stored and incoming files take up at most `limit_bytes` on disk."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder = folder
        self._limit_bytes = limit_bytes
        self._bytes = 0  # total size of all stored files and reservations
        self._contents: dict[str, Content] = {}  # by digest
        self._unused: OrderedDict[str, Content] = OrderedDict()  # unused files, least recently used first
        self._links: dict[FileState, Link] = {}
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> "Iterator[Room]":
        """Yield a `Room` that reserves disk space for an incoming file. The space is released when the context ends."""
        room = Room(self)
        try:
            yield room
        finally:
            with self._lock:
                self._free(room)

    def add(self, data: bytes) -> Content:
        """Store bytes as a file and return the file. The caller becomes a user of the file.

        Raises:
            ApiError: If the store is full.
        """
        digest = hashlib.sha256(data).hexdigest()
        with self._lock:
            if known := self._known(digest):
                return known
        with self.room() as room, self._new_file() as file:
            room.add(len(data))
            file.write(data)
            file.close()
            return self._keep(digest, file.name, room)

    def add_file(self, path: str, room: "Room") -> Content:
        """Store and return the file at `path`, which may be moved. The caller becomes a user of the stored file.

        Args:
            room: The space reserved while receiving the file, which is transferred to the stored file.

        Raises:
            ApiError: If the store is full.
        """
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with self._stored():
            return self._keep(digest, path, room)

    @contextmanager
    def incoming(self, room: "Room") -> "Iterator[Incoming]":
        """Yield a file to write to. Unless it is kept, it is deleted when the context ends. For `room`, see `add_file`.

        Raises:
            ApiError: If the store is full.
        """
        with self._new_file() as file:
            yield Incoming(self, file, room)

    def copy(self, file: BinaryIO, room: "Room") -> Content:
        """Store and return a copy of an open file. The caller becomes a user of the copy. For `room`, see `add_file`.

        Raises:
            ApiError: If the store is full.
        """
        with self.incoming(room) as incoming:
            while chunk := file.read(CHUNK_BYTES):
                incoming.write(chunk)
            return incoming.keep()

    @contextmanager
    def link(self, file: BinaryIO) -> Iterator[str]:
        """Yield a path that lets other processes open a file even after it is renamed or deleted. Linux only.

        The path is a symbolic link to the open file's descriptor. All users of the same unchanged file get the same path, which
        stays valid until the last of them leaves the context, because requests about the same file share the work of reading it.
        This method closes `file`.
        """
        state = file_state(file)
        with self._lock:
            link = self._links.get(state)
            if link:
                file.close()
            else:
                path = str(self.folder / f"open-{secrets.token_hex(8)}")
                try:
                    with self._stored():
                        os.symlink(f"/proc/{os.getpid()}/fd/{file.fileno()}", path)
                except BaseException:
                    file.close()
                    raise
                link = self._links[state] = Link(path, file)
            link.users += 1
        try:
            yield link.path
        finally:
            with self._lock:
                link.users -= 1
                if not link.users:
                    del self._links[state]
                    # Remove the link first, because the descriptor could be reused for a different file.
                    with suppress(FileNotFoundError):
                        os.unlink(link.path)
                    link.file.close()

    def known(self, digest: str) -> Content | None:
        """Return the stored file with the given digest, or None. The caller becomes a user of the file."""
        with self._lock:
            return self._known(digest)

    def take(self, content: Content) -> bool:
        """Register a new user of a file. Returns False if the file is no longer stored."""
        with self._lock:
            if self._contents.get(content.digest) is not content:
                return False
            self._use(content)
            return True

    def release(self, content: Content, stays: bool = True) -> None:
        """Stop using a file. If `stays` is False, the file is deleted as soon as it has no other users."""
        with self._lock:
            content.users -= 1
            content.stays = content.stays and stays
            if content.users:
                return
            content.used_s = time.monotonic()
            self._unused[content.digest] = content
            if not content.stays:
                self._remove(content)

    @contextmanager
    def using(self, content: Content) -> Iterator[Content]:
        """Context manager that registers a user of a stored file, so the file isn't evicted within the context.

        Raises:
            ApiError: If the file has been deleted in the meantime.
        """
        if not self.take(content):
            raise ApiError(404, "the file was deleted", code="not_found")
        try:
            yield content
        finally:
            self.release(content)

    def drop_old(self) -> None:
        """Delete files that haven't been used for `UNUSED_S` seconds."""
        while self._drop_one_old():  # the lock is released after each file
            pass

    def _drop_one_old(self) -> bool:
        with self._lock:
            oldest = next(iter(self._unused.values()), None)
            if oldest is None or time.monotonic() - oldest.used_s < UNUSED_S:
                return False
            self._remove(oldest)
            return True

    def _reserve(self, room: "Room", count: int) -> None:
        with self._lock:
            self._make_room(count)
            self._bytes += count
            room.bytes += count

    def _keep(self, digest: str, path: str, room: "Room") -> Content:
        """Return the stored file with the given digest.

        If it doesn't exist, store the file at `path`. The caller becomes a user.
        """
        with self._lock:
            if known := self._known(digest):
                return known
            self._free(room)
            content = Content(str(self.folder / digest), digest, os.path.getsize(path))
            self._make_room(content.disk_bytes)
            shutil.move(path, content.path)
            self._contents[digest] = content
            self._bytes += content.disk_bytes
            return content

    @contextmanager
    def _new_file(self) -> Iterator[BinaryIO]:
        """Yield a new temporary file in the store's folder. Unless moved, it is deleted when the context ends."""
        with self._stored(), tempfile.NamedTemporaryFile(dir=self.folder, delete=False) as file:
            try:
                yield file
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(file.name)

    @contextmanager
    def _stored(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            full = problem.errno in (errno.ENOSPC, errno.EDQUOT)
            message = "the server's disk is full" if full else "the server cannot store a file"
            raise ApiError(507, message, code="storage_full") from problem

    # Callers of these methods must hold the lock.

    def _known(self, digest: str) -> Content | None:
        """Return the stored file with the given digest, or None. The caller becomes a user of the file."""
        known = self._contents.get(digest)
        if known:
            self._use(known)
            known.stays = True
        return known

    def _use(self, content: Content) -> None:
        content.users += 1
        self._unused.pop(content.digest, None)

    def _free(self, room: "Room") -> None:
        self._bytes -= room.bytes
        room.bytes = 0

    def _make_room(self, count: int) -> None:
        """Evict the least recently used files until `count` more bytes fit.

        Raises:
            ApiError: If evicting all unused files isn't enough.
        """
        while self._bytes + count > self._limit_bytes:
            if not self._unused:
                raise ApiError(507, "the server has no room for another file at the moment", code="storage_full")
            self._remove(next(iter(self._unused.values())))

    def _remove(self, content: Content) -> None:
        del self._contents[content.digest], self._unused[content.digest]
        self._bytes -= content.disk_bytes
        with suppress(FileNotFoundError):
            os.unlink(content.path)


class Incoming:
    """A file that is being received."""

    def __init__(self, store: Store, file: BinaryIO, room: "Room"):
        self.bytes = 0
        self._store = store
        self._file = file
        self._room = room
        self._digest = hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._digest.update(data)
        self._file.write(data)
        self.bytes += len(data)

    def close(self) -> str:
        """Write the rest of the file to the disk and return its path."""
        self._file.close()
        return self._file.name

    def keep(self) -> Content:
        """Store and return the file. The caller becomes a user of it.

        Raises:
            ApiError: If the store is full.
        """
        return self._store._keep(self._digest.hexdigest(), self.close(), self._room)


class Room:
    """The disk space reserved for an incoming file."""

    def __init__(self, store: Store):
        self.bytes = 0
        self._store = store

    def add(self, count: int) -> None:
        """Reserve `count` more bytes of disk space.

        Raises:
            ApiError: If the store is full.
        """
        self._store._reserve(self, count)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Yield a new `temporary_folder`. Within the context, all temporary files of this process are created inside it."""
    usual = tempfile.gettempdir()
    with temporary_folder(PREFIX) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = usual
