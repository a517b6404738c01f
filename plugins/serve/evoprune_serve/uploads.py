"""Manages files uploaded to /v1/files. Files are kept until they are deleted or expire."""

import os
import secrets
import threading
import time
from dataclasses import dataclass
from typing import Any, BinaryIO

from evoprune.util import one_line
from evoprune_serve.errors import ApiError
from evoprune_serve.fields import json_text
from evoprune_serve.store import Content, Room, Store

MOST = 1000  # maximum number of uploaded files
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
    """A thread-safe collection of uploaded files. Each file is kept for `age_s` seconds."""

    def __init__(self, store: Store, age_s: float):
        self._store = store
        self._age_s = age_s
        self._uploads: dict[str, Upload] = {}
        self._lock = threading.Lock()

    def add(self, file: BinaryIO, name: str, purpose: str, room: Room) -> Upload:
        """Store a file, using the disk space already reserved in `room`.

        Raises:
            ApiError: If there are too many files, the store is full, or the file is empty.
        """
        self.drop_old()
        if len(self._uploads) >= MOST:
            raise ApiError(507, f"there are {MOST} files already: delete some", code="storage_full")
        content = self._store.copy(file, room)
        if not content.size:
            self._store.release(content, stays=False)
            raise ApiError(400, "the file is empty", param="file", code="invalid_value")
        name = one_line(os.path.basename(name.replace("\\", "/")))[:NAME_CHARACTERS] or "file"
        now = int(time.time())
        upload = Upload(f"file-{secrets.token_hex(16)}", content, name, purpose, now, now + int(self._age_s))
        with self._lock:
            self._uploads[upload.id] = upload
        return upload

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
        upload = self.get(file_id)
        with self._lock:
            gone = self._uploads.pop(file_id, None)
        if gone:
            self._store.release(upload.content, stays=False)

    def drop_old(self) -> None:
        """Delete all expired uploads."""
        now = time.time()
        with self._lock:
            old = [upload for upload in self._uploads.values() if upload.expires <= now]
            for upload in old:
                del self._uploads[upload.id]
        for upload in old:
            self._store.release(upload.content, stays=False)
