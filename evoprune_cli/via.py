"""The connection to a running `evoprune serve` (`--via`). Does not import torch."""

import http.client
import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, Self
from urllib.parse import quote, urlsplit

import evoprune
from evoprune.errors import EvopruneError, ModelError, OutOfMemory, PluginError, UsageError, VideoError
from evoprune.session import ModelOptions
from evoprune.util import listed, shown
from evoprune_cli.background import Background, SocketConnection
from evoprune_cli.options import PipelineArguments
from evoprune_cli.terminal import tell
from evoprune_cli.typed import typed
from evoprune_cli.variables import SECRET

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
KINDS = {kind.type: kind for kind in (UsageError, VideoError, ModelError, PluginError, OutOfMemory)}
OWN_HINT = "evoprune serve --stop, then evoprune serve --detach, starts it again"


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
