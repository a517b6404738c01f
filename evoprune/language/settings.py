"""How an answer is generated. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from evoprune.errors import UsageError
from evoprune.util import brief, check_types, option

Think = Literal["off", "on"]
THINK = get_args(Think)
USER = "user"  # who speaks in a conversation
ASSISTANT = "assistant"


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
        if message["role"] != role:
            raise UsageError(f"message {number + 1} has role {brief(message['role'])}, not {role!r}", hint)
        text = message["content"]
        if not isinstance(text, str) or (role == USER and not text.strip()):
            raise UsageError(f"message {number + 1} has {brief(text)} as its content, not a text", hint)
        texts.append(text)
    if len(texts) % 2:
        raise UsageError("the last message is a question", "ask() asks it: messages are what was answered")
    return [Turn(*pair) for pair in zip(texts[::2], texts[1::2], strict=True)]


@dataclass(frozen=True)
class GenerationOptions:
    """How an answer is generated. Raises UsageError: a value out of range."""

    PANEL: ClassVar[str] = "Generation"

    max_new_tokens: int = option(256, "Longest answer, in tokens.", "-n", "--max-new-tokens")
    temperature: float = option(
        0.0,
        "0 is greedy.",
        "-t",
        "--temperature",
    )
    top_p: float = option(
        1.0,
        "Nucleus sampling.",
    )
    top_k: int = option(
        0,
        "Draw among the N most probable tokens; 0: all.",
    )
    repetition_penalty: float | None = option(
        None,
        "Above 1, tokens of prompt and answer are less probable; 1: off; default: that of the model's generation_config.json.",
        metavar="N",
    )
    system: str | None = option(None, "A system prompt.", "-s", "--system", metavar="TEXT")
    think: Think = option(
        "off",
        "Whether a model that can do both thinks before it answers. -n counts thoughts and answer together.",
    )

    def __post_init__(self):
        check_types(self)
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}", "ask for at least one token")
        if not 0 <= self.temperature < float("inf"):
            raise UsageError(f"temperature is {self.temperature}", "0 is greedy, 1 samples as the model was trained")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p is {self.top_p}", "top_p is a probability above 0, and 1 keeps every token")
        if self.top_k < 0:
            raise UsageError(f"top_k is {self.top_k}", "0 keeps every token")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty < float("inf"):
            raise UsageError(f"repetition_penalty is {self.repetition_penalty}", "1 is off, 1.05 is a usual value")
        if self.think not in THINK:
            raise UsageError(f"think is {self.think!r}", f"use {' or '.join(THINK)}")

    @property
    def thinking(self) -> bool:
        return self.think == "on"

    def record(self, seed: int) -> dict[str, Any]:
        """As reports hold it: how tokens are chosen, with the seed of the draws."""
        return {name: value for name, value in asdict(self).items() if name != "system"} | {"seed": seed}
