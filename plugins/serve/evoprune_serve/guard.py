"""Middleware that checks the host, origin, API key, and body size of requests before they are handled."""

import asyncio
import hmac
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evoprune.util import harmless
from evoprune_serve.errors import ApiError, full, plain

OPEN_PATHS = ("/", "/health")  # no key required
UNWATCHED = ("/health", "/metrics")  # requests of programs that watch the server
UPLOAD_PATHS = ("/v1/files", "/v1/evoprune/files")
FORM_BYTES = 2**16  # maximum size of an upload form, excluding its file
SLOW_BYTES_S = 2**15  # minimum rate in bytes per second; slower bodies use up `SLOW_S`
SLOW_S = 30.0  # time budget for a slow body, in seconds
LOOPBACK = ("localhost", "127.0.0.1", "[::1]", "::1")
BODIES_RETRY_S = 5


def client_of(request: Request) -> str:
    """Return a client's IP address, which is used to distinguish clients."""
    return request.client.host if request.client else "unknown"


async def disconnected(request: Request) -> None:
    """Wait until the client disconnects. The request body must already have been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def log_line(request: Request, status: int, *more: str) -> str:
    """Return the log line for a request, ending with the words in `more`."""
    return " ".join([client_of(request), request.method, harmless(request.url.path[:100]), str(status), *more])


@dataclass(frozen=True)
class Access:
    """Access rules: who may send requests to the server, and the maximum request size.

    Attributes:
        key: The API key required as `Authorization: Bearer`, or None if no key is required.
        hosts: The server's host names. If empty, any name is accepted.
        origins: Origins of web pages allowed to send requests, in addition to the server's own pages.
        body_bytes: Maximum size of a JSON body, in bytes.
        bodies_bytes: Maximum total size of all JSON bodies in memory, in bytes.
        upload_bytes: Maximum size of an uploaded file, in bytes.
    """

    key: str | None = None
    hosts: Sequence[str] = LOOPBACK
    origins: Sequence[str] = ()
    body_bytes: int = 64 * 2**20
    bodies_bytes: int = 128 * 2**20
    upload_bytes: int = 2 * 2**30


class Bodies:
    """Limits the memory usage of all JSON request bodies.

    Args:
        limit: Maximum number of bytes for all clients combined.
        share: Maximum number of bytes per client, so that other clients can always send requests.
    """

    def __init__(self, limit: int, share: int):
        self._limit = limit
        self._share = share
        self._bytes = 0
        self._clients: Counter[str] = Counter()  # bytes in use by client

    @contextmanager
    def room(self, client: str) -> "Iterator[BodyRoom]":
        """Yield a `BodyRoom` that reserves memory for a request body. The memory is released when the context ends."""
        room = BodyRoom(self, client)
        try:
            yield room
        finally:
            self._bytes -= room.bytes
            self._clients[client] -= room.bytes
            if not self._clients[client]:
                del self._clients[client]

    def _add(self, client: str, count: int) -> None:
        if self._bytes + count > self._limit or self._clients[client] + count > self._share:
            raise full(BODIES_RETRY_S)
        self._bytes += count
        self._clients[client] += count


class BodyRoom:
    """The memory reserved for a single request body."""

    def __init__(self, bodies: Bodies, client: str):
        self.bytes = 0
        self._bodies = bodies
        self._client = client

    def grow(self, size: int) -> None:
        """Reserve more memory, so that `size` bytes are reserved in total.

        Raises:
            ApiError: If one of the limits of `Bodies` is exceeded.
        """
        if size > self.bytes:
            self._bodies._add(self._client, size - self.bytes)
            self.bytes = size


class Activity:
    """Counts the requests in progress, and measures the time since the last one. Checks of the server's health don't count."""

    def __init__(self):
        self._running = 0
        self._ended_s = time.monotonic()

    def idle_s(self) -> float:
        """Return the time without requests until now, in seconds."""
        return 0.0 if self._running else time.monotonic() - self._ended_s

    @contextmanager
    def running(self) -> Iterator[None]:
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            self._ended_s = time.monotonic()


class Watched:
    """Middleware that records the server's activity."""

    def __init__(self, app: ASGIApp, activity: Activity):
        self._app = app
        self._activity = activity

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in UNWATCHED:
            await self._app(scope, receive, send)
            return
        with self._activity.running():
            await self._app(scope, receive, send)


