"""Fetches a request's videos and images, which may be inline data, uploaded files, URLs, or local files."""

import binascii
import errno
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np

from evoprune.backend import Host
from evoprune.errors import OutOfMemory, VideoError
from evoprune.files import open_below
from evoprune.util import size, without_password
from evoprune.video import HeldVideo, Input, SamplingOptions, downloaded, in_one, probe
from evoprune_serve.errors import ApiError, full, refused
from evoprune_serve.public import PublicTransport
from evoprune_serve.store import UNUSED_S, Content, Store, file_state
from evoprune_serve.uploads import Uploads

URL_CHARACTERS = 8192  # maximum length of a URL, except for data: URLs
FILES_RETRY_S = 5  # time after which a client may retry if too many files are open, in seconds
FRAMES_BYTES = 2**29  # maximum size of the decoded pixels in all lists of frames of a request
SHARE = 4  # a list of frames may take up to 1/SHARE of the available memory, because other requests may have some too
MOST_ESCAPES = 2**16  # percent-encoded characters in a short data: URL; decoding each takes about 70 bytes of memory
LONGEST_S = 3600.0  # maximum duration of a download, in seconds
FILE_HINT = "upload the file instead"
REQUEST = "ask-"  # prefix of a folder with the files of a client's input
SEND_FIRST = "send_first"  # error code: the client has to send a file that is not here
WHITESPACE = b" \t\n\f\r"
HEAD_CHARACTERS = 2000  # maximum length of the part of a data: URL before the data
# The part of a data: URL before the data. Without base64, it ends at the first comma that is not in a quoted parameter. Otherwise,
# it ends after `;base64,`, and the values of parameters may contain commas.
DATA_HEAD = re.compile(
    r"""\s*data:
    (?: [^,;"]* (?: ; (?: "(?:\\.|[^"\\])*" | [^;"] )* )*? ;\s* (?P<base64>base64) \s*,
    | (?: "(?:\\.|[^"\\])*" | [^,"] )*, )""",
    re.IGNORECASE | re.VERBOSE,
)
SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]{0,20}):", re.IGNORECASE)


@dataclass(frozen=True)
class Address:
    """A video or image specified by a URL with the scheme data, http, https, or file."""

    url: str


@dataclass(frozen=True)
class Uploaded:
    """A video or image uploaded by the client to /v1/files."""

    file_id: str


@dataclass(frozen=True)
class FrameList:
    """A video sent as a list of frames, with either a frame rate or a timestamp in seconds for each frame."""

    frames: tuple[Address | Uploaded, ...]
    rate: float | None
    times_s: tuple[float, ...] | None


@dataclass(frozen=True)
class ClientFile:
    """A file of a client on this machine, or with the same folders; or one that it has sent before (`Asks.send`).

    Attributes:
        name: The last part of its path.
        path: Its path, or "" if the client has sent it.
        state: Its size and modification time in nanoseconds, which show whether `path` is the same file here.
        digest: Its SHA-256 digest, or "" if the client has not sent it.
        shown: Its name in reports and messages.
    """

    name: str
    path: str = ""
    state: tuple[int, int] = (0, 0)
    digest: str = ""
    shown: str = ""


@dataclass(frozen=True)
class ClientInput:
    """A video, an image, or a folder of images of a client, and files next to it, such as its subtitles.

    Attributes:
        name: The name in reports and messages.
        number: Its place in the request.
        files: The video or the image, or the images of the folder.
        folder: The name of the folder, or "" if it isn't a folder.
        beside: The files next to it.
        subtitles: The file that contains its subtitles, if it was named.
    """

    name: str
    number: int
    files: tuple[ClientFile, ...]
    folder: str
    beside: tuple[ClientFile, ...]
    subtitles: ClientFile | None


Source = Address | Uploaded | FrameList | ClientInput


