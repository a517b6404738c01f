"""Validate a complete answer against its JSON Schema, using jsonschema with exact numbers. This module does not import torch.

llguidance represents bounds and large integers as floats, so a guided answer can violate an exclusive bound, or contain a rounded
integer of more than 53 bits. This is the only module that imports jsonschema, and only when a schema is used.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any

from evoprune.errors import first_line
from evoprune.util import shorten

DIGITS = 1500  # decimal precision, which exceeds the number of integer digits in the quotient of any two floats
MAX_REFERENCES = 100_000  # limit per check; nested alternatives can multiply the number of references
MAX_TEXT_LENGTH = 200  # maximum length of paths and messages from jsonschema, in characters
# Keywords checked only by llguidance, because Python's `re` has a different syntax and can take forever.
ENGINE_KEYWORDS = ("pattern", "patternProperties", "format")
SAMPLES: list[Any] = [None, False, 0, "", [], {}]
ENDLESS_REFERENCES = "its references never end"


class _TooManyReferences(Exception):
    """Raised when a check follows more than `MAX_REFERENCES` references."""


def wrong_value(value: Any, schema: dict[str, Any]) -> str | None:
    """Describe the first schema violation by its path in the value and its keyword, or return None if the value is valid.

    Args:
        value, schema: Objects as returned by `json.loads`. Floats are treated as decimal numbers, exactly as printed by Python.
    """
    import referencing
    from referencing.exceptions import Unresolvable

    validator = _validator_class(schema)
    try:
        with localcontext() as context:
            context.prec = DIGITS
            # Use an empty registry, so that jsonschema cannot fetch references from the web
            checker = validator(_exact(schema, without="$schema"), registry=referencing.Registry())
            error = next(checker.iter_errors(_exact(value)), None)
    except (_TooManyReferences, RecursionError):
        return ENDLESS_REFERENCES
    except Unresolvable as problem:
        return f"the reference {shorten(str(problem.ref), MAX_TEXT_LENGTH)} cannot be resolved"
    if error is None:
        return None
    return f"{error.validator} at {shorten(error.json_path, MAX_TEXT_LENGTH)}"


def wrong_schema(schema: dict[str, Any]) -> str | None:
    """Return a one-line reason why answers cannot be validated against a schema, or None if they can."""
    from jsonschema.exceptions import SchemaError

    try:
        _validator_class(schema).check_schema(schema, format_checker=None)
    except SchemaError as problem:
        return (
            f"{shorten(first_line(problem.message), MAX_TEXT_LENGTH)}, at {shorten(problem.json_path, MAX_TEXT_LENGTH)}"
        )
    found = (wrong_value(sample, schema) for sample in SAMPLES)
    return next((wrong for wrong in found if wrong and "reference" in wrong), None)


def _validator_class(schema: dict[str, Any]) -> type:
    """Create a validator class for a single check: jsonschema's class for the schema's dialect, without the `ENGINE_KEYWORDS`."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    rules = kind.VALIDATORS
    changed: dict[str, Callable] = {name: _pass for name in ENGINE_KEYWORDS if name in rules}
    changed["additionalProperties"] = _unless_patterns(rules["additionalProperties"])
    changed["$ref"] = _counted(rules["$ref"])
    return extend(kind, changed)


def _pass(validator: Any, rule: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    return iter(())


def _unless_patterns(rule: Callable) -> Callable:
    """Wrap the additionalProperties rule to skip schemas with patternProperties, which are checked only by llguidance."""
    return lambda validator, given, value, schema: (
        () if "patternProperties" in schema else rule(validator, given, value, schema)
    )


def _counted(rule: Callable) -> Callable:
    """Wrap the $ref rule to raise `_TooManyReferences` after `MAX_REFERENCES` calls."""
    count = 0

    def follow(validator: Any, given: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
        nonlocal count
        count += 1
        if count > MAX_REFERENCES:
            raise _TooManyReferences
        return rule(validator, given, value, schema)

    return follow


def _exact(value: Any, without: str | None = None) -> Any:
    """Return a JSON value with all floats replaced by an int or a Decimal.

    Args:
        value: The JSON value.
        without: The name of fields to drop if their value is a string. For schemas, pass "$schema", because this field would cause
            jsonschema to replace the modified validator with its own.
    """
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name != without or not isinstance(inner, str)}
        return {name: _exact(inner, without) for name, inner in kept.items()}
    if isinstance(value, list):
        return [_exact(inner, without) for inner in value]
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else Decimal(repr(value))
