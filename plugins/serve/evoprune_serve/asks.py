"""The routes that `evoprune ask --via` uses. They take the options of `ask`, and answer with its events and its record.

`GET /v1/evoprune` describes the server. `POST /v1/evoprune/ask` answers a question with a stream of JSON lines, and
`POST /v1/evoprune/files` stores a file for a question. docs/server.md describes them. They may change in every version, so a client
of another version is rejected.
"""

import asyncio
import json
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, Protocol

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import evoprune
from evoprune.bench import Reference
from evoprune.errors import UsageError
from evoprune.language import GenerationOptions, Turn
from evoprune.report import Report
from evoprune.session import Answer, EncodedInputs, PipelineOptions, PruneOptions
from evoprune.util import OPTION, check_type, shorten
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA
from evoprune_cli import notes_about, why_single_questions
from evoprune_serve.errors import ApiError, refused
from evoprune_serve.fields import Fields
from evoprune_serve.guard import client_of, disconnected
from evoprune_serve.messages import MOST_CHARACTERS, MOST_SOURCES
from evoprune_serve.page import Handler
from evoprune_serve.question import SPEECH, Question, file_setting, no_model
from evoprune_serve.sources import REQUEST, ClientFile, ClientInput
from evoprune_serve.work import Done, Job, Put, Task, Told, Work, begun

INFO = "/v1/evoprune"
ASK = f"{INFO}/ask"
SEND = f"{INFO}/files"
VISIT = f"{INFO}/visit"
ASK_PATHS = (ASK, SEND, VISIT, INFO)
TAKEN = (*PruneOptions.PRUNING, *SamplingOptions.FILES, *GenerationOptions.ANSWER)
FILE_NAME = re.compile(r"(?!\.{1,2}$)[^/\0]+")
LONGEST_NAME = 255  # in bytes
DIGEST = re.compile(r"[0-9a-f]{64}")
ENDING_S = 0.5  # interval between checks for whether the server is shutting down, in seconds
PROGRESS_S = 0.1  # minimum time between progress events, in seconds


class Asking(Protocol):
    """The methods and attributes of `Server` used by these routes."""

    settings: Any
    work: Work
    models: Any
    uploads: Any
    upload_threads: Any
    probe_threads: Any

    async def stream(self, request: Request, read: Any, task: Task) -> Response: ...

    def counted(self, route: Handler, logged: bool = True) -> Handler: ...


class Asks:
    """The routes for `evoprune ask --via`."""

    def __init__(self, server: Asking):
        self._server = server
        self._visits: dict[str, list[str]] = {}  # IDs of the files that each client has sent

    def routes(self) -> list[Route]:
        return [
            Route(INFO, self._server.counted(self.info, logged=False), methods=["GET"]),
            Route(ASK, self.ask, methods=["POST"]),
            Route(VISIT, self._server.counted(self.visit, logged=False), methods=["GET"]),
            Route(SEND, self._server.counted(self.send), methods=["POST"]),
        ]

    async def info(self, request: Request) -> Response:
        """Respond with the version, the models, the options of the model that the client means, and the usual options."""
        models, settings = self._server.models, self._server.settings
        name = meant(request.query_params.get("model"), models)
        return JSONResponse(
            {
                "evoprune": evoprune.__version__,
                "models": [*models],
                "model": name,
                "loaded": name and loading_options(name, models[name]),
                "options": usual_options(settings.usual),
                "upload_bytes": settings.access.upload_bytes,
            }
        )

    async def visit(self, request: Request) -> Response:
        """Respond with an ID. Files that are sent with it are kept as long as the client keeps this connection open."""
        return StreamingResponse(self._visiting(request), media_type="application/x-ndjson")

    async def _visiting(self, request: Request) -> AsyncIterator[bytes]:
        identity = secrets.token_hex(16)
        self._visits[identity] = []
        leaving = asyncio.ensure_future(disconnected(request))
        try:
            yield json.dumps({"visit": identity}).encode() + b"\n"
            while not (leaving.done() or self._server.work.is_ending):
                await asyncio.wait([leaving], timeout=ENDING_S)
        finally:
            leaving.cancel()
            for file_id in self._visits.pop(identity):
                with suppress(ApiError):  # it has expired
                    self._server.uploads.delete(file_id)

    async def send(self, request: Request) -> Response:
        """Store the request's body as long as the client's visit lasts, and respond with its digest."""
        server = self._server
        sent = self._visits.get(request.query_params.get("visit", ""))
        if sent is None:
            raise refused("there is no such visit", "visit")
        with server.uploads.incoming(client_of(request)) as incoming:
            async for piece in request.stream():
                if piece:
                    incoming.reserve(len(piece))
                    await anyio.to_thread.run_sync(incoming.write, piece, limiter=server.upload_threads)
            upload = await anyio.to_thread.run_sync(incoming.keep_unchecked, limiter=server.probe_threads)
        sent.append(upload.id)
        if request.query_params["visit"] not in self._visits:  # the client has left in the meantime
            server.uploads.delete(upload.id)
        return JSONResponse({"digest": upload.content.digest})

    async def ask(self, request: Request) -> Response:
        return await self._server.stream(request, read_ask, self._answer)

    # The task, which runs in the model thread.

    def _answer(self, job: Job, put: Put) -> None:
        question = job.assignment.question
        progress = Progress(job)
        work = self._server.work
        session = work.session(question).session
        if question.conversation:
            session.pruning.method.check_conversation()
        encoded, kept = work.encoded(job, progress)
        names = Names(job.assignment.files.paths, self._server.settings.folder)
        notes = (note for plan in encoded.plans for note in notes_about(plan, question.sampling))
        said = {
            "event": "inputs",
            "record": asdict(names.of(encoded.report)),
            "ignores_sound": encoded.ignores_sound,
            "notes": [*map(names.text, notes)],
            "why_single": why_single_questions(None, session),
        }
        if not question.text:
            put(Told(said, last=True))
            return
        put(Told(said))
        answer = self._streamed(job, put, encoded, names)
        report = names.of(answer.report)
        if question.compare:
            put(Told({"event": "answer", "record": asdict(report)}))
            full = work.encode(job, progress=progress, unpruned=True)
            compared = self._streamed(job, put, full, names)
            report.compare = names.of(compared.report)
            reference = Reference.of_answer(full, question.text, compared, question.generation)
            report.agreement = reference.agreement(encoded).record()
        put(Done(report, None, kept, 0))

    def _streamed(self, job: Job, put: Put, encoded: EncodedInputs, names: "Names") -> Answer:
        """Answer the question, and send each piece of text."""

        def think(text: str) -> None:
            job.check()
            put(Told({"event": "thought", "text": text}))

        answer = begun(encoded, job.assignment.question, think)
        put(Told({"event": "question", "record": asdict(names.of(answer.report))}))
        try:
            for text in answer:
                job.check()
                put(Told({"event": "text", "text": text}))
        finally:
            answer.close()
        return answer


