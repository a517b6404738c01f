"""Answers that follow a JSON Schema or a regular expression: llguidance says which tokens may come next. Imports no torch.

Only this file imports llguidance, the extra `schema`. A grammar is checked before a model is loaded, with the bytes as tokens, in a
process of its own.
"""

import json
from collections.abc import Iterator, Sequence
from decimal import Decimal
from functools import cache, lru_cache
from importlib.util import find_spec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError, first_line
from evoprune.language.apart import apart
from evoprune.language.schema import parts_of_schema
from evoprune.language.validation import wrong_schema, wrong_value

if TYPE_CHECKING:
    import torch

    from evoprune.language.prompt import Tokenizer

SCHEMA, REGEX = "schema", "regex"
SECONDS = 5  # of the check; what programs ask for takes milliseconds
STACK_BYTES = 2**20  # llguidance goes down into a schema by recursion, and a thread may have less than a program
EXACT_BITS = 53  # of an integer: llguidance keeps numbers as floats
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
NUMERIC = ("type", "multipleOf", *BOUNDS)  # keywords of numbers
# Of JSON. A model could write white space for ever. What a schema itself says about these ("x-guidance") does not count.
FORM = {
    "whitespace_pattern": " ?",
    "item_separator": ",",
    "key_separator": ":",
    "lenient": False,
    "coerce_one_of": False,
    "json_allowed_escapes": 'bfnrt\\"',  # by \\u a field could have the name of another
}
NOTHING_FOLLOWS = ("NoExtension", "NoExtensionBias")  # llguidance's words where no token may come
FIRST_BYTES = 2  # of an answer that are tried in the check
MOST_SEARCHED = 2**20  # characters of parts of a schema that are tried to find what is wrong
LONGEST = 10_000  # characters of a regular expression
LINE = 200  # characters of what llguidance says


def _check_installed(kind: str) -> None:
    """Raises UsageError: a package that is needed is not installed."""
    _library()
    if kind == SCHEMA and find_spec("jsonschema") is None:
        raise UsageError("a schema needs jsonschema, which is not installed", "pip install 'evoprune[schema]'")


def _library() -> ModuleType:
    """Return llguidance. Raises UsageError: it is not installed."""
    try:
        import llguidance
    except ImportError as problem:
        said = "a schema or a regular expression needs llguidance, which is not installed"
        raise UsageError(said, "pip install 'evoprune[schema]'") from problem
    return llguidance


def grammar_of(kind: str, given: dict[str, Any] | str) -> str:
    """Return the grammar of a JSON Schema (`kind` SCHEMA) or a regular expression (REGEX), as llguidance takes it.

    Raises UsageError: it is not supported, with the place in the schema; or llguidance is not installed.
    """
    if kind == REGEX and not given:
        raise UsageError(
            "the regular expression is empty", "no answer has a character then: give one that says something"
        )
    if kind == REGEX and len(given) > LONGEST:
        raise UsageError(f"the regular expression has more than {LONGEST:,} characters", "give a shorter one")
    return _checked(kind, given if kind == REGEX else json.dumps(given))


@lru_cache(16)
def _checked(kind: str, text: str) -> str:
    """Return the grammar of a text, as `grammar_of`."""
    _check_installed(kind)
    needs = "llguidance" if kind == REGEX else "llguidance, jsonschema"
    try:
        wrong, path = apart(fault, json.dumps([kind, text]), SECONDS, needs, STACK_BYTES)
    except ValueError as problem:
        wrong = str(problem)
        path = None
    if not wrong:
        return _grammar(kind, text)
    what = "regular expression" if kind == REGEX else "schema"
    where = f" at {path}" if path else ""
    raise UsageError(f"the {what} cannot be followed{where}: {wrong}", "change what is named, or give a simpler one")


def _grammar(kind: str, text: str) -> str:
    """Return the grammar of a text, unchecked. Raises ValueError: the schema is nested too deeply."""
    matcher = _library().LLMatcher
    if kind == REGEX:
        return matcher.grammar_from_regex(text)
    return matcher.grammar_from_json_schema(text, None, FORM)


