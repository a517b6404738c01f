"""Answers that follow a JSON Schema or a regular expression: llguidance says which tokens may come next. Imports no torch.

Only this file imports llguidance, the extra `schema`. A grammar is checked before a model is loaded, with the bytes as tokens.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError, first_line

if TYPE_CHECKING:
    import torch

    from evoprune.language.prompt import Tokenizer

SCHEMA, REGEX = "schema", "regex"
# Objects in a schema whose fields are names, not keywords.
NAMES = ("properties", "patternProperties", "$defs", "definitions")
FORM = {"whitespace_pattern": " ?"}  # of JSON: a model could write white space for ever
NOTHING_FOLLOWS = ("", "NoExtension", "NoExtensionBias")  # llguidance's words where no token may come
MOST_PLACES = 2000  # in a schema that is searched for what is wrong
LONGEST = 10_000  # characters of a regular expression


def _library() -> ModuleType:
    """Return llguidance. Raises UsageError: it is not installed."""
    try:
        import llguidance
    except ImportError as problem:
        said = "a schema or a regular expression needs llguidance, which is not installed"
        raise UsageError(said, "pip install 'evoprune[schema]'") from problem
    return llguidance


@cache
def _bytes() -> Any:
    return _library().LLTokenizer("byte")


def grammar_of(kind: str, given: dict[str, Any] | str) -> str:
    """Return the grammar of a JSON Schema (`kind` SCHEMA) or a regular expression (REGEX), as llguidance takes it.

    Raises UsageError: it is not supported, with the place in the schema; or llguidance is not installed.
    """
    if kind == REGEX and len(given) > LONGEST:
        raise UsageError(f"the regular expression has more than {LONGEST:,} characters", "give a shorter one")
    return _checked(kind, given if kind == REGEX else json.dumps(given))


@lru_cache(16)
def _checked(kind: str, text: str) -> str:
    """Return the grammar of a text, as `grammar_of`."""
    grammar, wrong = _tried(kind, text)
    if not wrong:
        return grammar
    if kind == REGEX:
        raise UsageError(f"the regular expression cannot be followed: {_line(wrong)}", "try it without what is named")
    path = _place(json.loads(text), wrong)
    where = f" at {path}" if path else ""
    raise UsageError(f"the schema cannot be followed{where}: {_line(wrong)}", "leave out or change what is named")


def _line(wrong: str) -> str:
    """Return what is wrong in one line; of an error in a regular expression, behind the lines that show its place."""
    return (wrong.partition("error: ")[2] or wrong).strip().splitlines()[0]


def _tried(kind: str, text: str) -> tuple[str, str]:
    """Return the grammar of a text, and what is wrong with it, or nothing."""
    matcher = _library().LLMatcher
    try:
        if kind == REGEX:
            grammar = matcher.grammar_from_regex(text)
        else:
            grammar = matcher.grammar_from_json_schema(text, FORM)
    except ValueError as problem:  # too deep
        return "", first_line(problem)
    made = matcher(_bytes(), grammar, log_level=0)
    possible = any(made.compute_bitmask())
    wrong = made.get_error()
    if not possible and wrong in NOTHING_FOLLOWS:
        wrong = "it allows no answer"
    return grammar, wrong


def _place(schema: Any, wrong: str) -> str | None:
    """Return the path, as a JSON Pointer, of the smallest part of a schema that is refused by the same words; None: not found."""
    parts = []
    for path, part, is_schema in _parts(schema, "", True):
        if len(parts) == MOST_PLACES:
            return None
        if is_schema and path:
            parts.append((path, part))
    for path, part in sorted(parts, key=lambda found: -found[0].count("/")):
        if _tried(SCHEMA, json.dumps(part))[1] == wrong:
            return path
    return None


def _parts(value: Any, path: str, is_schema: bool) -> Iterator[tuple[str, dict, bool]]:
    """Yield every object in a value, with its path, and whether it may be a schema: an object of `NAMES` is none."""
    if isinstance(value, dict):
        yield path, value, is_schema
        for name, inner in value.items():
            step = name.replace("~", "~0").replace("/", "~1")
            yield from _parts(inner, f"{path}/{step}", not (is_schema and name in NAMES))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from _parts(inner, f"{path}/{number}", is_schema)


class Vocabulary:
    """The tokens of a model, as llguidance needs them: to be made once, which takes a second with a large vocabulary."""

    def __init__(self, tokenizer: "Tokenizer", eos_ids: Sequence[int]):
        backend = tokenizer.backend
        ends = [token for token in eos_ids if backend.id_to_token(token) is not None]
        self._tokens = _library().LLTokenizer(backend.to_str(), eos_token=ends or None)

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """Return what lets one answer follow a grammar of `grammar_of`."""
        return GrammarConstraint(_library().LLMatcher(self._tokens, grammar, log_level=0))


class GrammarConstraint:
    """A `generate.TokenConstraint`: the tokens that a grammar allows, and those that end an answer where it may end."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, size: int) -> "torch.Tensor":
        """Raises UsageError: the grammar takes too much work."""
        import numpy as np
        import torch

        bits = self._matcher.compute_bitmask()
        self._check()
        allowed = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")[:size].view(bool)
        mask = torch.zeros(size, dtype=torch.bool, device="cpu")
        mask[: len(allowed)] = torch.from_numpy(allowed)
        return mask

    def advance(self, token: int) -> None:
        self._matcher.consume_token(token)
        self._check()

    @property
    def complete(self) -> bool:
        return self._matcher.is_stopped()

    def _check(self) -> None:
        if self._matcher.is_error():
            said = f"the schema or regular expression could not be followed further: {_line(self._matcher.get_error())}"
            raise UsageError(said, "give a simpler one")
