"""Send requests to a server over OpenAI's protocol, and time the streamed answers. Imported by `experiments.speed.serving`."""

import asyncio
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

MODEL = "model"  # the name under which every server serves its model
NEW_TOKENS = 16
ANSWER_S = 900  # time limit for an answer, including the time in the queue


@dataclass(frozen=True)
class Answer:
    """Times in seconds from sending the request, and token counts reported by the server."""

    first_token_s: float
    whole_s: float
    prompt_tokens: int


@dataclass(frozen=True)
class Run:
    """The answers to a load's requests, and the seconds from the first request to the end of the last answer."""

    answers: tuple[Answer, ...]
    wall_s: float

    @property
    def requests_per_minute(self) -> float:
        return 60 * len(self.answers) / self.wall_s

    @property
    def tokens_per_second(self) -> float:
        return NEW_TOKENS * len(self.answers) / self.wall_s

    @property
    def first_token_s(self) -> float:
        return median(answer.first_token_s for answer in self.answers)


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the smallest value that is at least as large as `percent` percent of the values (nearest-rank method)."""
    return sorted(values)[max(math.ceil(len(values) * percent / 100), 1) - 1]


def message(kind: str, url: str, question: str) -> list[dict[str, Any]]:
    """Return the messages of a question about a file. `kind` is "video" or "image"."""
    part = {"type": f"{kind}_url", f"{kind}_url": {"url": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": question}]}]


def send(base: str, requests: Sequence[list[dict[str, Any]]], more: dict[str, Any], together: bool = False) -> Run:
    """Send requests one after another, or all at once, and wait for all answers.

    Args:
        base: The API's URL.
        requests: The messages of each request.
        more: Additional fields of every request that are not part of OpenAI's protocol.

    Raises:
        RuntimeError: If an answer does not have exactly `NEW_TOKENS` tokens, or none arrives.
        openai.OpenAIError: If a request fails.
    """
    return asyncio.run(_send(base, requests, more, together))


async def _send(base: str, requests: Sequence[list[dict[str, Any]]], more: dict[str, Any], together: bool) -> Run:
    from openai import AsyncOpenAI

    async with AsyncOpenAI(base_url=base, api_key="none", max_retries=0, timeout=ANSWER_S) as client:
        begun = time.perf_counter()
        if together:
            answers = await asyncio.gather(*(_ask(client, messages, more) for messages in requests))
        else:
            answers = [await _ask(client, messages, more) for messages in requests]
        return Run(tuple(answers), time.perf_counter() - begun)


async def _ask(client, messages: list[dict[str, Any]], more: dict[str, Any]) -> Answer:
    begun = time.perf_counter()
    first_token_s = usage = None
    stream = await client.chat.completions.create(
        model=MODEL, messages=messages, max_tokens=NEW_TOKENS, temperature=0,
        stream=True, stream_options={"include_usage": True}, extra_body=more,
    )  # fmt: skip
    async for chunk in stream:
        if (
            first_token_s is None and chunk.choices and not chunk.choices[0].delta.role
        ):  # the chunk with the role has no token
            first_token_s = time.perf_counter() - begun
        usage = chunk.usage or usage
    if first_token_s is None or usage is None or usage.completion_tokens != NEW_TOKENS:
        raise RuntimeError(f"an answer does not have {NEW_TOKENS} tokens: {usage}")
    return Answer(first_token_s, time.perf_counter() - begun, usage.prompt_tokens)