class Framing:
    """Middleware that rejects requests with both a Content-Length and a Transfer-Encoding, and closes their connections.

    A proxy may use the Content-Length to find the end of the body, whereas this server would use the Transfer-Encoding. The bytes
    between the two ends could then contain a request seen only by the proxy or only by the server. This attack is known as request
    smuggling (RFC 9112, section 6.3).
    """

    def __init__(self, app: ASGIApp, refuse: Callable[[Request, Exception], Response]):
        """Wrap an application. `refuse` builds the response for an error."""
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            names = {name for name, _ in scope["headers"]}
            if {b"content-length", b"transfer-encoding"} <= names:
                message = "a request has either a Content-Length or a Transfer-Encoding"
                problem = ApiError(400, message, headers={"Connection": "close"})
                await self._refuse(Request(scope), problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class Guard:
    """Middleware that passes allowed requests on to the application and responds to all others with an error."""

    def __init__(self, app: ASGIApp, access: Access, refuse: Callable[[Request, Exception], Response]):
        """Wrap an application. `refuse` builds the response for an error."""
        self._app = app
        self._access = access
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        limit = self._access.body_bytes
        if scope["path"] in UPLOAD_PATHS:
            limit = self._access.upload_bytes + FORM_BYTES
        body = Body(headers, limit, receive, send)
        try:
            self._check(scope["path"], headers, limit)
        except ApiError as problem:
            await self._refuse(Request(scope), problem)(scope, body.receive, body.send)
            return
        await self._app(scope, body.receive, body.send)

    def _check(self, path: str, headers: Headers, limit: int) -> None:
        """Raise ApiError if the host or origin isn't allowed, the key is wrong, or the Content-Length exceeds `limit` bytes."""
        access = self._access
        if access.hosts and host_of(headers.get("host", "")) not in access.hosts:
            raise ApiError(403, "this server has another name: see --allow-host", code="wrong_host")
        origin = headers.get("origin")
        own = {f"{scheme}://{headers.get('host', '')}" for scheme in ("http", "https")}
        if origin is not None and origin not in own and origin not in access.origins:
            raise ApiError(403, "pages of this origin are not allowed: see --cors", code="wrong_origin")
        if access.key is not None and path not in OPEN_PATHS:
            self._check_key(headers.get("authorization", ""))
        stated = headers.get("content-length", "0")
        if not stated.isdecimal() or int(stated[:20]) > limit:
            raise too_large(limit)

    def _check_key(self, authorization: str) -> None:
        scheme, _, given = authorization.partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self._access.key.encode())  # takes constant time
        if scheme.lower() != "bearer" or not right:
            message = "the API key is missing or wrong: send it as Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})


def protection(access: Access, refuse: Callable[[Request, Exception], Response]) -> list[Middleware]:
    """Return all middleware of an application, in order. `refuse` builds the response for an error."""
    middleware = [Middleware(Framing, refuse=refuse)]
    if access.origins:
        # OpenAI's browser client sends its own headers and reads `Retry-After`.
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=access.origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["Retry-After"],
            )
        )
    return [*middleware, Middleware(Guard, access=access, refuse=refuse)]


def host_of(header: str) -> str:
    """Return the host from a Host header in lowercase, without the port."""
    host = header.lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.partition(":")[0]


def too_large(limit: int) -> ApiError:
    message = f"the body has more than {limit >> 20} MiB"
    return ApiError(413, message, code="body_too_large")


class Body:
    """Receives a request body, which may have at most `limit` bytes and must not arrive too slowly.

    Waiting for the body uses up a time budget of `SLOW_S` seconds, and each byte received refills it. The budget never exceeds
    `SLOW_S`, regardless of the body size or how much of the body arrives at once.

    If the response starts before the whole body has been received, the connection is closed after the response. Otherwise, the rest
    of the body would be parsed as the next request.
    """

    def __init__(self, headers: Headers, limit: int, receive: Receive, send: Send):
        self._limit = limit
        self._receive = receive
        self._send = send
        self._received = 0
        self._complete = headers.get("content-length", "0") == "0" and "transfer-encoding" not in headers
        self._left_s = SLOW_S

    async def receive(self) -> Message:
        """Receive the request's next ASGI message.

        Raises:
            ApiError: If the body exceeds its limit or arrives too slowly.
        """
        if self._complete:  # the next message will be the client disconnecting
            return await self._receive()
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._left_s):
                message = await self._receive()
        except TimeoutError:
            raise plain(408, "the request body arrives too slowly") from None
        count = len(message.get("body", b""))
        self._received += count
        self._left_s = min(SLOW_S, self._left_s - (time.monotonic() - began) + count / SLOW_BYTES_S)
        self._complete = not message.get("more_body", False)
        if self._received > self._limit:
            self._complete = False
            raise too_large(self._limit)
        return message

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start" and not self._complete:
            message = message | {"headers": [*message.get("headers", ()), (b"connection", b"close")]}
        await self._send(message)
