"""Represent a conversation as turns, and convert turns to and from messages with roles. This module does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evoprune.errors import UsageError
from evoprune.util import brief

USER = "user"  # the roles of messages
ASSISTANT = "assistant"


class Placed(str):
    """A question with inputs between pieces of text, such as "Image 1:", an input, "Image 2:", an input, and "Which is older?".

    As a `str`, the question consists of its pieces of text, joined by line breaks.

    Attributes:
        parts: The pieces of text in order, with None in place of each input.
    """

    parts: tuple[str | None, ...]

    def __new__(cls, parts: Sequence[str | None]) -> "Placed":
        placed = super().__new__(cls, "\n".join(part for part in parts if part is not None))
        placed.parts = tuple(parts)
        return placed

    def __getnewargs__(self) -> tuple[tuple[str | None, ...]]:
        return (self.parts,)


@dataclass(frozen=True)
class Turn:
    """A question in a conversation and the model's answer, without its reasoning text."""

    question: str
    answer: str

    @staticmethod
    def to_messages(turns: Sequence["Turn"]) -> list[dict[str, str]]:
        """Convert turns to messages in the format accepted by `from_messages`."""
        messages = []
        for turn in turns:
            messages.append({"role": USER, "content": turn.question})
            messages.append({"role": ASSISTANT, "content": turn.answer})
        return messages

    @staticmethod
    def from_messages(messages: Any) -> list["Turn"]:
        """Convert alternating user and assistant messages to turns.

        Args:
            messages: A list of dictionaries with the keys `role` and `content`. The roles alternate between "user" and "assistant",
                and the contents are strings.

        Raises:
            UsageError: If the messages have an invalid format, a question is empty, or the last question has no answer.
        """
        hint = '[{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A man."}]'
        if not isinstance(messages, list | tuple):
            raise UsageError(f"messages are {brief(messages)}, not a list", hint)
        texts = []
        for number, message in enumerate(messages):
            role = (USER, ASSISTANT)[number % 2]
            if not isinstance(message, Mapping) or {*message} != {"role", "content"}:
                raise UsageError(f"message {number + 1} is {brief(message)}, not a dict with role and content", hint)
            if message["role"] == "system":
                raise UsageError(
                    f"message {number + 1} is a system prompt", "pass it separately: system, or -s on the command line"
                )
            if message["role"] != role:
                raise UsageError(f"message {number + 1} has role {brief(message['role'])}, not {role!r}", hint)
            text = message["content"]
            if not isinstance(text, str) or (role == USER and not text.strip()):
                raise UsageError(f"message {number + 1} has {brief(text)} as its content, not a string", hint)
            texts.append(text)
        if len(texts) % 2:
            raise UsageError(f"message {len(texts)} is a question without an answer", hint)
        return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
