"""Options for generating an answer. This module does not import torch."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from evoprune.errors import UsageError
from evoprune.model import GenerationSettings
from evoprune.untrusted import rules_of
from evoprune.util import brief, converted, is_text, option, shorten, shown

if TYPE_CHECKING:
    from evoprune.language.prompt import Tokenizer

Think = Literal["off", "on"]
THINK = get_args(Think)
ChoiceScore = Literal["sum", "mean"]
CHOICE_SCORES = get_args(ChoiceScore)
ROW_OPTIONS = "options"  # value of `choices` that means each batch row has its own choices
# Options that a model's generation_config.json may contain, too. Both have the same limits.
SAMPLING_HINTS = {
    "temperature": "0 is greedy, 1 samples from the model's own probabilities",
    "top_p": "give a probability above 0; 1 keeps every token",
    "top_k": "give 0 or more; 0 keeps every token",
    "repetition_penalty": "1 is off, 1.05 is a common value",
}
MOST_LOGPROBS = 20  # same limit as other inference servers


def listed_choices(typed: Sequence[str] | None) -> str | list[str] | None:
    """Split command-line choices at commas. Return None for no choices, or `ROW_OPTIONS` if that is the only choice."""
    if not typed:
        return None
    texts = [part.strip() for text in typed for part in text.split(",") if part.strip()]
    return ROW_OPTIONS if texts == [ROW_OPTIONS] else texts


@converted
@dataclass(frozen=True)
class GenerationOptions:
    """Options for generating an answer, such as its maximum length, sampling, thinking, and constraints on its format.

    Raises:
        UsageError: If a value is out of range, or two options cannot be combined.
    """

    PANEL: ClassVar[str] = "Generation"
    # Groups of options for front ends, which name the options that they accept.
    TOKENS: ClassVar[tuple[str, ...]] = ("max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
    FORMAT: ClassVar[tuple[str, ...]] = ("schema", "regex", "choices", "choice_score")
    ANSWER: ClassVar[tuple[str, ...]] = (*TOKENS, "system", "think", "stop", "logprobs", *FORMAT)

    max_new_tokens: int = option(256, "Maximum length of the answer, in tokens.", "-n", "--max-new-tokens")
    temperature: float = option(
        0.0,
        "Sampling temperature; 0 is greedy.",
        "-t",
        "--temperature",
    )
    top_p: float = option(
        1.0,
        "Nucleus sampling: the smallest set of tokens with this probability; 1: all.",
    )
    top_k: int = option(
        0,
        "Sample from the N most probable tokens; 0: from all.",
    )
    repetition_penalty: float | None = option(
        None,
        "Above 1, tokens of the prompt and the answer become less probable; 1: off; default: from the model's "
        "generation_config.json.",
        metavar="N",
    )
    system: str | None = option(None, "A system prompt.", "-s", "--system", metavar="TEXT")
    think: Think = option(
        "off",
        "Whether the model thinks before it answers, if it supports both. -n limits thoughts and answer together.",
    )
    stop: str | Sequence[str] | None = option(
        None,
        "End the answer before this text; repeatable. The text is not part of the answer, and thoughts may contain it.",
        in_python="One or several texts: the answer ends before the first one. Thoughts may contain them.",
        metavar="TEXT",
        typed=list[str],
        convert=lambda given: _checked_stops(given),
    )
    logprobs: int | None = option(
        None,
        "With --json, the log probability of each token of the answer, and of the N most probable tokens at its position; at "
        "most 20, 0: only of the answer's tokens.",
        in_python="Keep the log probability of each token of the answer, and of this many most probable tokens at its position; "
        "at most 20, 0: only of the answer's tokens.",
        metavar="N",
    )
    schema: Mapping[str, Any] | type[Any] | None = option(
        None,
        "The answer is JSON that follows this JSON Schema, or the one in this file; with --json, also in the field parsed. "
        "Needs evoprune[schema].",
        in_python="A JSON Schema as a dict, a dataclass or a pydantic model: the answer is JSON that follows it, and "
        "`Answer.parsed` is its value, an instance of the class. Needs evoprune[schema].",
        metavar="FILE|JSON",
        typed=str,
        parse=lambda typed: None if typed is None else _schemas().read_schema(typed),
        convert=lambda given: None if given is None else _schemas().schema_of(given),
    )
    regex: str | None = option(
        None,
        "The whole answer matches this regular expression. Needs evoprune[schema].",
        metavar="REGEX",
    )

    choices: str | Sequence[str] | None = option(
        None,
        "The answer is one of these texts, separated by commas or repeated; with --json, also the probability of each. In batch, "
        "the value options means each row's own options, which are then not part of the question.",
        in_python="Two or more texts: the answer is one of them, and `Answer.choices` has the probability of each.",
        metavar="LIST",
        typed=list[str],
        parse=listed_choices,
        convert=lambda given: _checked_choices(given),
    )
    choice_score: ChoiceScore = option(
        "sum",
        "Compare choices by the sum of the log probabilities of their tokens, or by the mean, which does not favor short choices.",
    )

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise UsageError(f"max_new_tokens is {self.max_new_tokens}, not 1 or more", "ask for at least one token")
        for name, hint in SAMPLING_HINTS.items():
            value = getattr(self, name)
            if value is not None:
                try:
                    rules_of(GenerationSettings)[name].check(value, name)
                except ValueError as problem:
                    raise UsageError(str(problem), hint) from None
        if not self.top_p:
            raise UsageError(f"top_p is {self.top_p}, not above 0", SAMPLING_HINTS["top_p"])
        if self.think not in THINK:
            raise UsageError(f"think is {self.think!r}, which is unknown", f"use {' or '.join(THINK)}")
        self._check_choices()
        if self.schema is not None and self.regex is not None:
            raise UsageError("schema and regex cannot be combined", "leave one out")
        self.grammar  # noqa: B018 (checked here)
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise UsageError(
                f"logprobs is {self.logprobs}, not from 0 to {MOST_LOGPROBS}",
                f"use 0 (only the chosen token) to {MOST_LOGPROBS}",
            )

    def _check_choices(self) -> None:
        if self.choice_score not in CHOICE_SCORES:
            raise UsageError(
                f"choice_score is {self.choice_score!r}, which is unknown", f"use {' or '.join(CHOICE_SCORES)}"
            )
        if self.choices is None:
            if self.choice_score != "sum":
                raise UsageError(
                    f"choice_score is {self.choice_score!r}, but there are no choices", "add them: --choices"
                )
            return
        others = {
            "schema": self.schema is not None,
            "regex": self.regex is not None,
            "stop": self.stop is not None,
            "logprobs": self.logprobs is not None,
            "temperature": self.temperature != 0,
            "think": self.thinking,
        }
        for name, given in others.items():
            if given:
                raise UsageError(
                    f"choices and {name} cannot be combined", "leave one out: choices are scored, not generated"
                )

    @property
    def thinking(self) -> bool:
        return self.think == "on"

    @property
    def grammar(self) -> str | None:
        """The answer grammar in llguidance format, or None without a schema or a regular expression.

        Raises:
            UsageError: If llguidance doesn't support the schema or regular expression.
        """
        if self.schema is None and self.regex is None:
            return None
        from evoprune.language.guidance import REGEX, SCHEMA, grammar_of

        if self.regex is not None:
            return grammar_of(REGEX, self.regex)
        return grammar_of(SCHEMA, self.schema)

    @property
    def choices_from_rows(self) -> bool:
        """Whether each batch row specifies its own choices."""
        return self.choices == ROW_OPTIONS

    def choice_ids(self, tokenizer: "Tokenizer") -> list[list[int]]:
        """Tokenize the choices. Return one list of token IDs per choice, or an empty list if there are no choices.

        The lists don't include an end token.

        Raises:
            UsageError: If the model always thinks before answering, a choice has more than `max_new_tokens` tokens, two choices
                have the same tokens, or each batch row has its own choices.
        """
        if self.choices is None:
            return []
        if self.choices_from_rows:
            raise UsageError("choices 'options' works only in batch, whose rows have options", "use two or more texts")
        if tokenizer.always_thinks:
            raise UsageError("this model thinks before every answer, so choices cannot be scored", "leave out choices")
        every: dict[tuple[int, ...], list[int]] = {}
        for text in self.choices:
            ids = tokenizer.encode(text)
            if len(ids) > self.max_new_tokens:
                message = f"the choice {shown(text)!r} has {len(ids):,} tokens, but an answer has at most {self.max_new_tokens:,}"
                raise UsageError(message, "allow more (-n, max_new_tokens), or use a shorter choice")
            if tuple(ids) in every:
                raise UsageError(f"the choice {shown(text)!r} has the same tokens as another choice", "leave one out")
            every[tuple(ids)] = ids
        return list(every.values())

    def parse(self, answer: str) -> tuple[Any, Any]:
        """Parse a complete answer that follows `schema`.

        Returns:
            A tuple of the JSON value and the value to return to the caller. The JSON value is None if Python cannot represent it.
            If the schema was created from a class, the caller receives an instance of that class; otherwise, the JSON value.

        Raises:
            UsageError: If the answer doesn't follow the schema, or the class rejects the value.
        """
        schemas = _schemas()
        value = schemas.checked_value(answer, self.schema)
        if value is not None and isinstance(self.schema, schemas.SchemaOfClass):
            return value, schemas.instance_of(self.schema.kind, answer)
        return value, value

    def record(self, seed: int) -> dict[str, Any]:
        """Return all options that affect which tokens are chosen, along with the random seed, in report format."""
        known = asdict(self) | {"seed": seed}
        known.pop("system")
        if self.choices is None:
            known.pop("choice_score")
        return known


def _schemas() -> ModuleType:
    """Return language/schema.py, which is imported only for options with a schema."""
    from evoprune.language import schema

    return schema


def _checked_stops(given: Any) -> list[str] | None:
    """Validate stop strings. Return the different ones as a list, or None if there are no stop strings.

    Raises:
        UsageError: If the value isn't a string or a list of strings, or a string is empty or not valid Unicode.
    """
    if given is None:
        return None
    texts = [given] if isinstance(given, str) else given
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise UsageError(f"stop is {brief(given)}, not a string, a list of strings or None", "pass strings")
    if not all(texts):
        raise UsageError("stop is an empty text", "use a text with at least one character")
    if not all(map(is_text, texts)):
        raise UsageError("stop is not valid text", "write it in UTF-8")
    return list(dict.fromkeys(texts)) or None


def _checked_choices(given: Any) -> str | list[str] | None:
    """Validate choices. Return them as a list, except that `ROW_OPTIONS` and None are returned unchanged.

    Raises:
        UsageError: If the value isn't a list of at least two different, non-empty strings of valid Unicode.
    """
    if given is None or given == ROW_OPTIONS:
        return given
    hint = "use two or more different texts"
    if isinstance(given, str) and "," in given:
        hint = f"did you mean choices={[text.strip() for text in given.split(',')]}?"
    if isinstance(given, Set):
        hint = "use a list, whose order is the order of the results"
    if isinstance(given, str) or not isinstance(given, Sequence) or not all(isinstance(text, str) for text in given):
        raise UsageError(f"choices is {brief(given)}, not a list of texts", hint)
    texts = list(given)
    if not all(map(is_text, texts)):
        raise UsageError("a choice is not valid text", "write it in UTF-8")
    if not all(text.strip() for text in texts):
        raise UsageError(f"choices is {brief(','.join(texts))}, with an empty text", hint)
    if len(texts) < 2:
        raise UsageError(f"choices is {brief(','.join(texts))}, which is {'only one text' if texts else 'empty'}", hint)
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise UsageError(f"choices is {brief(','.join(texts))}, with {shorten(twice[0], 60)!r} twice", hint)
    return texts
