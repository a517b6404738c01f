"""Asks a running `evoprune serve` (`--via`). Does not import torch.

`RemoteInputs`, `RemoteAnswer`, and `RemoteChat` offer what `ask` needs of `EncodedInputs`, `Answer`, and `Chat`. Their events and
records come from the server (docs/server.md).
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO

import evoprune
from evoprune.errors import VideoError
from evoprune.report import Report
from evoprune.session import PipelineOptions
from evoprune.util import is_text, shown, size
from evoprune.video import Folder, SamplingOptions, read_subtitles
from evoprune_cli.options import PipelineArguments
from evoprune_cli.terminal import encoding
from evoprune_cli.via import INFO, MOST_FACTS, SendFirst, Server, Unusable, parsed

if TYPE_CHECKING:
    from evoprune.video import Video

MOST_TRIES = 3  # number of times to send the same file, which a server with little room may delete again


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
        """Remove the latest question and its answer, and return the question, or None if there isn't one."""
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


def same(report: Report) -> Report:
    return report