class Progress:
    """Sends the progress of an encoding, at most once per `PROGRESS_S` in each stage. These events don't prevent a retry."""

    def __init__(self, job: Job):
        self._job = job
        self._stage = ""
        self._sent_s = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        if stage == self._stage and stage != "input" and done < total and now < self._sent_s + PROGRESS_S:
            return
        self._stage, self._sent_s = stage, now
        self._job.put(Told({"event": "progress", "stage": stage, "done": done, "of": total}))


class Names:
    """Changes reports to what the client should see.

    Args:
        paths: The names shown to the client instead of the server's paths. The report about an encoding of an earlier request has
            the paths of that request, which differ in the name of its folder.
        folder: The folder of the requests' folders.
    """

    def __init__(self, paths: Mapping[str, str], folder: Path):
        self._names = {os.path.relpath(path, folder).partition(os.sep)[2]: name for path, name in paths.items()}
        ends = "|".join(map(re.escape, self._names))
        self._pattern = re.compile(rf"{re.escape(str(folder))}/{REQUEST}\w+/({ends})")

    def text(self, text: str) -> str:
        return self._pattern.sub(lambda found: self._names[found[1]], text)

    def of(self, report: Report) -> Report:
        """Return the report with the client's names, and without the times to start and to load the model."""
        for name in ("startup", "load", "load_tokenizer", "load_weights", "load_prepare"):
            setattr(report.time_ms, name, None)
        for facts in (report, *report.inputs):
            if facts.subtitles:
                facts.subtitles = facts.subtitles | {"source": self.text(facts.subtitles["source"])}
        return report


def meant(wanted: str | None, models: Mapping[str, VideoQA]) -> str | None:
    """Return the name of the model that a client means: the first one by default, or None if the server doesn't have it.

    A client may use the name of a model in the API, its ID, or the path of its folder.
    """
    if wanted is None:
        return next(iter(models))
    for name, qa in models.items():
        loaded = qa.loaded.description.options.model
        if wanted in (name, loaded, os.path.realpath(os.path.expanduser(loaded))):
            return name
    return None


def loading_options(name: str, qa: VideoQA) -> dict[str, Any]:
    """Return the options with which a model was loaded, if answers depend on them. The model has its name in the API."""
    options = qa.loaded.description.options
    known = [field.name for field in dataclass_fields(options) if field.metadata[OPTION].changes_answers]
    return {field: getattr(options, field) for field in known} | {"model": name}


def usual_options(usual: PipelineOptions) -> dict[str, Any]:
    """Return the options of questions that don't set them."""
    groups = (usual.pruning, usual.sampling, usual.generation)
    return {name: getattr(group, name) for group in groups for name in TAKEN if hasattr(group, name)}


# The request.


@dataclass(frozen=True)
class AskReply:
    """Identifies an answer in the log. Its events are the same for all answers (`app.Asked.lines`)."""

    identity: str = field(default_factory=lambda: f"ask-{secrets.token_hex(12)}")


