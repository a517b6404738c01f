"""A private folder for files that clients have sent. Equal contents are stored once, and unused ones are evicted over time."""

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
BLOCK_BYTES = 4096  # disk block size, the space taken by the smallest file
UNUSED_S = 600.0  # how long an unused file is kept for later questions


@dataclass(eq=False)
class Content:
    """A stored file.

    Attributes:
        users: number of current users.
        used_s: when the last user released it, on the clock `time.monotonic`.
        stays: whether it may stay on disk while unused, for later questions.
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


class Store:
    """The stored files of a folder, including files still being received. Uses at most `limit_bytes` on disk. Thread-safe."""

    def __init__(self, folder: Path, limit_bytes: int):
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._bytes = 0  # stored files and reservations
        self._contents: dict[str, Content] = {}  # by digest
        self._unused: OrderedDict[str, Content] = OrderedDict()  # files without users, oldest first
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> "Iterator[Room]":
        """Reserve space for a file that is being received. The space is released at the end of the context."""
        room = Room(self)
        try:
            yield room
        finally:
            with self._lock:
                self._free(room)

    def add(self, data: bytes) -> Content:
        """Store bytes and return their file, in use.

        Raises:
            ApiError: there is no room.
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
        """Store the content of the file at `path`, which may be moved, and return the stored file, in use.

        Args:
            room: the space reserved while the file was received; it becomes the space of the stored file.

        Raises:
            ApiError: there is no room.
        """
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with self._stored():
            return self._keep(digest, path, room)

    def copy(self, file: BinaryIO, room: "Room") -> Content:
        """Store the content of an open file and return the stored file, in use. See `add_file` for `room`.

        Raises:
            ApiError: there is no room.
        """
        digest = hashlib.sha256()
        with self._new_file() as copied:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                copied.write(chunk)
            copied.close()
            return self._keep(digest.hexdigest(), copied.name, room)

    @contextmanager
    def link(self, file: BinaryIO) -> Iterator[str]:
        """Provide a path by which other processes can open an open file, even after it is renamed or deleted. Linux only.

        The path is a symbolic link, which is removed before the file is closed, because the descriptor may then be reused for
        another file.
        """
        path = str(self._folder / f"open-{secrets.token_hex(8)}")
        with self._stored():
            os.symlink(f"/proc/{os.getpid()}/fd/{file.fileno()}", path)
        try:
            yield path
        finally:
            with suppress(FileNotFoundError):
                os.unlink(path)

    def take(self, content: Content) -> bool:
        """Add a user to a file. Returns False if the file is no longer stored."""
        with self._lock:
            if self._contents.get(content.digest) is not content:
                return False
            self._use(content)
            return True

    def release(self, content: Content, stays: bool = True) -> None:
        """Remove a user from a file. With `stays=False`, the file is deleted when its last user releases it."""
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
        """Provide a file that another user holds, in use.

        Raises:
            ApiError: the file was deleted meanwhile.
        """
        if not self.take(content):
            raise ApiError(404, "the file was deleted", code="not_found")
        try:
            yield content
        finally:
            self.release(content)

    def drop_old(self) -> None:
        """Delete files that have been unused for `UNUSED_S`."""
        while self._drop_one_old():  # releases the lock after each file
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
        """Return the stored file with this digest, in use. Unless it exists, move the file at `path` into the store."""
        with self._lock:
            if known := self._known(digest):
                return known
            self._free(room)
            content = Content(str(self._folder / digest), digest, os.path.getsize(path))
            self._make_room(content.disk_bytes)
            shutil.move(path, content.path)
            self._contents[digest] = content
            self._bytes += content.disk_bytes
            return content

    @contextmanager
    def _new_file(self) -> Iterator[BinaryIO]:
        """Provide a new file in the folder. It is deleted at the end unless it was moved."""
        with self._stored(), tempfile.NamedTemporaryFile(dir=self._folder, delete=False) as file:
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
            raise ApiError(507, "the server cannot store a file", code="storage_full") from problem

    # Callers hold the lock.

    def _known(self, digest: str) -> Content | None:
        """Return the stored file with this digest, in use, or None."""
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
            ApiError: evicting all unused files is not enough.
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


class Room:
    """The space reserved for a file that is being received."""

    def __init__(self, store: Store):
        self.bytes = 0
        self._store = store

    def add(self, count: int) -> None:
        """Reserve `count` more bytes.

        Raises:
            ApiError: there is no room.
        """
        self._store._reserve(self, count)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Provide a `temporary_folder` and make it the default for all temporary files of this process."""
    usual = tempfile.gettempdir()
    with temporary_folder(PREFIX) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = usual
