"""The API format of /v1/responses: parses requests and writes answers as complete responses or stream events.

Responses aren't stored, so clients must send the whole conversation with each request, as with `store` set to false.
"""

import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from evoprune.session import PipelineOptions
from evoprune_serve.errors import ApiError
from evoprune_serve.fields import Fields, json_text
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

# Request fields copied unchanged to the response.
STATED = (
    "instructions",
    "max_output_tokens",
    "top_logprobs",
    "user",
    "safety_identifier",
    "prompt_cache_key",
    "reasoning",
)
LOGPROBS = "message.output_text.logprobs"  # the only supported value of `include`
# Message fields to ignore because they aren't part of the conversation.
OF_MESSAGES = ("type", "id", "status", "phase")
# Options of this format not supported by the server. A request may only set them to values without effect.
OWN_NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "background": lambda value: value is False,
    "store": lambda value: value is False,
    "truncation": lambda value: value == "auto",  # earlier turns that don't fit are omitted
}


@dataclass
class Item:
    """An output item of a response, containing either the model's reasoning or its answer text.

    `logprobs` contains the log probabilities of the tokens so far. In a text item, this includes the preceding thinking tokens.
    """

    thought: bool
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    random: str = field(default_factory=lambda: secrets.token_hex(16))

    @property
    def id(self) -> str:
        prefix = "rs" if self.thought else "msg"
        return f"{prefix}_{self.random}"

    @property
    def part(self) -> dict[str, Any]:
        """The item's content part, with the text so far."""
        if self.thought:
            return {"type": "reasoning_text", "text": self.text}
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": [*self.logprobs]}

    def record(self, status: str) -> dict[str, Any]:
        """Return the item as JSON data. While the status is "in_progress", the content is empty."""
        kind = {"type": "message", "role": "assistant"}
        if self.thought:
            kind = {"type": "reasoning", "summary": []}
        content = [] if status == "in_progress" else [self.part]
        return {"id": self.id, "status": status, "content": content} | kind


class ResponseReply:
    """An answer in /v1/responses format, with one item for the text and, if the model thinks, one item for the reasoning.

    Args:
        model: The name of the model.
        stated: Request fields to repeat in the response.
    """

    def __init__(self, model: str, stated: dict[str, Any]):
        self.identity = f"resp_{secrets.token_hex(16)}"
        self._head = {"id": self.identity, "object": "response", "created_at": created(), "model": model} | stated
        self._items: list[Item] = []
        self._events = 0

    def whole(self, done: Done, queue_s: float) -> dict[str, Any]:
        report = done.report
        if report.thoughts:
            self._items.append(Item(True, report.thoughts))
        self._items.append(Item(False, report.answer or "", _logprobs(report.logprobs)))
        return self._ended(done, queue_s)

    def begin(self) -> bytes:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def piece(self, piece: Piece) -> bytes:
        return self._add(piece.thought, piece.text, _logprobs(piece.logprobs))

    def end(self, done: Done, queue_s: float) -> bytes:
        events = b""
        last = _logprobs(done.logprobs)
        if last or not self._items or self._items[-1].thought:
            events += self._add(False, "", last)
        response = self._ended(done, queue_s)
        events += self._close(response["status"])
        return events + self._event(f"response.{response['status']}", response=response)

    def failed(self, problem: ApiError) -> bytes:
        code = "server_error" if problem.status >= 500 else "invalid_prompt"
        error = {"code": code, "message": problem.message}
        return self._event("response.failed", response=self._response("failed") | {"error": error})

    def _response(self, status: str) -> dict[str, Any]:
        """Return the response object with all output items so far."""
        output = [item.record("completed") for item in self._items]
        if output and status != "completed":
            output[-1]["status"] = "incomplete"
        return self._head | {
            "status": status,
            "error": None,
            "incomplete_details": None,
            "completed_at": None,
            "output": output,
            "usage": None,
        }

    def _ended(self, done: Done, queue_s: float) -> dict[str, Any]:
        if done.report.finish_reason == "length":
            response = self._response("incomplete") | {"incomplete_details": {"reason": "max_output_tokens"}}
        else:
            response = self._response("completed")
        return response | {"completed_at": created(), "usage": _usage(done, queue_s)}

    # Stream events.

    def _add(self, thought: bool, text: str, entries: list[dict[str, Any]]) -> bytes:
        """Append a piece of text and return the resulting events.

        A new item starts if the piece doesn't continue the current item.
        """
        events = b""
        if not self._items or self._items[-1].thought != thought:
            events += self._close("completed") + self._open(thought)
        item = self._items[-1]
        item.text += text
        item.logprobs += entries
        return events + self._of_part("delta", {"delta": text}, entries)

    def _open(self, thought: bool) -> bytes:
        """Start a new output item, and return the events that announce it."""
        before = self._items[-1].logprobs if self._items else []
        self._items.append(Item(thought, logprobs=[*before]))
        item = self._items[-1].record("in_progress")
        events = self._event("response.output_item.added", item=item, output_index=len(self._items) - 1)
        return events + self._event("response.content_part.added", part=self._items[-1].part, **self._place)

    def _close(self, status: str) -> bytes:
        """Return the events that complete the current item, or empty bytes if there is no item yet."""
        if not self._items:
            return b""
        item = self._items[-1]
        events = self._of_part("done", {"text": item.text}, item.logprobs)
        events += self._event("response.content_part.done", part=item.part, **self._place)
        index = len(self._items) - 1
        return events + self._event("response.output_item.done", item=item.record(status), output_index=index)

    @property
    def _place(self) -> dict[str, Any]:
        """Event fields that identify the content of the current item."""
        return {"item_id": self._items[-1].id, "output_index": len(self._items) - 1, "content_index": 0}

    def _of_part(self, what: str, fields: dict[str, Any], entries: list[dict[str, Any]]) -> bytes:
        """Return an event for the current item's content. For reasoning, the log probabilities `entries` are omitted."""
        item = self._items[-1]
        if not item.thought:
            fields = fields | {"logprobs": entries}
        return self._event(f"response.{item.part['type']}.{what}", **fields, **self._place)

    def _event(self, name: str, **fields: Any) -> bytes:
        event = {"type": name, "sequence_number": self._events, **fields}
        self._events += 1
        return stream_event(event, name)


