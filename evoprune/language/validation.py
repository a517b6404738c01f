"""Checks a finished answer against its JSON Schema with jsonschema, number by number. Imports no torch.

Only this file imports jsonschema, and only when a schema is used. llguidance computes bounds and large integers in floats, so an
answer can be outside an exclusive bound, or have an integer of more than 53 bits rounded.
"""

from collections.abc import Callable, Iterator
from decimal import Decimal, localcontext
from typing import Any

from evoprune.errors import first_line
from evoprune.util import shorten

DIGITS = 1500  # more than the quotient of any two floats has before its decimal point
MOST_REFERENCES = 100_000  # followed in one check, because alternatives that refer to one another multiply
LINE = 200  # characters of a place or of what jsonschema says
# Keywords that the engine alone checks: Python's `re` has another syntax, and can take forever.
BY_THE_ENGINE = ("pattern", "patternProperties", "format")
SAMPLES: list[Any] = [None, False, 0, "", [], {}]
ENDLESS = "its references do not come to an end"


class _TooManyReferences(Exception):
    """A check follows more than `MOST_REFERENCES` references."""


def wrong_value(value: Any, schema: dict[str, Any]) -> str | None:
    """Return the keyword and the place of a value that does not follow a schema, in one line, or None if it follows it.

    Args:
        value, schema: what `json.loads` returns. A float counts as the decimal number that Python prints for it.
    """
    import referencing
    from referencing.exceptions import Unresolvable

    validator = _validator_class(schema)
    try:
        with localcontext() as context:
            context.prec = DIGITS
            # The registry is empty, so that no reference is fetched from the web.
            checker = validator(_exact(schema, without="$schema"), registry=referencing.Registry())
            error = next(checker.iter_errors(_exact(value)), None)
    except (_TooManyReferences, RecursionError):
        return ENDLESS
    except Unresolvable as problem:
        return f"the reference {shorten(str(problem.ref), LINE)} leads nowhere"
    if error is None:
        return None
    return f"{error.validator} at {shorten(error.json_path, LINE)}"


def wrong_schema(schema: dict[str, Any]) -> str | None:
    """Return why answers cannot be checked against a schema, in one line, or None if they can."""
    from jsonschema.exceptions import SchemaError

    try:
        _validator_class(schema).check_schema(schema, format_checker=None)
    except SchemaError as problem:
        return f"{shorten(first_line(problem.message), LINE)}, at {shorten(problem.json_path, LINE)}"
    found = (wrong_value(sample, schema) for sample in SAMPLES)
    return next((wrong for wrong in found if wrong and "reference" in wrong), None)


def _validator_class(schema: dict[str, Any]) -> type:
    """Return jsonschema's validator of a schema's dialect, for one check, without the keywords that the engine alone checks."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import extend, validator_for

    kind = validator_for(schema, default=Draft202012Validator)
    rules = kind.VALIDATORS
    changed: dict[str, Callable] = {name: _pass for name in BY_THE_ENGINE if name in rules}
    changed["additionalProperties"] = _unless_patterns(rules["additionalProperties"])
    changed["$ref"] = _counted(rules["$ref"])
    return extend(kind, changed)


def _pass(validator: Any, rule: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
    return iter(())


def _unless_patterns(rule: Callable) -> Callable:
    """Return the rule of additionalProperties, except for schemas with patternProperties, which the engine alone checks."""
    return lambda validator, given, value, schema: (
        () if "patternProperties" in schema else rule(validator, given, value, schema)
    )


def _counted(rule: Callable) -> Callable:
    """Return a rule that raises _TooManyReferences."""
    count = 0

    def follow(validator: Any, given: Any, value: Any, schema: dict[str, Any]) -> Iterator[Any]:
        nonlocal count
        count += 1
        if count > MOST_REFERENCES:
            raise _TooManyReferences
        return rule(validator, given, value, schema)

    return follow


def _exact(value: Any, without: str | None = None) -> Any:
    """Return a JSON value with an int or a Decimal for every float. `without`: the name of texts to leave out of objects.

    A "$schema" inside a schema would replace the validator by one of jsonschema's own.
    """
    if isinstance(value, dict):
        kept = {name: inner for name, inner in value.items() if name != without or not isinstance(inner, str)}
        return {name: _exact(inner, without) for name, inner in kept.items()}
    if isinstance(value, list):
        return [_exact(inner, without) for inner in value]
    if not isinstance(value, float):
        return value
    return int(value) if value.is_integer() else Decimal(repr(value))
