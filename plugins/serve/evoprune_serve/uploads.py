"""Manages files uploaded to /v1/files. Files are kept until they are deleted or expire."""

import os
import secrets
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from evoprune.errors import EvopruneError
from evoprune.util import one_line, size
from evoprune.video import probe
from evoprune_serve.errors import ApiError, told
from evoprune_serve.fields import json_text
from evoprune_serve.store import Content, Incoming, Room, Store

MOST = 4000  # maximum number of uploaded files
MOST_OF_CLIENT = 1000  # maximum number of files from one client
NAME_CHARACTERS = 200
PURPOSES = ("user_data", "vision", "assistants")


@dataclass(frozen=True)
class Upload:
    """An uploaded file. Its `name` was chosen by the client. Times are Unix timestamps in seconds."""

    id: str
    content: Content
    name: str
    purpose: str
    created: int
    expires: int
    client: str

    def record(self) -> dict[str, Any]:
        """Return a description of the uploaded file in OpenAI's format."""
        return {
            "id": self.id,
            "object": "file",
            "bytes": self.content.size,
            "created_at": self.created,
            "expires_at": self.expires,
            "filename": self.name,
            "purpose": self.purpose,
            "status": "processed",
        }


class Uploads:
    """A thread-safe collection of uploaded files.

    Args:
        age_s: How long each file is kept, in seconds.
        client_bytes: Maximum disk space for the files of one client, in bytes.
    """

    def __init__(self, store: Store, age_s: float, client_bytes: int):
        self._store = store
        self._age_s = age_s
        self._client_bytes = client_bytes
        self._uploads: dict[str, Upload] = {}
        # The number and the bytes of each client's files, including files that are being received.
        self._files: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._lock = threading.Lock()

    @contextmanager
    def incoming(self, client: str) -> "Iterator[IncomingUpload]":
        """Yield an upload that is being received. Unless it is kept, it is deleted when the context ends.

        Raises:
            ApiError: If there are too many files, or the file can't be stored.
        """
        self.drop_old()
        with self._lock:
            if self._files[client] >= MOST_OF_CLIENT:
                raise _too_much(f"your client has uploaded {MOST_OF_CLIENT} files already")
            if self._files.total() >= MOST:
                raise ApiError(507, f"there are {MOST} files already: delete some", code="storage_full")
            self._files[client] += 1
        upload = None
        try:
            with self._store.room() as room, self._store.incoming(room) as file:
                upload = IncomingUpload(self, client, file, room)
                yield upload
        finally:
            if upload is None or not upload.kept:
                self._leave(client, upload.bytes if upload else 0)

    def _reserve(self, client: str, count: int) -> None:
        with self._lock:
            if self._bytes[client] + count > self._client_bytes:
                raise _too_much(f"the files of one client may take at most {size(self._client_bytes)}")
            self._bytes[client] += count

    def _keep(self, incoming: "IncomingUpload", content: Content, name: str, purpose: str) -> Upload:
        now = int(time.time())
        identity = f"file-{secrets.token_hex(16)}"
        upload = Upload(identity, content, name, purpose, now, now + int(self._age_s), incoming.client)
        with self._lock:
            self._uploads[upload.id] = upload
            self._bytes[upload.client] += content.disk_bytes - incoming.bytes
        return upload

    def _leave(self, client: str, count: int) -> None:
        """Subtract a file of `count` bytes from a client's files."""
        with self._lock:
            self._files -= Counter({client: 1})  # entries of 0 are removed
            self._bytes -= Counter({client: count})

    def _remove(self, upload: Upload) -> None:
        """Release the content of an upload that is no longer in the collection."""
        self._leave(upload.client, upload.content.disk_bytes)
        self._store.release(upload.content, stays=False)

    def get(self, file_id: str) -> Upload:
        """Return the uploaded file with the given ID.

        Raises:
            ApiError: If no file with this ID exists.
        """
        self.drop_old()
        with self._lock:
            upload = self._uploads.get(file_id)
        if upload is None:
            raise ApiError(404, f"there is no file {json_text(file_id[:40])}", param="file_id", code="not_found")
        return upload

    def delete(self, file_id: str) -> None:
        """Delete the uploaded file with the given ID.

        Raises:
            ApiError: If no file with this ID exists.
        """
        self.get(file_id)
        with self._lock:
            gone = self._uploads.pop(file_id, None)
        if gone:
            self._remove(gone)

    def drop_old(self) -> None:
        """Delete all expired uploads."""
        now = time.time()
        with self._lock:
            old = [upload for upload in self._uploads.values() if upload.expires <= now]
            for upload in old:
                del self._uploads[upload.id]
        for upload in old:
            self._remove(upload)


class IncomingUpload:
    """A file that a client is uploading."""

    def __init__(self, uploads: Uploads, client: str, file: Incoming, room: Room):
        self.client = client
        self.bytes = 0  # reserved for it
        self.kept = False
        self._uploads = uploads
        self._file = file
        self._room = room

    def reserve(self, count: int) -> None:
        """Reserve disk space for `count` more bytes.

        Raises:
            ApiError: If the client's files or all files would take too much space.
        """
        self._uploads._reserve(self.client, count)
        self.bytes += count
        self._room.add(count)

    def write(self, data: bytes | memoryview) -> None:
        """Write to the file. Raises OSError if the disk is full."""
        self._file.write(data)

    def keep(self, name: str, purpose: str) -> Upload:
        """Store the file.

        Raises:
            ApiError: If the file is empty, isn't a video or an image, or can't be stored.
        """
        if not self._file.bytes:
            raise ApiError(400, "the file is empty", param="file", code="invalid_value")
        name = one_line(os.path.basename(name.replace("\\", "/")))[:NAME_CHARACTERS] or "file"
        path = self._file.close()
        try:
            probe(path)
        except EvopruneError as problem:
            refusal = told(problem, {path: name})
            refusal.param = "file"
            raise refusal from problem
        upload = self._uploads._keep(self, self._file.keep(), name, purpose)
        self.kept = True
        return upload

    def keep_unchecked(self) -> Upload:
        """Store the file, which need not be a video or an image.

        Raises:
            ApiError: If the file can't be stored.
        """
        upload = self._uploads._keep(self, self._file.keep(), "file", PURPOSES[0])
        self.kept = True
        return upload


def _too_much(message: str) -> ApiError:
    return ApiError(413, f"{message}: delete some", code="storage_full")