@dataclass(frozen=True)
class LocalFile:
    """A request input available as a local file.

    Attributes:
        identity: A content identifier. Files with equal identities have equal contents.
        name: The name shown to clients instead of the path.
        subtitles: The path of the file that contains its subtitles, or None.
        others: The names shown to clients instead of the paths of files that belong to it, by path.
    """

    path: str
    identity: Any
    name: str
    subtitles: str | None = None
    others: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LocalFrames:
    """A video that consists of local image files."""

    files: tuple[LocalFile, ...]
    rate: float | None
    times_s: tuple[float, ...] | None
    name: str

    @property
    def identity(self) -> Any:
        return [file.identity for file in self.files], self.rate, self.times_s

    def input(self, most: int) -> HeldVideo:
        """Decode the images and combine them into a video. On Linux, a separate process decodes them.

        Args:
            most: Maximum size of the decoded pixels, in bytes.

        Raises:
            VideoError: If an image can't be read.
            ApiError: If a file isn't an image, the images differ in size, or their total size is too large.
            OutOfMemory: If the frames don't fit in the available memory.
        """
        video = None
        for number, file in enumerate(self.files):
            info = probe(file.path)
            if not info.is_picture:
                raise refused(f"{file.name} is not an image")
            shape = len(self.files), info.height, info.width, 3
            if video is None:
                if math.prod(shape) > most:
                    raise refused(f"the lists of frames have more than {FRAMES_BYTES >> 20} MiB of pixels")
                available = Host().available_memory()
                if available is not None and SHARE * math.prod(shape) > available:
                    raise OutOfMemory("the frames take too much memory", "send fewer or smaller frames", stage="read")
                video = np.empty(shape, np.uint8)
            if video.shape != shape:
                raise refused(f"{file.name} has a different size than the frames before it")
            frames, _ = in_one(info, [0.0])
            video[number] = frames[0]
        return HeldVideo.of(video, self.rate, self.times_s)


Local = LocalFile | LocalFrames


class Fetched:
    """A request's inputs, available as local files until `close` is called."""

    def __init__(self, inputs: Sequence[Local], files: ExitStack):
        self._inputs = inputs
        self._files = files

    @property
    def identity(self) -> str:
        return repr([each.identity for each in self._inputs])

    @property
    def names(self) -> list[str]:
        """Input names for reports and error messages."""
        return [each.name for each in self._inputs]

    @property
    def paths(self) -> dict[str, str]:
        """A dictionary that maps each file path to the name shown to clients."""
        files = [each for each in self._inputs if isinstance(each, LocalFile)]
        files += [file for each in self._inputs if isinstance(each, LocalFrames) for file in each.files]
        others = {path: name for file in files for path, name in file.others.items()}
        return others | {file.path: file.name for file in files}

    def sampling(self, usual: SamplingOptions) -> SamplingOptions:
        """Return a question's options, with the path of the subtitles that its client named, if any."""
        named = (each.subtitles for each in self._inputs if isinstance(each, LocalFile) and each.subtitles)
        path = next(named, None)
        return usual if path is None else replace(usual, subtitles=path)

    def inputs(self) -> list[Input]:
        """Return the inputs in a format accepted by the encoder. For the exceptions, see `LocalFrames.input`."""
        inputs: list[Input] = []
        left = FRAMES_BYTES
        for each in self._inputs:
            if isinstance(each, LocalFrames):
                video = each.input(left)
                left -= video.held.nbytes
                inputs.append(video)
            else:
                inputs.append(each.path)
        return inputs

    def close(self) -> None:
        self._files.close()


