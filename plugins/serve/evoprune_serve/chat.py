"""The API format of /v1/chat/completions: parses requests and writes answers as complete responses or stream chunks."""

import secrets
from collections.abc import Callable, Sequence
from typing import Any

from evoprune.session import PipelineOptions
from evoprune_serve.errors import ApiError
from evoprune_serve.fields import Fields
from evoprune_serve.question import (
    NAMES,
    NEUTRAL,
    Question,
    read_effort,
    read_options,
    read_question,
    read_schema,
    stream_options,
)
from evoprune_serve.reply import created, logprobs, pruned, stream_event
from evoprune_serve.sources import Source
from evoprune_serve.work import Done, Piece

END = b"data: [DONE]\n\n"
# Options of this format not supported by the server. A request may only set them to values without effect.
OWN_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": lambda value: value == 1,
    "frequency_penalty": lambda value: value == 0,
    "presence_penalty": lambda value: value == 0,
    "logit_bias": lambda value: value == {},
    "functions": lambda value: value == [],
    "function_call": lambda value: value in ("none", "auto"),
    "modalities": lambda value: value == ["text"],
    "verbosity": lambda value: value == "medium",
    "store": lambda value: value is False,
}


class ChatReply:
    """An answer in chat completions format.

    Args:
        model: The model name.
        usage: Whether to send the token usage at the end of a stream.
    """

    def __init__(self, model: str, usage: bool):
        self.identity = f"chatcmpl-{secrets.token_hex(12)}"
        self._model = model
        self._usage = usage
        self._created = created()

    def whole(self, done: Done, queue_s: float) -> dict[str, Any]:
        report = done.report
        message = {"role": "assistant", "content": report.answer or "", "refusal": None}
        if report.thoughts:
            message["reasoning_content"] = report.thoughts
        choice = {
            "index": 0,
            "message": message,
            "logprobs": _logprobs(report.logprobs),
            "finish_reason": report.finish_reason,
        }
        return self._object("chat.completion") | {"choices": [choice], "usage": _usage(done, queue_s)}

    def begin(self) -> bytes:
        return self._chunk({"role": "assistant", "content": ""})

    def piece(self, piece: Piece) -> bytes:
        field = "reasoning_content" if piece.thought else "content"
        return self._chunk({field: piece.text}, piece.logprobs)

    def end(self, done: Done, queue_s: float) -> bytes:
        last = self._chunk({}, done.logprobs or None, done.report.finish_reason)
        if self._usage:
            last += stream_event(
                self._object("chat.completion.chunk") | {"choices": [], "usage": _usage(done, queue_s)}
            )
        return last + END

    def failed(self, problem: ApiError) -> bytes:
        return stream_event(problem.body)

    def _chunk(
        self, delta: dict[str, str], entries: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> bytes:
        """Build a stream chunk. `entries` are the log probabilities of its tokens, or None if not requested."""
        choice = {"index": 0, "delta": delta, "logprobs": _logprobs(entries), "finish_reason": finish}
        return stream_event(self._object("chat.completion.chunk") | {"choices": [choice]})

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }


def _logprobs(entries: list[dict[str, Any]] | None) -> dict[str, Any] | None:
    return None if entries is None else {"content": logprobs(entries), "refusal": None}


def _usage(done: Done, queue_s: float) -> dict[str, Any]:
    prompt = done.report.tokens.prompt or 0
    new = done.report.tokens.new or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "completion_tokens_details": {"reasoning_tokens": done.thought_tokens},
        "evoprune": pruned(done, queue_s),
    }


def read_chat(
    body: Any, usual: PipelineOptions, models: Sequence[str]
) -> tuple[Question, tuple[Source, ...], ChatReply]:
    """Parse the body of a /v1/chat/completions request. See `reply.Read`."""
    fields = read_options(body, "messages")
    messages = {f"messages[{number}]": each for number, each in enumerate(fields.need("messages", list))}
    names = NAMES | {"max_new_tokens": "max_tokens", "schema": "response_format"}
    if fields.has("max_completion_tokens"):
        names["max_new_tokens"] = "max_completion_tokens"
    question, sources = read_question(fields, usual, models, messages, "messages", _generation(fields), names)
    streaming = stream_options(fields, question.stream)
    usage = streaming.take("include_usage", bool, False)
    streaming.end()
    fields.end(NEUTRAL | OWN_NEUTRAL)
    return question, sources, ChatReply(question.model, usage)


def _generation(fields: Fields) -> dict[str, Any]:
    """Return the `GenerationOptions` from request fields specific to chat completions."""
    given: dict[str, Any] = read_effort(fields, "reasoning_effort")
    tokens = [name for name in ("max_tokens", "max_completion_tokens") if fields.has(name)]
    if len(tokens) == 2:
        fields.refuse("max_tokens", "and max_completion_tokens cannot be combined")
    for name in tokens:
        given["max_new_tokens"] = fields.take(name, int)
    top = fields.take("top_logprobs", int)
    if fields.take("logprobs", bool, False):
        given["logprobs"] = top or 0
    elif top:
        fields.refuse("top_logprobs", "needs logprobs")
    if fields.has("response_format"):
        form = Fields(fields.take("response_format", dict), "response_format")
        given["schema"] = read_schema(form, inner="json_schema")
    return given