def fault(request: str) -> tuple[str, str | None]:
    """Return what is wrong with a kind and a text (JSON), or nothing, and the path in the schema.

    To be called `apart`: llguidance limits each step of its work, but not all that it does to compile a schema, and not how deep it
    goes.
    """
    kind, text = json.loads(request)
    wrong = _tried(kind, text)
    if kind == REGEX:
        return wrong, None
    schema = json.loads(text)
    if wrong:
        return wrong, _place(schema, wrong)
    if wrong := wrong_schema(schema):
        return wrong, None
    return next(_wrong_numbers(schema), ("", None))


def _tried(kind: str, text: str) -> str:
    """Return what is wrong with a text, or nothing."""
    library = _library()
    try:
        grammar = _grammar(kind, text)
    except ValueError as problem:
        return first_line(problem)
    matcher = library.LLMatcher(_bytes(), grammar, log_level=0)
    for _ in range(FIRST_BYTES):  # where there is too much work, it is mostly at the beginning
        bits = int.from_bytes(matcher.compute_bitmask(), "little")
        if matcher.is_stopped():
            break
        matcher.consume_token((bits & -bits).bit_length() - 1)  # the first that is allowed
    return _line(matcher.get_error())


def _wrong_numbers(schema: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the numbers of a schema that llguidance does not follow exactly: what is wrong, and the path of the part."""
    for path, part in parts_of_schema(schema):
        values = [*part.get("enum", []), *([part["const"]] if "const" in part else [])]
        for value in filter(_has_large_integer, values):
            if not _allows({"const": value}, json.dumps(value, separators=(",", ":"))):
                yield f"integers of more than {EXACT_BITS} bits are rounded; strings are exact", path
        rules = {name: part[name] for name in NUMERIC if name in part}
        numbers = {number for name in BOUNDS if name in rules for number in _beside(rules[name])}
        for number in sorted(numbers):
            text = f"{Decimal(repr(number)):f}"
            if _allows(rules, text) and (broken := wrong_value(number, rules)):
                rule, _, _ = broken.partition(" ")
                yield f"{text} would pass {rule}; minimum and maximum below 2**{EXACT_BITS} are exact", path


def _beside(bound: float) -> Sequence[float]:
    """Return a bound, and the integers beside it if it is one."""
    return (bound - 1, bound, bound + 1) if isinstance(bound, int) else (bound,)


def _has_large_integer(value: Any) -> bool:
    if isinstance(value, dict | list):
        return any(map(_has_large_integer, value.values() if isinstance(value, dict) else value))
    return isinstance(value, int) and abs(value) > 2**EXACT_BITS


def _allows(schema: dict[str, Any], text: str) -> bool:
    """Return whether llguidance would let an answer be this text."""
    matcher = _library().LLMatcher(_bytes(), _grammar(SCHEMA, json.dumps(schema)), log_level=0)
    read = matcher.try_consume_tokens(list(text.encode()))
    return read == len(text.encode()) and matcher.is_accepting()


@cache
def _bytes() -> Any:
    return _library().LLTokenizer("byte")


def _line(error: str) -> str:
    """Return an error of llguidance in one line; of one in a regular expression, behind the lines that show its place."""
    first, *_ = (error.partition("error: ")[2] or error).strip().splitlines() or [""]
    if first in NOTHING_FOLLOWS:
        return "nothing can be written that it allows"
    return first if len(first) <= LINE else first[:LINE] + "..."


def _place(schema: Any, wrong: str) -> str | None:
    """Return the path, as a JSON Pointer, of the smallest part of a schema that is refused by the same words; None: not found."""
    parts = [(path, json.dumps(part)) for path, part in parts_of_schema(schema) if path]
    searched = 0
    for path, text in sorted(parts, key=lambda part: len(part[1])):
        searched += len(text)
        if searched > MOST_SEARCHED:
            return None
        if _tried(SCHEMA, text) == wrong:
            return path
    return None


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
