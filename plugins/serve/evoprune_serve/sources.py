"""Where the videos and pictures of a request are: in it, in a file of /v1/files, on the web, or on this machine."""

import binascii
import errno
import os
import re
import stat
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np

from evoprune.errors import VideoError
from evoprune.util import size, without_password
from evoprune.video import PICTURE, HeldVideo, Input, downloaded, held_video, in_one, probe
from evoprune_serve.errors import ApiError, full, refused
from evoprune_serve.public import PublicTransport
from evoprune_serve.store import UNUSED_S, Content, Store
from evoprune_serve.uploads import Uploads

URL_CHARACTERS = 8192  # of an address that is none of data
FILES_RETRY_S = 5  # after which a client may try again for which there were too many open files
FRAMES_BYTES = 2**29  # of a list of frames, decoded
LONGEST_S = 3600.0  # of a download
FILE_HINT = "upload the file instead"


@dataclass(frozen=True)
class Address:
    """An address: data:, http:, https: or file:."""

    url: str


@dataclass(frozen=True)
class Uploaded:
    """A file of /v1/files."""

    file_id: str


@dataclass(frozen=True)
class FrameList:
    """A video as pictures: each with its time in seconds, or all at a rate, in frames a second."""

    frames: tuple[Address | Uploaded, ...]
    rate: float | None
    times_s: tuple[float, ...] | None


Source = Address | Uploaded | FrameList


@dataclass(frozen=True)
class LocalFile:
    """A file of this machine. `identity`: equal ones mean equal contents. `name`: what a client is told instead of the path."""

    path: str
    identity: Any
    name: str

    def input(self) -> Input:
        return self.path


@dataclass(frozen=True)
class LocalFrames:
    """Pictures of this machine that are a video."""

    files: tuple[LocalFile, ...]
    rate: float | None
    times_s: tuple[float, ...] | None
    name: str

    @property
    def identity(self) -> Any:
        return [file.identity for file in self.files], self.rate, self.times_s

    def input(self) -> HeldVideo:
        """Decodes the pictures, on Linux in a process apart.

        Raises VideoError: one is unreadable. ApiError: one is no picture, or of another size, or all are too large.
        """
        arrays = []
        size = None
        for file in self.files:
            info = probe(file.path)
            if info.kind != PICTURE:
                raise refused(f"{file.name} is no picture")
            if size not in (None, (info.height, info.width)):
                raise refused(f"{file.name} has another size than the frames before it")
            size = info.height, info.width
            if 3 * info.height * info.width * len(self.files) > FRAMES_BYTES:
                raise refused(f"{self.name} has more than {FRAMES_BYTES >> 20} MiB of pixels")
            frames, _ = in_one(info, [0.0])
            arrays.append(frames[0])
        return held_video(np.stack(arrays), self.rate, self.times_s)


Local = LocalFile | LocalFrames


class Fetched:
    """What a request is about, on this machine; to be closed, which lets files go."""

    def __init__(self, inputs: Sequence[Local], files: ExitStack):
        self._inputs = inputs
        self._files = files

    @property
    def identity(self) -> str:
        return repr([each.identity for each in self._inputs])

    @property
    def names(self) -> list[str]:
        """What reports and errors call each input."""
        return [each.name for each in self._inputs]

    @property
    def paths(self) -> dict[str, str]:
        """What stands for each path in what a client is told."""
        files = [each for each in self._inputs if isinstance(each, LocalFile)]
        files += [file for each in self._inputs if isinstance(each, LocalFrames) for file in each.files]
        return {file.path: file.name for file in files}

    def inputs(self) -> list[Input]:
        """Return what is encoded. Errors: as of `LocalFrames.input`."""
        return [each.input() for each in self._inputs]

    def close(self) -> None:
        self._files.close()