def read_ask(
    body: Any, usual: PipelineOptions, models: Sequence[str]
) -> tuple[Question, tuple[ClientInput, ...], AskReply]:
    """Parse the body of a request to `ASK`. See `reply.Read`.

    Raises:
        ApiError: If a field is unknown or has the wrong type, or if the client has another version.
        UsageError: If an option has an invalid value, or one that the server doesn't accept.
    """
    fields = Fields(body)
    version = fields.need("evoprune", str)
    if version != evoprune.__version__:
        message = f"this server is evoprune {evoprune.__version__}, and the client is {version[:40]}"
        raise ApiError(409, message, code="other_version")
    model = fields.take("model", str, models[0])
    if model not in models:
        raise no_model(model, models)
    text = fields.take("question", str, "")
    earlier = fields.take("earlier", list, [])
    options = fields.take("options", dict, {})
    given = fields.need("inputs", list)
    if not 0 < len(given) <= MOST_SOURCES:
        raise refused(f"there are {len(given)} inputs, not 1 to {MOST_SOURCES}", "inputs")
    inputs = tuple(_input(Fields(each, f"inputs[{number}]"), number) for number, each in enumerate(given))
    turns = Turn.to_messages(Turn.from_messages(earlier))
    if len(text) + sum(len(each["content"]) for each in turns) > MOST_CHARACTERS:
        raise UsageError(f"the question has more than {MOST_CHARACTERS:,} characters", "shorten it")
    question = Question(
        model,
        text,
        tuple(turns),
        seed=None,
        stream=True,
        conversation=fields.take("conversation", bool, False),
        compare=fields.take("compare", bool, False),
        **_options(options, usual),
    )
    fields.end()
    return question, inputs, AskReply()


def _options(given: dict[str, Any], usual: PipelineOptions) -> dict[str, Any]:
    """Return the options of a question, which override the server's.

    Raises:
        UsageError: If a value is invalid, could refer to a file of the server, or exceeds a limit of the server.
    """
    for name in given:
        if name not in TAKEN:
            raise UsageError(f"the server does not take {shorten(name, 60)}", "leave it out")
    if given.get("speech", "none") not in SPEECH:
        raise UsageError("a server takes only the name of a speech model, not a folder", f"use {', '.join(SPEECH)}")
    if given.get("subtitles", "none") not in ("none", "auto"):
        raise UsageError("subtitles is not none or auto", "send the file with its video")
    if "method" in given and (name := file_setting(check_type("method", given["method"], str))):
        raise UsageError(
            f"a server takes only numbers, true and false as settings of a method, not {name}", "leave it out"
        )
    for name in SamplingOptions.LIMITS:
        limit = getattr(usual.sampling, name)
        if name in given and limit is not None and (given[name] is None or given[name] > limit):
            raise UsageError(f"{name} is {given[name]}, but the server allows at most {limit}", "give a smaller number")
    own = {
        kind: {field.name: given[field.name] for field in dataclass_fields(kind) if field.name in given}
        for kind in (GenerationOptions, SamplingOptions, PruneOptions)
    }
    return {
        "generation": replace(usual.generation, **own[GenerationOptions]),
        "sampling": usual.sampling.with_overrides(**own[SamplingOptions]),
        "pruning": replace(usual.pruning, **own[PruneOptions]),
    }


def _input(fields: Fields, number: int) -> ClientInput:
    name = fields.need("name", str)
    folder = fields.take("folder", str, "")
    if folder and not FILE_NAME.fullmatch(folder):
        fields.refuse("folder", "is not the name of a folder")
    files = _files(fields, "files")
    if not files or (len(files) > 1 and not folder):
        fields.refuse("files", "is not a file, or the files of a folder")
    subtitles = fields.take("subtitles", dict)
    beside = _files(fields, "beside")
    names = [folder or files[0].name, *(file.name for file in beside)]
    if len({*names}) < len(names) or len({file.name for file in files}) < len(files):
        fields.refuse("files", "has a name twice")
    made = ClientInput(
        name,
        number,
        files,
        folder,
        beside,
        subtitles and _file(Fields(subtitles, fields.name_of("subtitles"))),
    )
    fields.end()
    return made


def _files(fields: Fields, name: str) -> tuple[ClientFile, ...]:
    given = fields.take(name, list, [])
    return tuple(_file(Fields(each, f"{fields.name_of(name)}[{number}]")) for number, each in enumerate(given))


def _file(fields: Fields) -> ClientFile:
    name = fields.need("name", str)
    if not FILE_NAME.fullmatch(name) or len(name.encode()) > LONGEST_NAME:
        fields.refuse("name", "is not the name of a file")
    digest = fields.take("digest", str, "")
    if digest and not DIGEST.fullmatch(digest):
        fields.refuse("digest", "is not a digest")
    path = fields.take("path", str, "")
    shown = fields.take("shown", str, "")
    state = fields.take("bytes", int, 0), fields.take("mtime_ns", int, 0)
    fields.end()
    return ClientFile(name, path, state, digest, shown)
