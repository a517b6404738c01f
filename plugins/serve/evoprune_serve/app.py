"""The server application, with routes for OpenAI's chat completions, responses, models, and files, and for health and metrics."""

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import anyio
import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Match, Route

from evoprune.backend import empty_cache
from evoprune.errors import EvopruneError
from evoprune.session import PipelineOptions
from evoprune.untrusted import check_levels
from evoprune.util import did_you_mean, listed, shorten
from evoprune.video_qa import VideoQA
from evoprune_serve.asks import ASK_PATHS, Asks
from evoprune_serve.chat import END, read_chat
from evoprune_serve.checks import Checks
from evoprune_serve.errors import ApiError, plain, refused, told
from evoprune_serve.forms import UploadForm
from evoprune_serve.guard import (
    Access,
    Activity,
    Bodies,
    BodyRoom,
    Watched,
    client_of,
    disconnected,
    log_line,
    protection,
)
from evoprune_serve.metrics import TYPE, Metrics
from evoprune_serve.page import PAGE_PATHS, Handler, Page, file_names
from evoprune_serve.question import Question, has_schema, no_model
from evoprune_serve.reply import Read, Reply, stream_event
from evoprune_serve.responses import read_response
from evoprune_serve.sources import Sources
from evoprune_serve.store import Store
from evoprune_serve.uploads import PURPOSES, Uploads
from evoprune_serve.work import Done, Failed, Gone, Job, Piece, Task, Told, Work

CHAT = "/v1/chat/completions"
RESPONSES = "/v1/responses"
FILES = "/v1/files"
FORM_FIELDS = ("file", "purpose")  # of an upload
STRUCTURE = (b",", b"[", b"{")  # characters that begin a value in JSON, apart from the first one
PART_BYTES = 2**16  # size of the arrays in which a body is collected
LARGE_BODY = 2**22  # size of a body after which unused memory is returned to the system, in bytes
MOST_VALUES = 2**17  # maximum number of such characters in a body
UPLOAD_THREADS = 4  # uploads whose data is parsed and written at the same time
PROBE_THREADS = 4  # complete uploads that are checked and stored at the same time
VALUE_BYTES = 512  # upper bound on the memory for a parsed value, in addition to the text of strings
SENDING_S = 60.0  # extra time after the deadline, in seconds, for a slow client to receive the end of a stream
AGEING_S = 60.0  # interval between checks for expired files, in seconds
ALIVE_S = 5.0  # interval between lines of a stream while there is nothing to send, in seconds
CLOSED = 499  # status in logs and metrics if the client has disconnected
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """Settings of a server.

    Attributes:
        folder: A private folder for files sent by clients.
        usual: The default values for options not set by a request.
        urls, folders: See `Sources`.
        files_bytes: Maximum total size of the files sent by clients, in bytes.
        file_age_s: The retention time for uploaded files, in seconds.
        most, keep: See `Work`.
        answer_s: Maximum time from a request's arrival to the end of its answer, in seconds.
        log: Called with a log line for each request.
        log_contents: Whether to also log questions and answers.
    """

    folder: Path
    usual: PipelineOptions = field(default_factory=PipelineOptions)
    access: Access = field(default_factory=Access)
    urls: bool = False
    folders: tuple[Path, ...] = ()
    files_bytes: int = 8 * 2**30
    file_age_s: float = 24 * 3600.0
    most: int = 32
    keep: int = 8
    answer_s: float = 600.0
    log: Callable[[str], None] = lambda line: None
    log_contents: bool = False


