"""What was said in a conversation: turns, and the messages that programs write them as. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evoprune.errors import UsageError
from evoprune.util import brief

USER = "user"  # who speaks in a conversation
ASSISTANT = "assistant"


class Placed(str):
    """A question whose inputs stand between its texts, such as "Image 1:", an input, "Image 2:", an input, "Which is older?".

    As a text it is its texts in lines. `parts`: the texts, and None for each input, in their order.
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
    """A question of a conversation and the model's answer to it, without its thoughts."""

    question: str
    answer: str


def messages_of(turns: Sequence[Turn]) -> list[dict[str, str]]:
    """Return the messages of turns, as `turns_of` takes them."""
    messages = []
    for turn in turns:
        messages.append({"role": USER, "content": turn.question})
        messages.append({"role": ASSISTANT, "content": turn.answer})
    return messages


def turns_of(messages: Any) -> list[Turn]:
    """Return the turns of messages: dicts with `role`, "user" and "assistant" in turn, and `content`, a text.

    Raises UsageError: they are something else, or a text is empty.
    """
    hint = '[{"role": "user", "content": "Who is there?"}, {"role": "assistant", "content": "A man."}]'
    if not isinstance(messages, list | tuple):
        raise UsageError(f"messages are {brief(messages)}, not a list", hint)
    texts = []
    for number, message in enumerate(messages):
        role = (USER, ASSISTANT)[number % 2]
        if not isinstance(message, Mapping) or {*message} != {"role", "content"}:
            raise UsageError(f"message {number + 1} is {brief(message)}, not a role and its content", hint)
        if message["role"] == "system":
            raise UsageError(
                f"message {number + 1} is a system prompt", "give it apart: system, at the command line -s"
            )
        if message["role"] != role:
            raise UsageError(f"message {number + 1} has role {brief(message['role'])}, not {role!r}", hint)
        text = message["content"]
        if not isinstance(text, str) or (role == USER and not text.strip()):
            raise UsageError(f"message {number + 1} has {brief(text)} as its content, not a text", hint)
        texts.append(text)
    if len(texts) % 2:
        raise UsageError(f"message {len(texts)} is a question without an answer", hint)
    return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]