class Sources:
    """Fetch what requests name, as far as the server allows it. Threads may share it.

    Args:
        urls: whether addresses on the web are read; never those of this network.
        folders: files below these are read.
        limit_bytes: of each download.
    """

    def __init__(self, store: Store, uploads: Uploads, urls: bool, folders: Sequence[Path], limit_bytes: int):
        self._store = store
        self._uploads = uploads
        self._urls = urls
        self._folders = [folder.resolve() for folder in folders]
        self._limit_bytes = limit_bytes
        self._downloads: dict[str, tuple[Content, float]] = {}  # with the time of each
        self._lock = Lock()

    def fetch(self, sources: Sequence[Source], check: Callable[[], None] = lambda: None) -> Fetched:
        """Return the sources as files. `check`: called meanwhile; what it raises ends a download.

        Raises ApiError: what is not allowed or not there. VideoError: it cannot be downloaded.
        """
        with ExitStack() as stack:
            found = [self._local(source, f"input {number}", stack, check) for number, source in enumerate(sources, 1)]
            return Fetched(found, stack.pop_all())

    def _local(
        self, source: Source, name: str, stack: ExitStack, check: Callable[[], None], copied: bool = False
    ) -> Local:
        """Return a source as files. `copied`: as of `_file`."""
        check()
        if isinstance(source, FrameList):
            files = tuple(
                self._local(frame, f"frame {number} of {name}", stack, check, copied=True)
                for number, frame in enumerate(source.frames, 1)
            )
            return LocalFrames(files, source.rate, source.times_s, name)
        if isinstance(source, Uploaded):
            upload = self._uploads.get(source.file_id)
            content = stack.enter_context(self._store.using(upload.content))
            return LocalFile(content.path, content.digest, upload.name)
        scheme = source.url.partition(":")[0].lower()
        if scheme == "data":
            content = self._store.add(decoded(source.url))
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, name)
        if scheme not in ("http", "https", "file"):
            raise refused(f"the address of {name} is not one of data:, https:, http: or file:")
        if len(source.url) > URL_CHARACTERS:
            raise refused(f"the address of {name} has more than {URL_CHARACTERS} characters")
        if scheme != "file":
            content = self._download(source.url, check)
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, without_password(source.url))
        return self._file(source.url, stack, copied)

    def _download(self, url: str, check: Callable[[], None]) -> Content:
        """Return what is at an address, in use."""
        if not self._urls:
            raise refused("addresses on the web are not read: the server runs without --allow-urls")
        with self._lock:
            self._forget_old()
            if (known := self._downloads.get(url)) and self._store.take(known[0]):
                return known[0]
        end = time.monotonic() + LONGEST_S

        def check_time() -> None:
            check()
            if time.monotonic() > end:
                name = without_password(url)
                raise VideoError(f"downloading {name} takes more than {LONGEST_S / 60:.0f} min", FILE_HINT)

        with self._store.room() as room:

            def progress(done: int, total: int) -> None:
                if max(done, total) > self._limit_bytes:
                    raise VideoError(f"{without_password(url)} has more than {size(self._limit_bytes)}", FILE_HINT)
                check_time()
                room.add(done - room.bytes)

            with downloaded(url, progress=progress, transport=PublicTransport(check_time)) as path:
                content = self._store.add_file(path, room)
        with self._lock:
            self._downloads[url] = content, time.monotonic()
        return content

    def _forget_old(self) -> None:
        now = time.monotonic()
        self._downloads = {url: known for url, known in self._downloads.items() if now - known[1] < UNUSED_S}

    def _file(self, url: str, stack: ExitStack, copied: bool) -> LocalFile:
        """Return a file below a folder that is allowed. All others look alike: a client learns nothing of them.

        It is opened once, and read from there, whatever its name leads to later. `copied`: stored rather than kept open, as the
        many frames of a video are.
        """
        try:
            file = stack.enter_context(self._opened(url))
        except (OSError, ValueError) as problem:  # the latter where an address, or a name in it, is none
            if isinstance(problem, OSError) and problem.errno in (errno.EMFILE, errno.ENFILE):
                raise full(FILES_RETRY_S) from problem
            message = f"{url} is not a file below a folder of --allow-dir"
            raise ApiError(404, message, code="not_found") from problem
        if copied:
            with self._store.room() as room:
                room.add(os.fstat(file.fileno()).st_size)
                content = self._store.copy(file, room)
            file.close()
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, url)
        state = os.fstat(file.fileno())
        path = file.name
        if sys.platform == "linux":
            path = stack.enter_context(self._store.link(file))
        identity = file.name, state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns
        return LocalFile(path, identity, url)

    def _opened(self, url: str) -> BinaryIO:
        """Return the file of an address, open. Raises OSError, ValueError: it is none below a folder that is allowed."""
        parts = urlsplit(url)
        if parts.netloc not in ("", "localhost"):
            raise ValueError("a file of another machine")
        real = Path(unquote(parts.path)).resolve()
        for folder in self._folders:
            if real.is_relative_to(folder):
                return opened_below(folder, real)
        raise ValueError("in no such folder")


def opened_below(folder: Path, path: Path) -> BinaryIO:
    """Open a regular file below a folder, following no link below it. Its `name` is the path.

    Raises OSError: there is no such file, or a link is on the way to it. ValueError: it is the folder.
    """
    *folders, name = path.relative_to(folder).parts
    if os.open not in os.supports_dir_fd:
        if not path.is_file():
            raise FileNotFoundError(path)
        return open(path, "rb")
    with ExitStack() as stack:

        def opened(name: str | Path, flags: int, at: int | None = None) -> int:
            found = os.open(name, flags | os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            stack.callback(os.close, found)
            return found

        at = opened(folder, os.O_DIRECTORY)
        for each in folders:
            at = opened(each, os.O_DIRECTORY, at)
        found = opened(name, os.O_NONBLOCK, at)  # a pipe keeps nobody waiting
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise FileNotFoundError(path)
        return open(path, "rb", opener=lambda *_: os.dup(found))


def decoded(url: str) -> bytes:
    """Return the bytes of a `data:` address. Raises ApiError: it is none in base64, or empty."""
    head, comma, text = url.partition(",")
    if not comma or not re.search(r"; *base64 *$", head, re.IGNORECASE):
        raise refused("a data: address is not data:TYPE;base64,...")
    try:
        # Forgiving, as browsers are: escaped by percent signs, in lines, or without padding (WHATWG, Infra and Fetch).
        data = unquote_to_bytes(text).translate(None, b" \t\n\f\r")
        if b"=" not in data[-2:]:
            data += b"=" * (-len(data) % 4)
        content = binascii.a2b_base64(data, strict_mode=True)
    except (binascii.Error, ValueError) as problem:
        raise refused(f"a data: address is not base64: {problem}") from problem
    if not content:
        raise refused("a data: address is empty")
    return content
