"""A private folder of files that clients have sent, each content once. Those that nobody uses go in time, or for others."""

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
BLOCK_BYTES = 4096  # of a disk: what the smallest file takes
UNUSED_S = 600.0  # how long a content that nobody uses serves later questions


@dataclass(eq=False)
class Content:
    """A file.

    `users`: how many hold it; `used_s`: when the last one let it go, on the clock of `time.monotonic`. `stays`: whether it may stay
    on the disk where nobody holds it, for later questions.
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
    """The contents of a folder, and what is being received, at most `limit_bytes` on the disk. Threads may share it."""

    def __init__(self, folder: Path, limit_bytes: int):
        self._folder = folder
        self._limit_bytes = limit_bytes
        self._bytes = 0  # of all contents and rooms
        self._contents: dict[str, Content] = {}  # by digest
        self._unused: OrderedDict[str, Content] = OrderedDict()  # those that nobody holds, the oldest first
        self._lock = threading.Lock()

    @contextmanager
    def room(self) -> "Iterator[Room]":
        """Provide room for a file that is being received, which is free again in the end."""
        room = Room(self)
        try:
            yield room
        finally:
            with self._lock:
                self._free(room)

    def add(self, data: bytes) -> Content:
        """Return the file of these bytes, in use. Raises ApiError: there is no room."""
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
        """Return a file of the same bytes, in use. The file at `path` may be moved. Raises ApiError: there is no room.

        `room`: what it had while it was received, which becomes that of the content, as in `copy`.
        """
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        with self._stored():
            return self._keep(digest, path, room)

    def copy(self, file: BinaryIO, room: "Room") -> Content:
        """Return a file of what an open file holds, in use. Raises ApiError: there is no room."""
        digest = hashlib.sha256()
        with self._new_file() as copied:
            while chunk := file.read(CHUNK_BYTES):
                digest.update(chunk)
                copied.write(chunk)
            copied.close()
            return self._keep(digest.hexdigest(), copied.name, room)

    @contextmanager
    def link(self, file: BinaryIO) -> Iterator[str]:
        """Provide a path to an open file for other processes, whatever becomes of its name. Linux only.

        The number of the file may soon be that of another one, so the path is a link, which is removed first.
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
        """Uses a file once more; False where it is gone."""
        with self._lock:
            if self._contents.get(content.digest) is not content:
                return False
            self._use(content)
            return True

    def release(self, content: Content, stays: bool = True) -> None:
        """Uses it once less. `stays`: whether it may stay on the disk once nobody holds it."""
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
        """Provide a file that somebody else holds, in use. Raises ApiError: it was let go meanwhile."""
        if not self.take(content):
            raise ApiError(404, "the file was deleted", code="not_found")
        try:
            yield content
        finally:
            self.release(content)

    def drop_old(self) -> None:
        """Deletes what nobody has used for `UNUSED_S`."""
        while self._drop_one_old():  # others have the lock in between
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
        """Return the file of a content, in use: the one at `path`, which moves, unless there is one already."""
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
        """Provide a file in the folder, which is deleted in the end, unless it was moved."""
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

    # With the lock.

    def _known(self, digest: str) -> Content | None:
        """Return the file of a content, in use, if there is one."""
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
        """Deletes what nobody uses, the least recently used first. Raises ApiError: that is not enough."""
        while self._bytes + count > self._limit_bytes:
            if not self._unused:
                raise ApiError(507, "the server has no room for another file now", code="storage_full")
            self._remove(next(iter(self._unused.values())))

    def _remove(self, content: Content) -> None:
        del self._contents[content.digest], self._unused[content.digest]
        self._bytes -= content.disk_bytes
        with suppress(FileNotFoundError):
            os.unlink(content.path)


class Room:
    """The bytes of a file that is being received so far."""

    def __init__(self, store: Store):
        self.bytes = 0
        self._store = store

    def add(self, count: int) -> None:
        """Raises ApiError: there is no room for so many more."""
        self._store._reserve(self, count)


@contextmanager
def private_folder() -> Iterator[Path]:
    """Provide a `temporary_folder` that also has all other temporary files of this process meanwhile."""
    usual = tempfile.gettempdir()
    with temporary_folder(PREFIX) as folder:
        tempfile.tempdir = folder
        try:
            yield Path(folder)
        finally:
            tempfile.tempdir = usual