class Server:
    """The API routes and their shared state."""

    def __init__(self, models: Mapping[str, VideoQA], settings: Settings):
        self.settings = settings
        self.models = models
        self.store = Store(settings.folder, settings.files_bytes)
        self.uploads = Uploads(self.store, settings.file_age_s, settings.files_bytes // 2)
        self.upload_threads = anyio.CapacityLimiter(UPLOAD_THREADS)
        self.probe_threads = anyio.CapacityLimiter(PROBE_THREADS)
        limit = settings.access.upload_bytes
        self.sources = Sources(self.store, self.uploads, settings.urls, settings.folders, limit)
        self.work = Work(models, settings.most, settings.keep)
        self.checks = Checks()
        self.metrics = Metrics(self.work)
        most = settings.access.bodies_bytes
        self.bodies = Bodies(most, share=max(most // 2, settings.access.body_bytes))
        self.parsing = (
            asyncio.Lock()
        )  # allows one body at a time, which limits the memory for texts that are being parsed
        self.started = int(time.time())
        self.files = {name: file_names(qa) for name, qa in models.items()}  # names of GGUF files

    # Questions.

    async def chat(self, request: Request) -> Response:
        return await self.answer(request, read_chat)

    async def response(self, request: Request) -> Response:
        return await self.answer(request, read_response)

    async def answer(self, request: Request, read: Read) -> Response:
        """Answer a question with a complete or a streamed response. `read` parses the request body."""
        deadline_s = self.deadline_s()
        async with self.asking(request, read, deadline_s) as asked:
            first = await unless_gone(request, asked.next())
            if asked.question.stream:
                return JobStream(asked, asked.chunks(first))
            return JSONResponse(await unless_gone(request, asked.whole(first)))

    async def task(self, request: Request, task: Task) -> Response:
        """Run a request's task in the model thread.

        The response is the task's last message as JSON or, if the request asks for streaming, a stream with all messages.
        """
        deadline_s = self.deadline_s()
        async with self.asking(request, read_chat, deadline_s, task) as asked:
            event = await unless_gone(request, asked.next())
            if asked.question.stream:
                return JobStream(asked, asked.told(event))
            while not event.last:
                event = await unless_gone(request, asked.next())
            self.log(request, 200)
            return JSONResponse(event.facts)

    async def stream(self, request: Request, read: Read, task: Task) -> Response:
        """Run a request's task in the model thread, after opening its inputs. Responds at once with a stream of JSON lines."""
        deadline_s = self.deadline_s()
        async with self.asking(request, read, deadline_s, task, opens=True) as asked:
            return JobStream(asked, asked.lines(), "application/x-ndjson")

    def deadline_s(self) -> float:
        """Return the deadline for a request arriving now, on the event loop's clock."""
        return asyncio.get_running_loop().time() + self.settings.answer_s

    @asynccontextmanager
    async def asking(
        self, request: Request, read: Read, deadline_s: float, task: Task | None = None, opens: bool = False
    ) -> "AsyncIterator[Asked]":
        """Parse a request, queue a job, fetch its files, and yield the request. Exceptions in the context cancel the job.

        If there is a task, the job runs it instead of answering the question. For `opens`, see `Work.submit`.
        """
        job = None
        try:
            with self.bodies.room(client_of(request)) as room:
                body = await read_json(request, room, self.parsing)
                reading = partial(read, body, self.settings.usual, [*self.models])
                if has_schema(body):  # checking it may take seconds, so the request waits in the queue
                    job = self.work.admit(client_of(request))
                    checking = self.checks.run(job.client, partial(if_wanted, job, reading))
                    question, sources, form = await in_time(unless_gone(request, checking), deadline_s)
                else:
                    question, sources, form = await run_in_threadpool(reading)
                    job = self.work.admit(client_of(request))
                del body, reading
                fetch = partial(self.sources.fetch, sources, job.check)
                submitted = self.work.submit(job, question, fetch, task, opens)
                names = await in_time(unless_gone(request, submitted), deadline_s)
                del sources, fetch
            yield Asked(self, request, job, question, names, form, deadline_s)
        except BaseException as problem:
            if job:
                self.work.cancel(job)
            if isinstance(problem, Gone):  # evicted by another request, or the server is shutting down
                raise self.work.refusal() from problem
            if isinstance(problem, EvopruneError):
                raise told(problem, {str(self.settings.folder): "the server"}) from problem
            raise

    def count(self, request: Request, status: int) -> None:
        """Count a request in the metrics by its path. Requests for a single file or model count as /v1/files or /v1/models."""
        path = request.url.path
        known = (each for each in PATHS if path == each or path.startswith(f"{each}/"))
        self.metrics.request(next(known, "other"), status)

    def counted(self, route: Handler, logged: bool = True) -> Handler:
        """Wrap a route to count its responses and, if `logged` is True, log them. For errors, the error handlers do this."""

        async def counting(request: Request) -> Response:
            response = await route(request)
            if logged:
                self.log(request, response.status_code)
            else:
                self.count(request, response.status_code)
            return response

        return counting

    def log(self, request: Request, status: int, *more: str) -> None:
        """Count a request in the metrics and write a log line for it, ending with the words in `more`."""
        self.count(request, status)
        self.settings.log(log_line(request, status, *more))

    # Models.

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model(name) for name in self.models]})

    async def model(self, request: Request) -> Response:
        name = request.path_params["model"]
        if name not in self.models:
            raise no_model(name, self.models)
        return JSONResponse(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        found = {"id": name, "object": "model", "created": self.started, "owned_by": "evoprune"}
        return found | ({"files": names} if (names := self.files[name]) else {})

    # Files.

    async def upload(self, request: Request) -> Response:
        """Store the file from an upload form, and respond with its description."""
        kind = request.headers.get("content-type", "")
        if kind.partition(";")[0].strip().lower() != "multipart/form-data":
            raise ApiError(415, "a file is sent as multipart/form-data", code="unsupported_media_type")
        if "content-encoding" in request.headers:
            raise ApiError(415, "send the body without a Content-Encoding", code="unsupported_media_type")
        with self.uploads.incoming(client_of(request)) as incoming:
            form = UploadForm(kind, incoming)
            async for piece in request.stream():
                incoming.reserve(len(piece))
                await anyio.to_thread.run_sync(form.write, piece, limiter=self.upload_threads)
            if not form.complete:
                raise refused("the form breaks off before its end")
            purpose = form.fields.pop("purpose", PURPOSES[0])
            if purpose not in PURPOSES:
                meant = did_you_mean(purpose[:60], PURPOSES)
                raise refused(f"{meant}purpose is one of {', '.join(PURPOSES)}", "purpose")
            for name in form.fields:
                meant = did_you_mean(name[:60], FORM_FIELDS) or f"the fields are {listed(FORM_FIELDS)}"
                message = f"{name[:60]} is not supported here; {meant.strip()}"
                raise refused(message, name[:60], "unsupported_parameter")
            if form.filename is None:
                raise refused("the form has no file", "file", "missing_required_parameter")
            keep = partial(incoming.keep, form.filename, purpose)
            upload = await anyio.to_thread.run_sync(keep, limiter=self.probe_threads)
        return JSONResponse(upload.record())

    async def file(self, request: Request) -> Response:
        return JSONResponse(self.uploads.get(request.path_params["file_id"]).record())

    async def delete_file(self, request: Request) -> Response:
        file_id = request.path_params["file_id"]
        self.uploads.delete(file_id)
        return JSONResponse({"id": file_id, "object": "file", "deleted": True})

    async def age(self) -> None:
        """Periodically delete expired files, even if no requests arrive."""
        while True:
            await asyncio.sleep(AGEING_S)
            await run_in_threadpool(self.uploads.drop_old)
            await run_in_threadpool(self.store.drop_old)

    # The server itself.

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def read_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), headers={"Content-Type": TYPE})

    def routes(self) -> list[Route]:
        """Return the routes of the API."""
        return [
            Route(CHAT, self.chat, methods=["POST"]),
            Route(RESPONSES, self.response, methods=["POST"]),
            Route("/v1/models", self.counted(self.list_models)),
            Route("/v1/models/{model:path}", self.counted(self.model)),
            Route(FILES, self.counted(self.upload), methods=["POST"]),
            Route(f"{FILES}/{{file_id}}", self.counted(self.file), methods=["GET"]),
            Route(f"{FILES}/{{file_id}}", self.counted(self.delete_file), methods=["DELETE"]),
            Route("/health", self.counted(self.health, logged=False)),
            Route("/metrics", self.counted(self.read_metrics, logged=False)),
        ]