def _logprobs(entries: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    return logprobs(entries or ())


def _usage(done: Done, queue_s: float) -> dict[str, Any]:
    prompt = done.report.tokens.prompt or 0
    new = done.report.tokens.new or 0
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": new,
        "output_tokens_details": {"reasoning_tokens": done.thought_tokens},
        "total_tokens": prompt + new,
        "evoprune": pruned(done, queue_s),
    }


def read_response(
    body: Any, usual: PipelineOptions, models: Sequence[str]
) -> tuple[Question, tuple[Source, ...], ResponseReply]:
    """Parse the body of a /v1/responses request. See `reply.Read`."""
    fields = read_options(body, "input")
    if fields.has("previous_response_id"):
        fields.refuse("previous_response_id", "is not supported: no responses are kept; send all messages in input")
    messages = _messages(fields.need("input", (str, list)))
    names = NAMES | {"max_new_tokens": "max_output_tokens", "schema": "text.format", "system": "instructions"}
    question, sources = read_question(fields, usual, models, messages, "input", _generation(fields), names)
    stream_options(fields, question.stream).end()
    fields.end(NEUTRAL | OWN_NEUTRAL)
    text = {name: value for name, value in (body.get("text") or {}).items() if value is not None}
    stated = {name: body.get(name) for name in STATED}
    stated |= {
        "metadata": body.get("metadata") or {},
        "text": {"format": {"type": "text"}} | text,
        "temperature": question.generation.temperature,
        "top_p": question.generation.top_p,
        "previous_response_id": None,
        "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
        "tool_choice": body.get("tool_choice") or "auto",
        "service_tier": "default",
        "tools": [],
        "truncation": "auto",
        "store": False,
        "background": False,
    }
    return question, sources, ResponseReply(question.model, stated)


def _messages(given: str | list) -> dict[str, Any]:
    """Return the messages from the `input` field, keyed by their location in the body.

    Reasoning from earlier answers is dropped.
    """
    if isinstance(given, str):
        return {"input": {"role": "user", "content": given}}
    messages = {}
    for number, item in enumerate(given):
        place = f"input[{number}]"
        fields = Fields(item, place)
        kind = fields.take("type", str, "message")
        if kind == "message":
            messages[place] = {name: value for name, value in item.items() if name not in OF_MESSAGES}
        elif kind != "reasoning":
            fields.refuse("type", f"is {json_text(kind)}; known: message, reasoning")
    return messages


def _generation(fields: Fields) -> dict[str, Any]:
    """Return the `GenerationOptions` from request fields specific to /v1/responses."""
    given: dict[str, Any] = {}
    if fields.has("instructions"):
        given["system"] = fields.take("instructions", str)
    if fields.has("reasoning"):
        reasoning = Fields(fields.take("reasoning", dict), "reasoning")
        given |= read_effort(reasoning, "effort")
        reasoning.end()
    if fields.has("max_output_tokens"):
        given["max_new_tokens"] = fields.take("max_output_tokens", int)
    top = fields.take("top_logprobs", int)
    included = fields.take("include", list, [])
    if any(each != LOGPROBS for each in included):
        fields.refuse("include", f"has other names than {LOGPROBS}")
    if included:
        given["logprobs"] = top or 0
    elif top:
        fields.refuse("top_logprobs", f"needs {LOGPROBS} in include")
    if fields.has("text"):
        text = Fields(fields.take("text", dict), "text")
        if text.has("format"):
            given["schema"] = read_schema(Fields(text.take("format", dict), "text.format"))
        text.end({"verbosity": lambda value: value == "medium"})
    return given