class Sources:
    """Fetches the videos and images of requests, subject to the server's settings. Thread-safe.

    Args:
        urls: Whether http and https URLs may be fetched. URLs on private networks are never fetched.
        folders: Folders that files may be read from, including subfolders.
        limit_bytes: Maximum size of a download, in bytes.
    """

    def __init__(self, store: Store, uploads: Uploads, urls: bool, folders: Sequence[Path], limit_bytes: int):
        self._store = store
        self._uploads = uploads
        self._urls = urls
        self._folders = [folder.resolve() for folder in folders]
        self._limit_bytes = limit_bytes
        self._downloads: dict[str, tuple[Content, float]] = {}  # for each URL, a recent download and its timestamp
        self._lock = Lock()
        self._decoding = Lock()  # held to decode a data: URL, because this temporarily takes three times its memory

    def fetch(self, sources: Sequence[Source], check: Callable[[], None] = lambda: None) -> Fetched:
        """Fetch a request's videos and images as local files.

        Args:
            sources: The videos and images to fetch.
            check: A function called repeatedly, which can abort a download by raising an exception.

        Raises:
            ApiError: If a source isn't allowed or doesn't exist.
            VideoError: If a download fails.
        """
        with ExitStack() as stack:
            found = [self._local(source, f"input {number}", stack, check) for number, source in enumerate(sources, 1)]
            return Fetched(found, stack.pop_all())

    def _local(
        self, source: Source, name: str, stack: ExitStack, check: Callable[[], None], copied: bool = False
    ) -> Local:
        """Fetch a single video or image. For `copied`, see `_file`."""
        check()
        if isinstance(source, FrameList):
            files = tuple(
                self._local(frame, f"frame {number} of {name}", stack, check, copied=True)
                for number, frame in enumerate(source.frames, 1)
            )
            return LocalFrames(files, source.rate, source.times_s, name)
        if isinstance(source, ClientInput):
            return self._of_client(source, stack)
        if isinstance(source, Uploaded):
            upload = self._uploads.get(source.file_id)
            content = stack.enter_context(self._store.using(upload.content))
            return LocalFile(content.path, content.digest, upload.name)
        scheme = found[1].lower() if (found := SCHEME.match(source.url)) else ""
        if scheme == "data":
            with self._decoding:
                content = self._store.add(decoded(source.url))
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, name)
        if scheme not in ("http", "https", "file"):
            raise refused(
                f"the address of {name} is not one of data:, https:, http: or file:, such as file:///folder/video.mp4"
            )
        if len(source.url) > URL_CHARACTERS:
            raise refused(f"the address of {name} has more than {URL_CHARACTERS} characters")
        if scheme != "file":
            content = self._download(source.url, check)
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, without_password(source.url))
        return self._file(source.url, stack, copied)

    def _of_client(self, source: ClientInput, stack: ExitStack) -> LocalFile:
        """Put the files of a client's input into a new folder under their own names, so that readers find them as the client would.

        Raises:
            ApiError: If a file is neither in an allowed folder nor stored, so that the client has to send it first.
        """
        root = Path(tempfile.mkdtemp(prefix=REQUEST, dir=self._store.folder))
        stack.callback(shutil.rmtree, root, ignore_errors=True)
        folder, named = root / "input", root / "subtitles"
        inside = folder / source.folder
        inside.mkdir(parents=True)
        named.mkdir()
        wanted = {inside / file.name: file for file in source.files}
        wanted |= {folder / file.name: file for file in source.beside}
        if source.subtitles:
            wanted[named / source.subtitles.name] = source.subtitles
        identities = [source.folder]
        for path, file in wanted.items():
            found = self._client_file(source, file, stack)
            os.symlink(found.path, path)
            identities.append((str(path.relative_to(root)), found.identity))
        path = inside if source.folder else inside / source.files[0].name
        subtitles = source.subtitles and str(named / source.subtitles.name)
        others = {str(path): file.shown for path, file in wanted.items() if file.shown}
        return LocalFile(str(path), identities, source.name, subtitles, others)

    def _client_file(self, source: ClientInput, file: ClientFile, stack: ExitStack) -> LocalFile:
        if file.digest:
            if content := self._store.known(file.digest):
                stack.callback(self._store.release, content)
                return LocalFile(content.path, content.digest, file.name)
        elif opened := self._allowed(file):
            return self._kept_open(opened, file.name, stack, copied=bool(source.folder))
        number = source.number
        raise ApiError(404, "the server does not have this file", param=f"inputs[{number}]", code=SEND_FIRST)

    def _allowed(self, file: ClientFile) -> BinaryIO | None:
        """Open a client's file, or return None if it is not the same file here, or not in an allowed folder."""
        try:
            opened = self._opened(Path(file.path))
        except OSError as problem:
            if problem.errno in (errno.EMFILE, errno.ENFILE):
                raise full(FILES_RETRY_S) from problem
            return None
        except (RuntimeError, ValueError):
            return None
        status = os.fstat(opened.fileno())
        if (status.st_size, status.st_mtime_ns) != file.state:
            opened.close()
            return None
        return opened

    def _download(self, url: str, check: Callable[[], None]) -> Content:
        """Download a URL or reuse a recent download. The caller must release the returned content."""
        if not self._urls:
            raise refused("URLs are not read: the server runs without --allow-urls")
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
        """Open a file inside an allowed folder. All other URLs raise the same error, so clients learn nothing about other files.

        The file is opened once and always read through the same descriptor, so replacing the file later has no effect. If `copied`
        is True, the file is copied to the store instead of being kept open because a list of frames may consist of many files.
        """
        try:
            file = self._opened(_path_of(url))
        except (OSError, RuntimeError, ValueError) as problem:  # also an invalid URL, or a loop of symbolic links
            if isinstance(problem, OSError) and problem.errno in (errno.EMFILE, errno.ENFILE):
                raise full(FILES_RETRY_S) from problem
            message = f"{url} is not a file below a folder of --allow-dir"
            raise ApiError(404, message, code="not_found") from problem
        return self._kept_open(file, url, stack, copied)

    def _kept_open(self, file: BinaryIO, name: str, stack: ExitStack, copied: bool) -> LocalFile:
        """Return an open file as an input. See `_file` for `copied`."""
        if copied:
            with file, self._store.room() as room:
                room.add(os.fstat(file.fileno()).st_size)
                content = self._store.copy(file, room)
            stack.callback(self._store.release, content)
            return LocalFile(content.path, content.digest, name)
        identity = file.name, *file_state(file)
        path = file.name
        if sys.platform == "linux":
            path = stack.enter_context(self._store.link(file))
        else:
            stack.enter_context(file)
        return LocalFile(path, identity, name)

    def _opened(self, path: Path) -> BinaryIO:
        """Open a file.

        Raises:
            OSError, ValueError: If it isn't a file inside an allowed folder.
        """
        real = path.resolve()
        for folder in self._folders:
            if real.is_relative_to(folder):
                return open(real, "rb", opener=lambda *_: open_below(folder, real))  # noqa: B023 (called at once)
        raise ValueError("not in an allowed folder")


