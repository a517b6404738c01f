"""Shared definitions for OpenAI's response formats."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from evoprune.session import PipelineOptions
from evoprune_serve.errors import ApiError
from evoprune_serve.question import Question
from evoprune_serve.sources import Source
from evoprune_serve.work import Done, Piece

TIMES = (
    "plan",
    "speech",
    "read",
    "preprocess",
    "overlap",
    "compile",
    "encode",
    "encode_prune",
    "prefill",
    "generate",
    "total",
)


class Reply(Protocol):
    """The answer to a request in one of the API formats.

    A complete answer is the JSON data from `whole`. A streamed answer starts with the bytes from `begin`, continues with the bytes
    from `piece` for each piece of text, and ends with the bytes from `end` or `failed`. `identity` is the answer ID. `queue_s` is
    the request's time in the queue, in seconds.
    """

    identity: str

    def whole(self, done: Done, queue_s: float) -> dict[str, Any]: ...
    def begin(self) -> bytes: ...
    def piece(self, piece: Piece) -> bytes: ...
    def end(self, done: Done, queue_s: float) -> bytes: ...
    def failed(self, problem: ApiError) -> bytes: ...


# A function that parses a request body, given the default options and the model names. It returns the question, the videos and
# images it refers to, and a `Reply` for the answer. It raises ApiError if a value is unknown, has the wrong type, or is out of
# range.
Read = Callable[[Any, PipelineOptions, Sequence[str]], tuple[Question, tuple[Source, ...], Reply]]


def created() -> int:
    """Return an answer's creation time (the current Unix time in whole seconds)."""
    return int(time.time())


def stream_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Encode JSON data as a server-sent event, optionally with an event name."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def pruned(done: Done, queue_s: float) -> dict[str, Any]:
    """Return the `evoprune` object for an answer's `usage` field, with token counts, times in milliseconds, and warnings."""
    report = done.report
    pruning = report.pruning
    times = report.time_ms
    return {
        "visual_tokens_in": pruning.visual_tokens_in,
        "visual_tokens_kept": pruning.visual_tokens_kept,
        "budget": pruning.budget,
        "method": pruning.method,
        "frames": [each.sampling.frames for each in report.inputs],
        "encoding_kept": done.kept,
        "time_ms": {"queue": queue_s * 1000}
        | {name: getattr(times, name) for name in TIMES}
        | {"first_token": times.ttft_wall},
        "warnings": report.warnings,
    }


def logprobs(entries: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Convert log probabilities from a report to OpenAI's format, with the most likely alternatives for each token."""

    def entry(each: dict[str, Any]) -> dict[str, Any]:
        return {name: each[name] for name in ("token", "logprob", "bytes")}

    return [entry(each) | {"top_logprobs": [entry(top) for top in each["top_logprobs"]]} for each in entries]
