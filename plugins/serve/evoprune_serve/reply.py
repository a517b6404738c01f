"""Answers in OpenAI's form: whole, and in chunks of a stream."""

import json
import time
from collections.abc import Iterable
from typing import Any

from evoprune.report import Report

TIMES = ("plan", "read", "preprocess", "overlap", "compile", "encode", "encode_prune", "prefill", "generate", "total")
END = b"data: [DONE]\n\n"
UNKNOWN = "\ufffd"  # stands in the text of a token that ends inside a character


def event(data: dict[str, Any]) -> bytes:
    """Return an event of a stream."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n".encode()


def usage(report: Report, queue_s: float, kept: bool) -> dict[str, Any]:
    """Return the counts of an answer; below `evoprune` what pruning did, and the times of the stages in ms.

    `kept`: whether the inputs were encoded for an earlier question.
    """
    tokens = report.tokens
    pruning = report.pruning
    times = report.time_ms
    prompt = tokens.prompt or 0
    new = tokens.new or 0
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "evoprune": {
            "visual_tokens_in": pruning.visual_tokens_in,
            "visual_tokens_kept": pruning.visual_tokens_kept,
            "budget": pruning.budget,
            "method": pruning.method,
            "frames": [each.sampling.frames for each in report.inputs],
            "encoding_kept": kept,
            "time_ms": {"queue": queue_s * 1000}
            | {name: getattr(times, name) for name in TIMES}
            | {"first_token": times.ttft_wall},
            "warnings": report.warnings,
        },
    }


def logprobs(entries: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Return log probabilities of a report in OpenAI's form."""
    return {"content": [_entry(each) | {"top_logprobs": _top(each)} for each in entries], "refusal": None}


def _top(entry: dict[str, Any]) -> list[dict[str, Any]]:
    return [_entry(each) for each in entry["top_logprobs"]]


def _entry(entry: dict[str, Any]) -> dict[str, Any]:
    text = entry["token"]
    data = None if UNKNOWN in text else list(text.encode())
    return {"token": text, "logprob": entry["logprob"], "bytes": data}


class Reply:
    """The answer to one request. `identity`: its id."""

    def __init__(self, identity: str, model: str):
        self.identity = identity
        self._model = model
        self._created = int(time.time())

    def whole(self, report: Report, counts: dict[str, Any]) -> dict[str, Any]:
        message = {"role": "assistant", "content": report.answer or "", "refusal": None}
        if report.thoughts:
            message["reasoning_content"] = report.thoughts
        chance = None if report.logprobs is None else logprobs(report.logprobs)
        choice = {"index": 0, "message": message, "logprobs": chance, "finish_reason": report.finish_reason}
        return self._object("chat.completion") | {"choices": [choice], "usage": counts}

    def chunk(
        self, delta: dict[str, str], entries: list[dict[str, Any]] | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        """Return a piece of the answer. `entries`: log probabilities of its tokens; None where they are not wanted."""
        chance = None if entries is None else logprobs(entries)
        choice = {"index": 0, "delta": delta, "logprobs": chance, "finish_reason": finish}
        return self._object("chat.completion.chunk") | {"choices": [choice]}

    def counts(self, counts: dict[str, Any]) -> dict[str, Any]:
        """Return the last chunk of a stream that tells its usage."""
        return self._object("chat.completion.chunk") | {"choices": [], "usage": counts}

    def _object(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.identity,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": None,
        }
