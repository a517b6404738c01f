"""Asks a running `evoprune serve` instead of loading a model (`--via`). Does not import torch.

`RemoteInputs`, `RemoteAnswer`, and `RemoteChat` offer what `ask` needs of `EncodedInputs`, `Answer`, and `Chat`. Their events and
records come from the server (docs/server.md).
"""

import http.client
import json
import os
import re
import socket
import stat
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import islice
from pathlib import Path
from queue import SimpleQueue
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import evoprune
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, PluginError, UsageError, VideoError
from evoprune.report import Report
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.util import is_text, listed, shown, size, without_password
from evoprune.video import Folder, SamplingOptions, local_file, read_subtitles
from evoprune_cli.options import PipelineArguments
from evoprune_cli.terminal import encoding, failure, tell
from evoprune_cli.typed import typed
from evoprune_cli.variables import SECRET

if TYPE_CHECKING:
    from evoprune.batch import Row, Settings, Span
    from evoprune.video import Video

AUTO = "auto"  # value of --via that means the server in the background, if there is one
INFO = "/v1/evoprune"
LOADING = {"status": "loading"}
SILENT_S = (
    60.0  # time after which a server that sends nothing is given up, in seconds; it sends a line every few seconds
)
RETRY_S = 5  # time after which to ask a busy server again if it doesn't say, in seconds
LOADING_S = 0.5  # interval between requests to a server that is loading its model, in seconds
PART_BYTES = 2**18  # size of the parts in which a file is sent
MOST_FACTS = 2**20  # maximum size of a response other than an answer, in bytes
IN_FLIGHT = 2  # number of inputs of a batch to ask about at the same time, so that the server reads one ahead
END = object()  # the last thing that `Asking` says
MOST_TRIES = 3  # number of times to send the same file, which a server with little room may delete again
KINDS = {kind.type: kind for kind in (UsageError, VideoError, ModelError, PluginError, OutOfMemory)}
HOLD_S = 2.0  # time for which a new server tries to lock its file, in seconds
OWN_HINT = "evoprune serve --stop, then evoprune serve --detach, starts it again"


def _user() -> int:
    if sys.platform == "win32":
        return 0  # the owner of every file, according to `os.stat`
    return os.getuid()


class Background:
    """The files of the server in the background. Each user has at most one such server.

    They are in a folder that only this user can open. While the server runs, it holds a lock on a file that contains its process
    ID, followed by "ready" once its models are loaded.

    Attributes:
        socket, log: Paths of the socket that the server listens on, and of its log.
    """

    def __init__(self):
        if sys.platform == "win32":
            raise UsageError("a server in the background needs Unix sockets, which this system lacks", "use a URL")
        parent = os.environ.get("XDG_RUNTIME_DIR")
        name = f"evoprune.{_user()}"
        self._folder = Path(parent) / "evoprune" if parent else Path(tempfile.gettempdir()) / name
        self.socket = self._folder / "serve.sock"
        self.log = self._folder / "serve.log"
        self._lock = self._folder / "serve.lock"

    def check(self) -> None:
        """Raise UsageError if another user made the files, or can open them."""
        folder = self._folder.lstat()
        if not stat.S_ISDIR(folder.st_mode) or folder.st_uid != _user():
            hint = "remove it, or set XDG_RUNTIME_DIR to a folder of your own"
            raise UsageError(f"{self._folder} is not a folder of this user", hint)
        if folder.st_mode & 0o077:
            raise UsageError(f"other users can open {self._folder}", f"chmod 700 {self._folder}")
        for path, kind in ((self.socket, stat.S_ISSOCK), (self._lock, stat.S_ISREG), (self.log, stat.S_ISREG)):
            with suppress(FileNotFoundError):
                status = path.lstat()
                if status.st_uid != _user() or not kind(status.st_mode):
                    raise UsageError(f"{path} was not made by a server of this user", "remove it")

    def make_folder(self) -> None:
        """Create the folder if it doesn't exist. See also `check`."""
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as problem:
            hint = "set XDG_RUNTIME_DIR to a folder of your own"
            raise UsageError(f"cannot create {self._folder}: {problem.strerror}", hint) from problem
        self.check()

    def process(self) -> tuple[int, bool] | None:
        """Return the process ID of the server (0 if it has just started), and whether it is ready. None if there is no server.

        Raises:
            UsageError: See `check`.
        """
        if not os.path.lexists(self._lock):
            return None
        self.check()
        with self._lock.open(encoding="ascii") as file:
            if _locks(file, shared=True):
                return None
            number, _, state = file.read().partition(" ")
        return int(number or 0), state == "ready"

    @contextmanager
    def held(self) -> Iterator[Callable[[], None]]:
        """Context manager for the server. Yields a function to call when it is ready.

        Raises:
            UsageError: If there is another server.
        """
        self.make_folder()
        with self._locked() as file:
            try:
                file.truncate(0)
                file.write(str(os.getpid()))
                file.flush()
                yield lambda: print(" ready", end="", file=file, flush=True)
            finally:
                for path in (self.socket, self._lock):
                    path.unlink(missing_ok=True)

    def _locked(self) -> IO[str]:
        """Open and lock the file."""
        end = time.monotonic() + HOLD_S  # others hold the lock while they look for a server
        while time.monotonic() < end:
            file = self._lock.open("a", encoding="ascii")
            if _locks(file) and os.fstat(file.fileno()).st_nlink:  # otherwise, a server that ended has removed it
                return file
            file.close()
            time.sleep(0.05)
        raise self.taken()

    def taken(self) -> UsageError:
        """Return the error for a second server."""
        number, _ = self.process() or (0, False)
        message = f"a server already runs in the background (process {number})"
        return UsageError(message, "ask it with --via auto, or end it with evoprune serve --stop")

    def found(self) -> Path | None:
        """Return the path of the socket, or None if there is no server. What a killed server left is removed.

        Raises:
            UsageError: See `check`.
        """
        if not os.path.lexists(self.socket):
            return None
        self.check()
        with suppress(FileNotFoundError), self._lock.open(encoding="ascii") as file:
            if not _locks(file):
                return self.socket
            self.socket.unlink(missing_ok=True)
        return None