PATHS = (CHAT, RESPONSES, "/v1/models", FILES, "/health", "/metrics", *ASK_PATHS, *PAGE_PATHS)  # counted separately


@dataclass
class Asked:
    """A request being answered, together with its job."""

    server: Server
    request: Request
    job: Job
    question: Question
    names: dict[str, str]  # names shown to the client instead of local paths
    reply: Reply
    deadline_s: float
    logged: bool = False

    def log(self, status: int, *more: str) -> None:
        """Count the request in the metrics and log it. Called at the end of the answer."""
        self.logged = True
        self.server.log(self.request, status, *more)

    async def next(self) -> Piece | Done | Told:
        """Wait for the next event: a piece of the answer, the end of the answer, or a task message.

        Raises:
            ApiError: If the request fails or the deadline passes.
        """
        event = await in_time(self.job.next(), self.deadline_s)
        if isinstance(event, Failed):
            problem = told(event.problem, self.names)
            if problem.status >= 500 and problem is not event.problem:  # an unexpected exception
                self.server.settings.log("".join(traceback.format_exception(event.problem)))
            raise problem from event.problem
        return event

    async def whole(self, event: Piece | Done) -> dict[str, Any]:
        while not isinstance(event, Done):
            event = await self.next()
        self.count(event)
        return self.reply.whole(event, self.job.queue_s)

    def count(self, done: Done) -> None:
        """Count a complete answer in the metrics and log it."""
        report = done.report
        self.server.metrics.answer(self.question.model, report, self.job.queue_s, done.kept)
        tokens = f"{report.tokens.prompt or 0}+{report.tokens.new or 0} tokens"
        facts = [self.reply.identity, self.question.model, tokens, f"{report.time_ms.total or 0:.0f} ms"]
        if self.server.settings.log_contents:
            facts += [repr(self.question.text), repr(report.answer)]
        self.log(200, *facts)

    async def chunks(self, event: Piece | Done) -> AsyncIterator[bytes]:
        """Yield the events of a streamed answer, starting with `event`.

        If the answer fails, the stream ends with an error event.
        """
        yield self.reply.begin()
        try:
            while not isinstance(event, Done):
                if event.text or event.logprobs:
                    yield self.reply.piece(event)
                event = await self.next()
        except ApiError as problem:
            self.log(problem.status, self.reply.identity, *problem.codes)
            yield self.reply.failed(problem)
            return
        self.count(event)
        yield self.reply.end(event, self.job.queue_s)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield a task's events as JSON lines, and a line at least every `ALIVE_S` seconds. A failure is the last event."""
        waiting = None
        try:
            event = None
            while event is None or not event.last:
                waiting = waiting or asyncio.ensure_future(self.next())
                done, _ = await asyncio.wait([waiting], timeout=ALIVE_S)
                if not done:
                    yield json_line({"event": "alive"})
                    continue
                event, waiting = waiting.result(), None
                if isinstance(event, Done):
                    yield json_line({"event": "end", "record": asdict(event.report)})
                else:
                    yield json_line(event.facts)
            if isinstance(event, Done):
                self.count(event)
            else:
                self.log(200)
        except ApiError as problem:
            self.log(problem.status, self.reply.identity, *problem.codes)
            yield json_line({"event": "error"} | error_body(problem))
        finally:
            if waiting:
                waiting.cancel()

    async def told(self, event: Told) -> AsyncIterator[bytes]:
        """Yield a task's messages as events, starting with `event`. If the task fails, the stream ends with an error event."""
        try:
            while not event.last:
                yield stream_event(event.facts)
                event = await self.next()
        except ApiError as problem:
            self.log(problem.status, *problem.codes)
            yield stream_event(problem.body)
            return
        yield stream_event(event.facts)
        self.log(200)
        yield END


