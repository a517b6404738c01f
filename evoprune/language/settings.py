"""How an answer is generated. Imports no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, get_args

from evoprune.errors import UsageError
from evoprune.language.schema import read_schema, schema_of
from evoprune.util import brief, check_types, option

Think = Literal["off", "on"]
THINK = get_args(Think)
MOST_LOGPROBS = 20  # as of other programs


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
    stop: str | Sequence[str] | None = option(
        None,
        "Ends the answer where this text would begin; repeatable. It is no part of the answer, and thoughts may have it.",
        in_python="One text or several: the answer ends where one of them would begin. Thoughts may have it.",
        metavar="TEXT",
        typed=list[str],
    )
    logprobs: int | None = option(
        None,
        "With --json, the log probability of each token of the answer, and those of the N most probable ones in its place; at most "
        "20, 0: of the answer's alone.",
        in_python="Keep the log probability of each token of the answer, and those of so many of the most probable ones in its "
        "place; at most 20, 0: of the answer's alone.",
        metavar="N",
    )
    schema: Mapping[str, Any] | type[Any] | None = option(
        None,
        "The answer is JSON that follows the JSON Schema in this file; with --json also in the field parsed. "
        "Needs evoprune[schema].",
        in_python="A JSON Schema as a dict, a dataclass, or a model of pydantic: the answer is JSON that follows it, and "
        "`Answer.parsed` what it holds. Needs evoprune[schema].",
        metavar="FILE",
        typed=str,
        parse=read_schema,
    )
    regex: str | None = option(
        None,
        "The answer matches this regular expression as a whole. Needs evoprune[schema].",
        metavar="REGEX",
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
        object.__setattr__(self, "stop", _stop_strings(self.stop))
        if self.schema is not None and self.regex is not None:
            raise UsageError("schema and regex exclude each other", "give one of the two")
        if self.schema is not None:
            object.__setattr__(self, "schema", schema_of(self.schema))
        self.grammar  # noqa: B018 (checked here)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(f"logprobs is {self.logprobs}", f"0 is the token chosen alone, {MOST_LOGPROBS} the most")

    @property
    def thinking(self) -> bool:
        return self.think == "on"

    @property
    def grammar(self) -> str | None:
        """What the answer must follow, as llguidance takes it; None for nothing. Raises UsageError: it cannot be followed."""
        if self.schema is None and self.regex is None:
            return None
        from evoprune.language.guidance import REGEX, SCHEMA, grammar_of

        if self.regex is not None:
            return grammar_of(REGEX, self.regex)
        return grammar_of(SCHEMA, self.schema)

    def record(self, seed: int) -> dict[str, Any]:
        """As reports hold it: how tokens are chosen, with the seed of the draws."""
        return {name: value for name, value in asdict(self).items() if name != "system"} | {"seed": seed}


def _stop_strings(given: Any) -> list[str] | None:
    """Return a list of what may be one text; None for no text. Raises UsageError: something else, or an empty text."""
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop is {brief(given)}, not a text, a list of texts or None", "give texts")
    if not all(texts):
        raise UsageError("stop is an empty text", "an answer cannot end at nothing: give at least one character")
    return list(texts) or None