def _path_of(url: str) -> Path:
    """Return the path in a file: URL. Raises ValueError if it refers to a file on another machine."""
    parts = urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError("a file on another machine")
    return Path(unquote(parts.path))


def decoded(url: str) -> bytes:
    """Decode the data in a `data:` URL as browsers do (WHATWG, Fetch and Infra).

    Unlike in browsers, a parameter may contain a comma, as in data:video/webm;codecs=vp8,opus;base64,..., because that is how
    browsers write the URL of a recording.

    Raises:
        ApiError: If the data is empty or isn't base64.
    """
    head = DATA_HEAD.match(url, 0, HEAD_CHARACTERS)
    if head is None:
        raise refused("a data: address is not data:TYPE;base64,...")
    end = url.find("#", head.end())
    text = url[head.end() : end if end >= 0 else len(url)]
    # base64 has only three characters that are ever escaped
    if text.count("%") > MOST_ESCAPES + len(text) // 16:
        raise refused("a data: address is not base64: too many characters are percent-encoded")
    try:
        data = text.encode()
        del text
        if b"%" in data:
            data = unquote_to_bytes(data)
        if head["base64"]:
            data = _from_base64(data)
    except ValueError as problem:
        raise refused(f"a data: address is not base64: {problem}") from problem
    if not data:
        raise refused("a data: address is empty")
    return data


def _from_base64(data: bytes) -> bytes:
    """Decode base64, which may contain whitespace and lack padding. Raises ValueError if it contains anything else."""
    if any(each in data for each in WHITESPACE):
        data = data.translate(None, WHITESPACE)
    if b"=" not in data[-2:] and len(data) % 4:
        data += b"=" * (-len(data) % 4)
    return binascii.a2b_base64(data, strict_mode=True)