def json_line(facts: dict[str, Any]) -> bytes:
    return f"{json.dumps(facts)}\n".encode()


def error_body(problem: ApiError) -> dict[str, Any]:
    """Return an error with the error of a record of `ask`, or null if it is an error of the API."""
    return {"error": problem.body["error"] | {"record": problem.record}}


class JobStream(StreamingResponse):
    """A streamed response. The job is canceled if the client disconnects or reads too slowly."""

    def __init__(self, asked: Asked, chunks: AsyncIterator[bytes], kind: str = "text/event-stream"):
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(chunks, media_type=kind, headers=headers)
        self._asked = asked

    async def __call__(self, scope, receive, send) -> None:
        try:
            async with asyncio.timeout_at(self._asked.deadline_s + SENDING_S):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            pass  # the connection is closed because the response is incomplete
        finally:
            if not self._asked.logged:  # the client disconnected
                self._asked.log(CLOSED, self._asked.reply.identity)
            self._asked.server.work.cancel(self._asked.job)


async def read_json(request: Request, room: BodyRoom, parsing: asyncio.Lock) -> Any:
    """Read a request's JSON body. Memory for the body is reserved in `room` as it arrives, and `parsing` is held to parse it.

    The parser holds Python's global lock, so a body must not contain many values.

    Raises:
        ApiError: If the body isn't valid JSON, has too many values, or has an unsupported content type or encoding.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "send Content-Type: application/json", code="unsupported_media_type")
    if "content-encoding" in request.headers:
        raise ApiError(415, "send the body without a Content-Encoding", code="unsupported_media_type")
    parts: list[bytearray] = []  # one growing array would leave holes in the heap that are as large as all bodies
    read = values = 0
    try:
        async for piece in request.stream():
            values += sum(
                piece.count(each) for each in STRUCTURE if each in piece
            )  # `in` is faster if there aren't any
            if values > MOST_VALUES:
                message = f"the body has more than {MOST_VALUES:,} commas, opening brackets, and opening braces"
                raise refused(message, code="invalid_json")
            read += len(piece)
            room.grow(max(read, values * VALUE_BYTES))
            if not parts or len(parts[-1]) >= PART_BYTES:
                parts.append(bytearray())
            parts[-1] += piece
    except BaseException:
        parts.clear()  # the traceback would keep them until the client has its answer
        raise
    large = read > LARGE_BODY
    async with parsing:
        try:
            return await run_in_threadpool(_parsed, parts)
        finally:
            if large:  # glibc would otherwise keep the memory of this and earlier bodies
                await run_in_threadpool(empty_cache)


def _parsed(parts: list[bytearray]) -> Any:
    """Parse a body and clear its parts.

    A single wide character makes a string take four times its memory. orjson, unlike Python's own parser, doesn't make such a
    string of the whole body. A long string in the body that contains one is refused, because data is base64.

    Raises:
        ApiError: If it isn't valid JSON, or contains such a string.
    """
    data = b"".join(parts)
    parts.clear()
    try:
        value = orjson.loads(data)
        check_levels(value)
        if not any(len(text) > LARGE_BODY // 4 and not text.isascii() for text in _texts(value)):
            return value
        message = f"a string of more than {LARGE_BODY // 4:,} characters has characters other than ASCII"
    except ValueError as problem:
        message = f"the body is not JSON in UTF-8: {problem}"
    # Raised here because the parser's exceptions, and the tracebacks of all exceptions, would keep the body in memory after its
    # room is released.
    value = data = None
    raise refused(message, code="invalid_json")


def _texts(value: Any) -> Iterator[str]:
    """Yield all strings in a parsed JSON value, including the names of fields."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            yield from value
            values += value.values()
        elif isinstance(value, list):
            values += value


