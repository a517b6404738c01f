"""Constrain answers to a JSON Schema or a regular expression using llguidance. Importing this module does not import torch.

This is the only module that imports llguidance, which is included in the `schema` extra. Before loading a model, each grammar is
checked in a separate process, using single bytes as tokens.
"""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError, first_line
from evoprune.language.isolation import run_isolated
from evoprune.language.schema import parts_of_schema
from evoprune.language.validation import wrong_schema, wrong_value
from evoprune.util import install_hint

if TYPE_CHECKING:
    import torch

    from evoprune.language.prompt import Tokenizer

SCHEMA, REGEX = "schema", "regex"
SECONDS = 5  # time limit for checking a grammar, which typically takes milliseconds
STACK_BYTES = 2**20  # stack limit for checking a grammar, because llguidance is recursive
EXACT_BITS = 53  # llguidance stores numbers as floats, so longer integers are not exact
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NUMERIC = ("type", "multipleOf", *BOUNDS)  # schema keywords for numbers
# The layout of JSON answers, which overrides a schema's "x-guidance" settings. Without it, a model could generate whitespace
# indefinitely.
JSON_LAYOUT = {
    "whitespace_pattern": " ?",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
    "json_allowed_escapes": 'bfnrt\\"',  # not \\u, because an escaped name could duplicate another field's name
}
DEAD_END_ERRORS = ("NoExtension", "NoExtensionBias")  # llguidance's errors if no token is allowed
FIRST_BYTES = 2  # number of bytes to generate when checking a grammar
MAX_SEARCHED = 2**20  # maximum number of characters in the subschemas to check when locating an error
MAX_REGEX_LENGTH = 10_000  # maximum length of a regular expression, in characters
MAX_MESSAGE_LENGTH = 200  # maximum length of messages from llguidance, in characters


def _check_installed(kind: str) -> None:
    """Raise UsageError if a package required for this grammar type isn't installed."""
    _library()
    if kind == SCHEMA and find_spec("jsonschema") is None:
        raise UsageError("a schema needs jsonschema, which is not installed", install_hint("schema"))


def _library() -> ModuleType:
    """Import and return llguidance, or raise UsageError if it isn't installed."""
    try:
        import llguidance
    except ImportError as problem:
        message = "a schema or a regular expression needs llguidance, which is not installed"
        raise UsageError(message, install_hint("schema")) from problem
    return llguidance


def grammar_of(kind: str, given: dict[str, Any] | str) -> str:
    """Convert a JSON Schema or a regular expression to an llguidance grammar.

    Args:
        kind: `SCHEMA` or `REGEX`.
        given: The schema or the regular expression.

    Raises:
        UsageError: If llguidance doesn't support the schema or regular expression, or a required package isn't installed. For a
            schema, the error message includes the path of the unsupported subschema.
    """
    if kind == REGEX and not given:
        raise UsageError(
            "the regular expression is empty", "it allows only an empty answer; write one that matches some text"
        )
    if kind == REGEX and len(given) > MAX_REGEX_LENGTH:
        raise UsageError(f"the regular expression has more than {MAX_REGEX_LENGTH:,} characters", "use a shorter one")
    return _checked_grammar(kind, given if kind == REGEX else json.dumps(given))


def _checked_grammar(kind: str, text: str) -> str:
    """Check a regular expression or a schema (as JSON text), and return its grammar."""
    try:
        wrong, path = _fault(kind, text)
    except ValueError as problem:
        wrong = str(problem)
        path = None
    if not wrong:
        return _grammar(kind, text)
    what = "regular expression" if kind == REGEX else "schema"
    where = f" at {path}" if path else ""
    raise UsageError(f"the {what} cannot be used{where}: {wrong}", "fix this, or use a simpler one")


@lru_cache(16)
def _fault(kind: str, text: str) -> tuple[str, str | None]:
    """Call `find_fault` in a separate process. Results are cached, except for a ValueError if the limits are exceeded."""
    _check_installed(kind)
    needs = "llguidance" if kind == REGEX else "llguidance, jsonschema"
    wrong, path = run_isolated(find_fault, json.dumps([kind, text]), SECONDS, needs, STACK_BYTES)
    return wrong, path


@lru_cache(16)
def _grammar(kind: str, text: str) -> str:
    """Convert a schema or regular expression to a grammar without checking it. Results are cached.

    Raises:
        ValueError: If it is nested too deeply.
    """
    matcher = _library().LLMatcher
    if kind == REGEX:
        return matcher.grammar_from_regex(text)
    return matcher.grammar_from_json_schema(text, None, JSON_LAYOUT)


