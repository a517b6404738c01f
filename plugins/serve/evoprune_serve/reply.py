"""What answers have in all of OpenAI's forms."""

import json
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from evoprune.session import PipelineOptions
from evoprune_serve.errors import ApiError
from evoprune_serve.question import Question
from evoprune_serve.sources import Source
from evoprune_serve.work import Done, Piece

TIMES = ("plan", "read", "preprocess", "overlap", "compile", "encode", "encode_prune", "prefill", "generate", "total")


class Reply(Protocol):
    """The answer to one request in one form. `identity`: its id.

    A stream is the bytes of `begin`, of each `piece`, and of `end` or `failed`. `queue_s`: how long the request waited.
    """

    identity: str

    def whole(self, done: Done, queue_s: float) -> dict[str, Any]: ...
    def begin(self) -> bytes: ...
    def piece(self, piece: Piece) -> bytes: ...
    def end(self, done: Done, queue_s: float) -> bytes: ...
    def failed(self, problem: ApiError) -> bytes: ...


# Reads a body: the question, the videos and pictures that it is about, and its answer to be; of the body, the usual options and the
# names of the models. Raises ApiError: anything in it that is unknown, of another type, or out of range.
Read = Callable[[Any, PipelineOptions, Sequence[str]], tuple[Question, tuple[Source, ...], Reply]]


def created() -> int:
    """Return the time of an answer that begins now, as its object has it."""
    return int(time.time())


def stream_event(data: dict[str, Any], name: str | None = None) -> bytes:
    """Return an event of a stream, perhaps with a name."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def pruned(done: Done, queue_s: float) -> dict[str, Any]:
    """Return what pruning did for an answer, and the times of its stages in ms: the `evoprune` of its usage."""
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
    """Return log probabilities of a report in OpenAI's form, each token with the most likely tokens in its place."""

    def entry(each: dict[str, Any]) -> dict[str, Any]:
        return {name: each[name] for name in ("token", "logprob", "bytes")}

    return [entry(each) | {"top_logprobs": [entry(top) for top in each["top_logprobs"]]} for each in entries]