def if_wanted(job: Job, function: Callable[[], T]) -> T:
    """Call a function unless the job has been canceled in the meantime, which raises Gone."""
    job.check()
    return function()


async def in_time(waiting: Awaitable[T], deadline_s: float) -> T:
    """Await a result until a deadline on the event loop's clock.

    Raises:
        ApiError: If the deadline has passed.
    """
    try:
        async with asyncio.timeout_at(deadline_s):
            return await waiting
    except TimeoutError:
        raise plain(504, "there was no answer in time: see --timeout") from None


async def unless_gone(request: Request, waiting: Awaitable[T]) -> T:
    """Await a result, but stop waiting if the client disconnects.

    Raises:
        ClientDisconnect: If the client disconnects before the result is ready.
    """
    result = asyncio.ensure_future(waiting)
    gone = asyncio.ensure_future(disconnected(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        result.cancel()
        gone.cancel()


def _no_path(path: str) -> str:
    """Return the message for a request to a path that doesn't exist."""
    return f"there is no {shorten(path, 100)}; {did_you_mean(path[:100], PATHS)}docs/server.md lists the paths"


def _other_method(request: Request) -> ApiError:
    """Return the error for a method that no route of an existing path accepts."""
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    allowed = {method for route in matching for method in route.methods}
    instead = listed(sorted(allowed - {"HEAD"}), "or")
    message = (
        f"send {instead} to {shorten(request.url.path, 100)}, not {request.method[:20]}; docs/server.md has examples"
    )
    return ApiError(405, message, headers={"Allow": ", ".join(sorted(allowed))})


def make_app(models: Mapping[str, VideoQA], settings: Settings) -> Starlette:
    """Create the server application.

    Args:
        models: The loaded models by name. The first model answers requests that don't specify a model.
    """
    server = Server(models, settings)
    activity = Activity()

    def refuse(request: Request, problem: Exception) -> Response:
        """Log an error, and return an error response in OpenAI's format."""
        if isinstance(problem, HTTPException):
            detail = _no_path(request.url.path) if problem.status_code == 404 else problem.detail
            plainly = plain(problem.status_code, detail, problem.headers)
            problem = _other_method(request) if problem.status_code == 405 else plainly
        elif not isinstance(problem, ApiError):
            settings.log("".join(traceback.format_exception(problem)))
            problem = told(problem, {})
        server.log(request, problem.status, *problem.codes)
        body = error_body(problem) if request.url.path in ASK_PATHS else problem.body
        return JSONResponse(body, problem.status, headers=problem.headers)

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        ageing = asyncio.create_task(server.age())
        yield
        ageing.cancel()
        await run_in_threadpool(server.work.close)

    def gone(request: Request, problem: Exception) -> Response:
        server.log(request, CLOSED)
        return Response(status_code=CLOSED)

    handlers = {ApiError: refuse, HTTPException: refuse, ClientDisconnect: gone, Exception: refuse}
    app = Starlette(
        routes=[*server.routes(), *Asks(server).routes(), *Page(server).routes()],
        middleware=[Middleware(Watched, activity=activity), *protection(settings.access, refuse)],
        exception_handlers=handlers,
        lifespan=life,
    )
    app.state.server = server
    app.state.activity = activity
    return app