def find_fault(request: str) -> tuple[str, str | None]:
    """Check a schema or regular expression for errors. This function must only be called through `run_isolated`.

    The check must run in a separate process with time and stack limits, because llguidance doesn't limit the total compile time or
    the recursion depth.

    Args:
        request: A JSON list with the kind (`SCHEMA` or `REGEX`) and the schema or regular expression as a string.

    Returns:
        A tuple of the error message (empty if there is no error) and the path of the invalid subschema (None if unknown).
    """
    kind, text = json.loads(request)
    wrong = _compile_error(kind, text)
    if kind == REGEX:
        return wrong, None
    schema = json.loads(text)
    if wrong:
        return wrong, _path_of_fault(schema, wrong)
    if wrong := wrong_schema(schema):
        return wrong, None
    return next(_wrong_numbers(schema), ("", None))


def _compile_error(kind: str, text: str) -> str:
    """Compile a schema or regular expression, and generate the first bytes of an answer. Return any error message, or ""."""
    library = _library()
    try:
        grammar = _grammar(kind, text)
    except ValueError as problem:
        return first_line(problem)
    matcher = library.LLMatcher(_byte_tokenizer(), grammar, log_level=0)
    for _ in range(FIRST_BYTES):  # overly complex grammars usually fail within the first bytes
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped():
            break
        matcher.consume_token((bits & -bits).bit_length() - 1)  # the first allowed byte
    return _one_line(matcher.get_error())


def _wrong_numbers(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Find numbers in a schema that llguidance cannot represent exactly, and yield an error message and a path for each number."""
    for path, part in parts_of_schema(schema):
        values = [*part.get("enum", []), *([part["const"]] if "const" in part else [])]
        for value in filter(_has_large_integer, values):
            if not _allows({"const": value}, json.dumps(value, separators=(",", ":"))):
                yield f"integers of more than {EXACT_BITS} bits are rounded; strings are exact", path
        rules = {name: part[name] for name in NUMERIC if name in part}
        numbers = {number for name in BOUNDS if name in rules for number in _with_neighbors(rules[name])}
        for number in sorted(numbers):
            text = f"{Decimal(repr(number)):f}"
            if _allows(rules, text) and (broken := wrong_value(number, rules)):
                rule, _, _ = broken.partition(" ")
                yield f"{text} would pass {rule}; minimum and maximum below 2**{EXACT_BITS} are exact", path


def _with_neighbors(bound: float) -> Sequence[float]:
    """Return a numeric bound and, if it is an integer, the preceding and following integers as well."""
    return (bound - 1, bound, bound + 1) if isinstance(bound, int) else (bound,)


def _has_large_integer(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_large_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) > 2**EXACT_BITS


def _allows(schema: dict[str, Any], text: str) -> bool:
    """Return True if llguidance accepts the text as a complete answer for a schema."""
    matcher = _library().LLMatcher(_byte_tokenizer(), _grammar(SCHEMA, json.dumps(schema)), log_level=0)
    read = matcher.try_consume_tokens(list(text.encode()))
    return read == len(text.encode()) and matcher.is_accepting()


@cache
def _byte_tokenizer() -> Any:
    return _library().LLTokenizer("byte")


def _one_line(error: str) -> str:
    """Shorten an llguidance error message to one line, removing any lines that mark a position in a regular expression."""
    first, *_ = (error.partition("error: ")[2] or error).strip().splitlines() or [""]
    if first in DEAD_END_ERRORS:
        return "no text can match it"
    return first if len(first) <= MAX_MESSAGE_LENGTH else first[:MAX_MESSAGE_LENGTH] + "..."


def _path_of_fault(schema: Any, wrong: str) -> str | None:
    """Return the path (a JSON Pointer) of the smallest subschema that causes the error `wrong`, or None if not found."""
    parts = [(path, json.dumps(part)) for path, part in parts_of_schema(schema) if path]
    searched = 0
    for path, text in sorted(parts, key=lambda part: len(part[1])):
        searched += len(text)
        if searched > MAX_SEARCHED:
            return None
        if _compile_error(SCHEMA, text) == wrong:
            return path
    return None


class Vocabulary:
    """A model's vocabulary in llguidance format. Creating a large vocabulary takes a second, so instances should be reused."""

    def __init__(self, tokenizer: "Tokenizer", eos_ids: Sequence[int]):
        backend = tokenizer.backend
        ends = [token for token in eos_ids if backend.id_to_token(token) is not None]
        self._tokens = _library().LLTokenizer(backend.to_str(), eos_token=ends or None)

    def constraint(self, grammar: str) -> "GrammarConstraint":
        """Create a constraint for a single answer from a grammar (see `grammar_of`)."""
        return GrammarConstraint(_library().LLMatcher(self._tokens, grammar, log_level=0))


class GrammarConstraint:
    """A `constraints.TokenConstraint` that restricts an answer to a grammar. End tokens are allowed wherever the answer may end."""

    def __init__(self, matcher: Any):
        self._matcher = matcher

    def mask(self, size: int) -> "torch.Tensor":
        """Return a mask of the allowed tokens, bool `[size]`. Raises UsageError if the grammar is too complex."""
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
            message = (
                f"the answer could not follow the schema or regular expression: {_one_line(self._matcher.get_error())}"
            )
            raise UsageError(message, "use a simpler one")