def _locks(file: IO[str], shared: bool = False) -> bool:
    """Try to lock an open file. Returns False if another process has locked it."""
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


class SocketConnection(http.client.HTTPConnection):
    """A connection to a Unix socket."""

    def __init__(self, path: str, **options: Any):
        super().__init__("localhost", **options)
        self._path = path

    def connect(self) -> None:
        if sys.platform == "win32":
            raise OSError("Windows has no Unix sockets")
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


# Any server.


class Unusable(ModelError):
    """Raised if there is no server, or one that can't answer."""

    stage = None


class SendFirst(EvopruneError):
    """Raised if the server needs the files of an input. `number` is the input's place in the request."""

    def __init__(self, number: int):
        super().__init__(
            "the server could not keep the files that were sent to it", "does it have too little --max-files?"
        )
        self.number = number


@dataclass
class Server:
    """A server, and the name of the model to ask.

    Attributes:
        url: Its URL without /v1, or "" for the server in the background.
        path: The path of the socket of the server in the background.
        model: The name of the model, once `meet` has returned.
        most_bytes: The maximum size of a file that the server takes.
        options: The options for loading the model that affect answers, and those of questions that don't set them.
    """

    url: str = ""
    path: Path | None = None
    model: str = ""
    most_bytes: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    _closed: bool = False
    _visit: str = ""
    _visiting: ExitStack = field(default_factory=ExitStack)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _open: set[http.client.HTTPConnection] = field(default_factory=set)

    @classmethod
    def at(cls, url: str) -> Self:
        """Return the server at a URL.

        Raises:
            UsageError: If it isn't an http or https URL.
        """
        try:
            parts = urlsplit(url)
            right = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            right = False
        if not right or parts.query or parts.fragment or parts.username or re.search(r"[^!-~]", url):
            hint = f"give the address of evoprune serve, such as http://127.0.0.1:8000, or {AUTO}"
            raise UsageError(f"--via {shown(url)!r} is not the address of a server", hint)
        return cls(url.rstrip("/").removesuffix("/v1"))

    def __str__(self) -> str:
        return f"the server at {self.url}" if self.url else "the server in the background"

    def close(self) -> None:
        """Close all connections for good, which ends their requests on the server. May be called from another thread."""
        self._closed = True
        for connection in [*self._open]:
            with suppress(OSError, AttributeError):  # it is not connected, or no longer
                connection.sock.shutdown(socket.SHUT_RDWR)

    def visit(self) -> str:
        """Return an ID with which to send files. The server keeps them until `leave` is called, or until this process ends."""
        with self._lock:
            if not self._visit:
                response = self._visiting.enter_context(self.answering("GET", f"{INFO}/visit"))
                with self.problems():
                    self._visit = parsed(response.readline()).get("visit", "")
            return self._visit

    def leave(self) -> None:
        """Let the server delete all files that were sent to it."""
        self._visiting.close()

    def meet(self, wanted: str | None, show: Callable[..., None]) -> None:
        """Wait until the server has loaded its models, and check that it has the same version and the wanted model.

        Raises:
            Unusable: If it can't be used.
            UsageError: If it does not have the model.
        """
        path = INFO if wanted is None else f"{INFO}?model={quote(wanted, safe='')}"
        while (facts := self._facts(path)) == LOADING:
            show(f"waiting: {self} is loading its model")
            time.sleep(LOADING_S)
        if facts.get("evoprune") != evoprune.__version__:
            raise self._other_version(facts.get("evoprune"))
        if facts["model"] is None:
            names = listed(facts["models"])
            hint = f"a server chooses its models when it starts: leave out -m, or name {names}"
            if typed().source("model") == "ENVIRONMENT":
                hint += "; the value comes from EVOPRUNE_MODEL"
            raise NotServed(f"{self} serves {names}, not {shown(wanted or '')}", hint)
        self.model, self.most_bytes = facts["model"], facts["upload_bytes"]
        self.options = facts["loaded"] | facts["options"]

    def _facts(self, path: str) -> dict[str, Any]:
        with self.answering("GET", path, statuses=(200, 503)) as response, self.problems():
            text = response.read(MOST_FACTS)
        facts = parsed(text)
        if response.status == 503 and facts != LOADING:
            raise self._error(response, text)
        return facts

    def _other_version(self, version: Any = None) -> "Unusable":
        other = f"is evoprune {version}" if isinstance(version, str) else "is another version, or another program"
        hint = "use the same version for both, or check the address" if self.url else OWN_HINT
        return Unusable(f"{self} {other}; this is evoprune {evoprune.__version__}", hint)

    @contextmanager
    def answering(
        self,
        method: str,
        path: str,
        body: bytes | BinaryIO | None = None,
        headers: Mapping[str, str] = MappingProxyType({}),
        statuses: Sequence[int] = (200,),
    ) -> Iterator[http.client.HTTPResponse]:
        """Send a request and yield the response. The connection is closed at the end of the context, which ends the request.

        Raises:
            EvopruneError: If the response has a status that is not in `statuses`. See also `problems`.
        """
        connection = self._connection()
        self._open.add(connection)
        try:
            if self._closed:  # checked after the connection is known to `close`
                raise self.broken_off()
            with self.problems():
                with self._connecting():
                    connection.connect()
                with suppress(BrokenPipeError, ConnectionResetError):  # the server may have rejected the body unread
                    connection.request(method, self._prefix + path, body, {**headers, **self._key()})
                response = connection.getresponse()
                text = b"" if response.status in statuses else response.read(MOST_FACTS)
            if response.status not in statuses:
                raise self._error(response, text)
            yield response
        finally:
            self._open.discard(connection)
            connection.close()

    @property
    def _prefix(self) -> str:
        return urlsplit(self.url).path

    def _connection(self) -> http.client.HTTPConnection:
        how = {"timeout": SILENT_S, "blocksize": PART_BYTES}
        if self.path:
            return SocketConnection(str(self.path), **how)
        parts = urlsplit(self.url)
        kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        return kind(parts.hostname, parts.port, **how)

    def _key(self) -> dict[str, str]:
        key = os.environ.get(SECRET, "").strip()
        if re.search(r"[^!-~]", key):
            raise UsageError(f"{SECRET} is not one word of ASCII", "set it to the key of the server")
        return {"Authorization": f"Bearer {key}"} if key else {}

    @contextmanager
    def _connecting(self) -> Iterator[None]:
        try:
            yield
        except OSError as problem:
            reason = "it does not respond" if isinstance(problem, TimeoutError) else problem.strerror or problem
            start = "evoprune serve starts one" if self.url else "evoprune serve --detach starts one"
            raise Unusable(
                f"cannot reach {self}: {reason}", f"{start}; without --via, the model is loaded here"
            ) from problem

    @contextmanager
    def problems(self) -> Iterator[None]:
        """Convert exceptions of the connection.

        Raises:
            Unusable: If the connection fails.
        """
        try:
            yield
        except TimeoutError as problem:
            message = f"{self} has not responded for {SILENT_S:.0f} s"
            raise Unusable(message, "is its machine overloaded, or the network down?") from problem
        except (OSError, http.client.HTTPException) as problem:
            raise self.broken_off() from problem

    def broken_off(self) -> Unusable:
        return Unusable(f"{self} closed the connection before the answer was complete", "did it end? see its log")

    def _error(self, response: http.client.HTTPResponse, text: bytes) -> EvopruneError:
        """Return the error that a response stands for."""
        error = parsed(text).get("error")
        if not isinstance(error, dict) or not isinstance(error.get("message"), str):
            if response.status == 503:
                return Unusable(f"{self} has too many connections", "try again later")
            return self._other_version()
        return self.failure(error, response.status, response.headers.get("Retry-After"))

    def failure(self, error: dict[str, Any], status: int = 0, retry_s: str | None = None) -> EvopruneError:
        """Return the exception for an error of the server: the one that `ask` would raise here, or one of the API."""
        if record := error.get("record"):
            kind = KINDS.get(record["type"], EvopruneError)
            return kind(record["message"], record["hint"], stage=record["stage"])
        code, message = error.get("code"), error["message"]
        if code == "send_first":
            return SendFirst(int(re.sub(r"\D", "", error["param"])))
        if code == "invalid_api_key":
            return UsageError(f"{self} needs another key", f"set {SECRET} to the key that it was started with")
        if code == "rate_limit_exceeded":
            return Busy(
                f"{self} is busy: {message}",
                f"it expects to have room in {retry_s or RETRY_S} s",
                int(retry_s or RETRY_S),
            )
        if code in ("not_found", "method_not_allowed", "other_version"):
            return self._other_version()
        if code in ("body_too_large", "storage_full"):
            return VideoError(
                f"{self} does not take the file: {message}", "see its --max-upload, --max-files and --allow-dir"
            )
        if code == "shutting_down":
            return Unusable(f"{self}: {message}", "start it again, or leave out --via")
        return ModelError(f"{self}: {message}", "see its log for details")

    def events(self, response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
        """Yield the events of an answer, except those that only show that the server is alive.

        Raises:
            EvopruneError: If answering fails. See also `problems`.
        """
        while True:
            with self.problems():
                line = response.readline()
            event = parsed(line)
            if not event:
                raise self.broken_off()
            if event["event"] == "error":
                raise self.failure(event["error"])
            yield event
            if event["event"] == "end":
                return


class Busy(Unusable):
    """Raised if too many requests wait for the server. `retry_s` is the number of seconds after which to ask again."""

    def __init__(self, message: str, hint: str, retry_s: int):
        super().__init__(message, hint)
        self.retry_s = retry_s


class NotServed(UsageError):
    """Raised if the server does not have the wanted model, or an option is one that it chose when it was started."""


def parsed(text: bytes) -> dict[str, Any]:
    """Parse a JSON object. Anything else becomes an empty one."""
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def find_server(
    via: str | None, options: PipelineArguments, refused: Mapping[str, bool], show: Callable[..., None], quiet: bool
) -> Server | None:
    """Return the server that --via asks for, or None if the model is to be loaded here.

    With `--via auto`, this is so if there is no server in the background, or it cannot answer with the same model and options.

    Args:
        refused: Flags of other options that a server doesn't take, and whether they were given.
        show: The function yielded by `terminal.progress`.

    Raises:
        UsageError: If the address is invalid, or an option is one that a server chooses when it starts.
        Unusable: If there is no such server, or it can't be used.
    """
    if not via:
        return None
    if via == AUTO:
        path = None if sys.platform == "win32" else Background().found()
        if path is None:
            return None
        server = Server(path=path)
    else:
        server = Server.at(via)
    try:
        _check_options(server, options, refused)
        given = options.sources().get("model")
        server.meet(_model_name(options.typed["model"]) if given else None, show)
    except (Unusable, NotServed) as problem:
        if via != AUTO:
            raise
        if not quiet:
            tell(f"note: the model is loaded here, because {problem.message}")
        return None
    return server


def _check_options(server: Server, options: PipelineArguments, refused: Mapping[str, bool]) -> None:
    """Raise NotServed if an option is one that a server chooses when it starts. Variables for loading a model here are ignored."""
    typed_flags = typed().options()
    loading = {each.name for each in fields(ModelOptions)} - {"model"}
    chosen = [
        typed_flags.get(name, name)
        for name, source in options.sources().items()
        if name in loading and source == "COMMANDLINE"
    ]
    chosen += [flag for flag, given in refused.items() if given]
    if chosen:
        noun = "an option" if len(chosen) == 1 else "options"
        message = f"{listed(chosen)}: {noun} that {server} chose when it was started"
        raise NotServed(
            message, f"leave out {listed(chosen)}, or start evoprune serve with {'it' if len(chosen) == 1 else 'them'}"
        )


def _model_name(model: str) -> str:
    """Return a model as the server may know it: a folder by its full path."""
    path = os.path.expanduser(model)
    return os.path.realpath(path) if os.path.exists(path) else model


# The inputs, which the server reads itself if it may, and which are sent otherwise.


class LocalFile:
    """A file of an input."""

    def __init__(self, path: str):
        self.path = path
        name = os.path.basename(path)
        self.name = name if is_text(name) else f"file{os.path.splitext(name.encode('ascii', 'ignore').decode())[1]}"
        status = os.stat(path)
        self.state = status.st_size, status.st_mtime_ns
        self.digest = ""

    def record(self) -> dict[str, Any]:
        path = os.path.abspath(self.path)
        shown_as = self.path if is_text(self.path) else self.name
        if self.digest or not is_text(path):
            return {"name": self.name, "shown": shown_as, "digest": self.digest}
        return {"name": self.name, "shown": shown_as, "path": path, "bytes": self.state[0], "mtime_ns": self.state[1]}

    def send(self, server: Server, show: Callable[..., None]) -> None:
        """Send the file to the server.

        Raises:
            VideoError: If the server doesn't take it.
        """
        if self.state[0] > server.most_bytes:
            message = (
                f"{shown(self.path)} has {size(self.state[0])}, and {server} takes at most {size(server.most_bytes)}"
            )
            raise VideoError(message, "start it with a higher --max-upload, or with --allow-dir for its folder")
        with open(self.path, "rb") as file:
            total = os.fstat(file.fileno()).st_size
            headers = {"Content-Length": str(total), "Content-Type": "application/octet-stream"}
            body = Sending(file, partial(show, "sending, MiB"), total)
            path = f"{INFO}/files?visit={server.visit()}"
            with server.answering("POST", path, body, headers) as response, server.problems():
                self.digest = parsed(response.read(MOST_FACTS)).get("digest", "")


class Sending:
    """An open file that shows the progress of sending it."""

    def __init__(self, file: BinaryIO, show: Callable[[int, int], None], total: int):
        self._file = file
        self._show = show
        self._total = total

    def read(self, count: int) -> bytes:
        data = self._file.read(count)
        self._show(self._file.tell() >> 20, self._total >> 20)
        return data


class LocalInput:
    """An input, and the files that belong to it."""

    def __init__(self, path: str, name: str, sampling: SamplingOptions):
        """Find the files of the input at `path`.

        Raises:
            VideoError: If the input or its subtitle file is missing or can't be read.
        """
        self._name = name if is_text(name) else name.encode("utf-8", "backslashreplace").decode()
        self._folder = ""
        try:
            if Folder.is_at(path):
                self._folder = os.path.basename(os.path.realpath(path)) or "frames"
                self._files = [LocalFile(file) for file in Folder(path).images]
            else:
                self._files = [LocalFile(path)] if os.access(path, os.R_OK) and os.path.isfile(path) else []
        except (OSError, ValueError):
            self._files = []
        if not self._files:
            self._read_here(path, sampling)
        self._subtitles = self._named_subtitles(path, sampling)
        self._beside = []
        if sampling.subtitles_wanted == "auto":
            with suppress(OSError):  # the folder can't be listed
                found = Folder.subtitles_beside(path, os.listdir)
                self._beside = [LocalFile(file) for files in found for file in files]

    @staticmethod
    def _read_here(path: str, sampling: SamplingOptions) -> "Video":
        """Read an input's metadata. For an input without files that can be read, this raises the error that `ask` raises."""
        from evoprune.session import probed

        return probed(path, folder_fps=sampling.frame_rate)

    def _named_subtitles(self, path: str, sampling: SamplingOptions) -> LocalFile | None:
        name = sampling.subtitle_file
        if name is None:
            return None
        if not (os.path.isfile(name) and os.access(name, os.R_OK)):
            read_subtitles(self._read_here(path, sampling), name)
        return LocalFile(name)

    def record(self) -> dict[str, Any]:
        files = [file.record() for file in self._files]
        beside = [file.record() for file in self._beside]
        named = self._subtitles and self._subtitles.record()
        return {"name": self._name, "files": files, "folder": self._folder, "beside": beside, "subtitles": named}

    def send(self, server: Server, show: Callable[..., None]) -> None:
        """Send the input's files to the server. See `LocalFile.send`."""
        for file in (*self._files, *self._beside, *filter(None, [self._subtitles])):
            file.send(server, show)


# Answers.

Events = Generator[dict[str, Any], None, None]


def set_options(arguments: PipelineArguments, pipeline: PipelineOptions) -> dict[str, Any]:
    """Return the options that the user has set, except those for loading a model."""
    groups = pipeline.pruning, pipeline.sampling, pipeline.generation
    known = {each.name: getattr(group, each.name) for group in groups for each in fields(group)}
    return {name: known[name] for name in arguments.sources() if name in known}


def without_files(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options without a file of subtitles, which is sent with its video instead."""
    return {name: value for name, value in options.items() if name != "subtitles" or value in ("none", "auto")}


class RemoteInputs:
    """Inputs that a server encodes, which can answer questions one at a time. Stands in for `EncodedInputs`.

    The server answers each question as a separate request, and usually keeps the encoded inputs for the next one.

    Attributes:
        report: See `EncodedInputs`.
        ignores_sound: See `EncodedInputs`.
        notes: What `ask` prints about how the inputs are read.
        why_single: See `why_single_questions`.
    """

    def __init__(
        self,
        server: Server,
        inputs: Sequence[LocalInput],
        options: Mapping[str, Any],
        *,
        compare: bool = False,
        show: Callable[..., None] = lambda *step: None,
    ):
        """Store what to ask about, and how.

        Args:
            options: The options that the user has set.
            show: See `terminal.progress`.
        """
        self._agreement: dict[str, Any] | None = None
        self._server = server
        self._inputs = inputs
        self._options = options
        self._compare = compare
        self._show = show
        self._events: Events = (event for event in ())
        self._begun: str | None = None  # the question whose inputs have been encoded, but that hasn't been asked yet

    def encode(self, question: str, conversation: bool, show: Callable[..., None]) -> None:
        """Send the first question, or none (""), and wait until the inputs are encoded. For `show`, see `terminal.progress`.

        Args:
            conversation: Whether the question is the first one of a conversation.

        Raises the errors of `ask`; see also `Server.problems`.
        """
        self._show = show
        said = self._begin(question, [] if conversation else None)
        self._show = lambda *step: None
        self.report = report_in(said)
        self.ignores_sound, self.notes, self.why_single = said["ignores_sound"], said["notes"], said["why_single"]
        if question:
            self._begun = question

    @property
    def are_pictures(self) -> bool:
        """Whether all inputs are images."""
        return all(facts.kind == "picture" for facts in self.report.inputs)

    def agreement_of(self, full: "Unpruned", question: str, answer: "RemoteAnswer") -> dict[str, Any] | None:
        """Return the agreement of the latest pair of answers, which the server has computed."""
        return self._agreement

    def close(self) -> None:
        """End the current request."""
        self._events.close()

    def ask(self, question: str, *, on_thoughts: Callable[[str], None], **options: Any) -> "RemoteAnswer":
        """Ask a question. Its options are those of the inputs."""
        return self.answer(question, on_thoughts, same)

    def answer(
        self,
        question: str,
        on_thoughts: Callable[[str], None],
        finish: Callable[[Report], Report],
        earlier: Sequence[Mapping[str, str]] | None = None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> "RemoteAnswer":
        """Ask a question.

        Args:
            finish: Called with the complete report.
            earlier: The messages of the question's conversation, or None if it is a single question.
            options: Options that override those of the inputs.
        """
        if question != self._begun:
            self._begin(question, earlier, options)
        self._begun = None
        return self.next_answer(on_thoughts, finish)

    def next_answer(self, on_thoughts: Callable[[str], None], finish: Callable[[Report], Report]) -> "RemoteAnswer":
        return RemoteAnswer(self._events, on_thoughts, finish, self._server.broken_off)

    def chat(self, system: str | None) -> "RemoteChat":
        """Start a conversation. Its system prompt is one of the options of the inputs."""
        return RemoteChat(self)

    def unpruned(self, show: Callable[..., None]) -> "Unpruned":
        """Return the same inputs without pruning, whose answers are part of the same requests."""
        return Unpruned(self)

    def compared(self, report: Report) -> Report:
        """Return the report of the answer without pruning from the report of both answers."""
        self._agreement = report.agreement
        return report.compare

    def _begin(
        self,
        question: str,
        earlier: Sequence[Mapping[str, str]] | None,
        options: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, Any]:
        """Send a question, and return the event about its encoded inputs."""
        self._events.close()
        asked = {
            "evoprune": evoprune.__version__,
            "model": self._server.model,
            "question": question,
            "earlier": [*(earlier or ())],
            "conversation": earlier is not None,
            "compare": self._compare,
            "options": without_files({**self._options, **options}),
        }
        self._events = self._sent(asked)
        steps = encoding(self._show)
        self._show("waiting for the server")
        for event in self._events:
            if event["event"] == "inputs":
                return event
            if event["event"] == "progress":
                steps(event["stage"], event["done"], event["of"])
        raise self._server.broken_off()

    def _sent(self, asked: dict[str, Any]) -> Events:
        """Send a question, and first the files that the server can't read itself. Yields the events of the answer."""
        sent = Counter[int]()
        while True:
            body = json.dumps(asked | {"inputs": [each.record() for each in self._inputs]}).encode()
            headers = {"Content-Type": "application/json"}
            try:
                with self._server.answering("POST", f"{INFO}/ask", body, headers) as response:
                    yield from self._server.events(response)
                return
            except SendFirst as needed:
                sent[needed.number] += 1
                if sent[needed.number] > MOST_TRIES:
                    raise
                self._inputs[needed.number].send(self._server, self._show)


class Unpruned:
    """Inputs without pruning, whose answers follow the answers with pruning in the same responses."""

    def __init__(self, inputs: RemoteInputs):
        self._inputs = inputs

    def ask(self, question: str, *, on_thoughts: Callable[[str], None], **options: Any) -> "RemoteAnswer":
        return self._inputs.next_answer(on_thoughts, self._inputs.compared)


class RemoteAnswer(Iterator[str]):
    """An answer that arrives from a server. Stands in for `Answer`.

    Attributes:
        report: The report, which is complete at the end. Until then, it has the text so far.
    """

    def __init__(
        self,
        events: Events,
        on_thoughts: Callable[[str], None],
        finish: Callable[[Report], Report],
        broken_off: Callable[[], Unusable],
    ):
        self._events = events
        self._on_thoughts = on_thoughts
        self._finish = finish
        self._broken_off = broken_off
        self._complete = False
        self.report = Report()
        while (event := self._next())["event"] != "question":
            pass
        self.report = report_in(event)

    def __next__(self) -> str:
        while not self._complete:
            event = self._next()
            if event["event"] == "text":
                self.report.answer = (self.report.answer or "") + event["text"]
                return event["text"]
            if event["event"] == "thought":
                self.report.thoughts = (self.report.thoughts or "") + event["text"]
                self._on_thoughts(event["text"])
            if event["event"] in ("answer", "end"):
                self.report, self._complete = self._finish(report_in(event)), True
        raise StopIteration

    def close(self) -> None:
        """End the request, which stops the answer."""
        self._events.close()
        self.report.finish_reason = self.report.finish_reason or "interrupt"

    def _next(self) -> dict[str, Any]:
        event = next(self._events, None)
        if event is None:
            raise self._broken_off()
        return event


def report_in(event: dict[str, Any]) -> Report:
    return Report.from_json(json.dumps(event["record"]))


class RemoteChat:
    """A conversation about inputs, which is sent to the server with each question. Stands in for `Chat`."""

    def __init__(self, inputs: RemoteInputs):
        self.messages: list[dict[str, str]] = []
        self._inputs = inputs

    def clear(self) -> None:
        self.messages = []

    def undo(self) -> str | None:
        """Remove the latest question and its answer, and return the question, or None if there is none."""
        *self.messages, question, _ = self.messages or [None, None]
        return question and question["content"]

    def ask(self, question: str, *, on_thoughts: Callable[[str], None], **options: Any) -> RemoteAnswer:
        """Ask the next question. Complete answers are added to the conversation."""
        earlier = self.messages

        def finish(report: Report) -> Report:
            if report.answer or report.thoughts is None:
                turn = {"user": question, "assistant": report.answer}
                kept = earlier[2 * report.conversation["dropped"] :]
                self.messages = [*kept, *({"role": role, "content": text} for role, text in turn.items())]
            return report

        return self._inputs.answer(question, on_thoughts, finish, earlier)


# Batches.


def settings_of(server: Server, arguments: PipelineArguments, pipeline: PipelineOptions) -> "Settings":
    """Return the options of a batch: those that the user has set, and otherwise the server's."""
    from evoprune.batch import Settings

    return Settings.of(**server.options | set_options(arguments, pipeline))


def answers_via(
    server: Server,
    spans: Sequence["Span"],
    settings: "Settings",
    on_failure: Callable[[Exception], None],
    progress: Callable[[str, int, int], None],
) -> Iterator[Report]:
    """Yield a record for each row, in order. For the arguments, see `evoprune.batch.answers`.

    While the server answers the questions about a video, it already reads the next one.

    Raises:
        Unusable: If the server can't be used any more.
    """
    with ThreadPoolExecutor(IN_FLIGHT) as threads:
        waiting: deque[Asking] = deque()
        left = iter(spans)
        try:
            while True:
                waiting += (Asking(server, span, settings, threads) for span in islice(left, IN_FLIGHT - len(waiting)))
                if not waiting:
                    return
                yield from waiting[0].records(on_failure, progress)
                waiting.popleft()
        finally:
            for each in waiting:
                each.stop()
            if waiting:  # the batch has failed or was stopped
                server.close()
            server.leave()


class Asking:
    """Asks the questions of a span in a thread."""

    def __init__(self, server: Server, span: "Span", settings: "Settings", threads: ThreadPoolExecutor):
        self._server = server
        self._span = span
        self._settings = settings
        self._stopped = threading.Event()
        self._said: SimpleQueue[Any] = SimpleQueue()
        threads.submit(self._run)

    def stop(self) -> None:
        self._stopped.set()

    def records(
        self, on_failure: Callable[[Exception], None], progress: Callable[[str, int, int], None]
    ) -> Iterator[Report]:
        """Yield the records of the span's rows. Raises Unusable if the server can't be used any more."""
        while (said := self._said.get()) is not END:
            if isinstance(said, Report):
                yield said
            elif isinstance(said, tuple):
                progress(*said)
            elif isinstance(said, Unusable) or not isinstance(said, Exception):
                raise said
            else:
                on_failure(said)

    def _run(self) -> None:
        try:
            self._ask()
        except BaseException as problem:
            self._said.put(problem)
        finally:
            self._said.put(END)

    def _ask(self) -> None:
        first = self._span.rows[0]
        names = [without_password(name) for name in first.inputs]
        sampling = self._settings.sampling.with_overrides(**self._span.sampling)
        usual = vars(self._settings.pruning) | vars(sampling)
        with ExitStack() as stack:
            try:
                sampling.check_one_file(len(names))
                paths = [stack.enter_context(local_file(path)) for path in first.paths]
                files = [LocalInput(path, name, sampling) for path, name in zip(paths, names, strict=True)]
                inputs = RemoteInputs(self._server, files, usual, show=self._show)
                stack.callback(inputs.close)
            except Exception as problem:
                self._fail(problem, self._span.rows)
                return
            for row in self._span.rows:
                if self._stopped.is_set():
                    return
                try:
                    report = self._answer(inputs, row)
                except Unusable:
                    raise
                except Exception as problem:
                    self._fail(problem, [row])
                else:
                    self._said.put(self._settings.complete(report, row))

    def _answer(self, inputs: RemoteInputs, row: "Row") -> Report:
        from evoprune.language import Turn

        earlier = Turn.to_messages(row.earlier) if row.earlier else None
        options = vars(row.generation(self._settings.generation))
        while True:
            try:
                answer = inputs.answer(row.prompt, ignored, same, earlier, options)
                for _ in answer:
                    pass
                return answer.report
            except Busy as problem:
                if self._stopped.wait(problem.retry_s):
                    raise

    def _show(self, *step: Any) -> None:
        if len(step) == 3:
            self._said.put(step)

    def _fail(self, problem: Exception, rows: Sequence["Row"]) -> None:
        self._said.put(problem)
        for row in rows:
            self._said.put(self._settings.failed(row, failure(problem)))


def same(report: Report) -> Report:
    return report


def ignored(text: str) -> None:
    pass
