"""Read an answer's JSON Schema from a file or a class, and parse answers that follow it. This module does not import torch."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from evoprune.errors import UsageError, first_line
from evoprune.language.validation import wrong_value
from evoprune.untrusted import loads
from evoprune.util import brief, cannot_read, install_hint, missing_hint, shorten

MAX_BYTES = 2**20  # maximum schema size in bytes
# Keywords whose values map field names to schemas, and keywords whose values are plain data instead of schemas.
NAME_KEYWORDS = ("properties", "patternProperties", "$defs", "definitions")
DATA_KEYWORDS = ("const", "enum", "default", "examples")


class SchemaOfClass(dict[str, Any]):
    """The JSON Schema of a dataclass or a pydantic model (`kind`). Answers are converted to instances of that class."""

    def __init__(self, content: Any = (), kind: type | None = None):
        super().__init__(content)
        self.kind = kind


def read_schema(path: str | None) -> dict[str, Any] | None:
    """Read a JSON Schema from a file, or from `path` itself if it begins like a JSON object. Return None if `path` is None.

    Raises:
        UsageError: If the file cannot be read or doesn't contain a JSON object.
    """
    if path is None:
        return None
    if path.lstrip().startswith("{"):
        return _parsed(path.encode(errors="surrogatepass"), "the schema")
    try:
        with open(path, "rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as problem:
        hint = missing_hint(path, "name a file that contains a JSON Schema")
        raise UsageError(cannot_read(path, problem, "the schema "), hint) from problem
    return _parsed(content, f"the schema {path}")


def schema_of(given: Mapping[str, Any] | type) -> dict[str, Any]:
    """Return a copy of a JSON Schema as plain data, or the `SchemaOfClass` of a dataclass or a pydantic model.

    Raises:
        UsageError: If `given` is neither a mapping nor a class, cannot be converted to JSON, or is a class without a JSON Schema.
    """
    if isinstance(given, SchemaOfClass):
        return given
    if isinstance(given, type):
        return SchemaOfClass(_without_extra_fields(schema_of(_schema_of_class(given))), given)
    if not isinstance(given, Mapping):
        hint = "pass a dict, a dataclass, a pydantic model or None"
        raise UsageError(f"schema is {brief(given)}, not a JSON Schema", hint)
    try:
        content = json.dumps(dict(given)).encode()
    except (TypeError, ValueError, RecursionError) as problem:
        raise UsageError(
            f"schema cannot be written as JSON: {first_line(problem)}", "pass a dict as from json.loads"
        ) from problem
    return _parsed(content, "schema")


def _parsed(content: bytes, name: str) -> dict[str, Any]:
    """Parse a JSON object. Error messages refer to the object as `name`."""
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} is larger than {MAX_BYTES // 2**20} MiB", "use a smaller one")
    try:
        schema = loads(content.decode())
    except ValueError as problem:
        raise UsageError(f"{name} is not valid JSON: {first_line(problem)}", "use a JSON Schema") from problem
    if not isinstance(schema, dict):
        raise UsageError(f"{name} is not a JSON object", 'use a JSON Schema, such as {"type": "object"}')
    return schema


def _schema_of_class(kind: type) -> dict[str, Any]:
    """Return the JSON Schema of a dataclass, a pydantic model, or any other class supported by pydantic.

    Raises:
        UsageError: If pydantic isn't installed or cannot create a schema for the class.
    """
    try:
        from pydantic import TypeAdapter
    except ImportError as problem:
        raise UsageError("the schema of a class needs pydantic", install_hint("schema")) from problem
    try:
        return TypeAdapter(kind).json_schema()
    except Exception as problem:  # raised by pydantic or by the class's own code
        message = f"the class {kind.__name__} has no JSON Schema: {first_line(problem)}"
        raise UsageError(message, "use a dataclass or a pydantic model whose fields have JSON types") from problem


def _without_extra_fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Forbid additional fields in all objects of a schema, unless their class allows them. The schema is modified and returned."""
    for _, part in parts_of_schema(schema):
        if "properties" in part:
            part.setdefault("additionalProperties", False)
    return schema


def parts_of_schema(value: Any, path: str = "", is_schema: bool = True) -> Iterator[tuple[str, dict]]:
    """Yield all subschemas, including the schema itself, as tuples of a path (a JSON Pointer) and the subschema."""
    if isinstance(value, dict):
        if is_schema:
            yield path, value
        for name, inner in value.items():
            if not (is_schema and name in DATA_KEYWORDS):
                step = name.replace("~", "~0").replace("/", "~1")
                yield from parts_of_schema(inner, f"{path}/{step}", not (is_schema and name in NAME_KEYWORDS))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from parts_of_schema(inner, f"{path}/{number}")


def value_of(answer: str) -> Any:
    """Parse a JSON answer. Return None if Python cannot represent the value, for example because a number is too large."""
    try:
        return loads(answer)
    except ValueError:
        return None


def checked_value(answer: str, schema: dict[str, Any]) -> Any:
    """Parse a complete answer and validate it against a schema.

    Returns:
        The answer's value, or None if Python cannot represent it.

    Raises:
        UsageError: If the answer doesn't follow the schema.
    """
    value = value_of(answer)
    if value is not None and (wrong := wrong_value(value, schema)):
        raise UsageError(f"the answer does not follow the schema: {wrong}", "change that part of the schema")
    return value


def instance_of(kind: type, answer: str) -> Any:
    """Convert a JSON answer to an instance of a dataclass or a pydantic model.

    Raises:
        UsageError: If the class rejects the value, for example in one of its validators.
    """
    from pydantic import TypeAdapter

    try:
        return TypeAdapter(kind).validate_json(answer)
    except Exception as problem:  # raised by pydantic or by the class's own code
        message = f"the answer is not a valid {kind.__name__}: {shorten(' '.join(str(problem).split()), 300)}"
        raise UsageError(
            message, "move the class's checks into its JSON Schema, for example with pydantic's Field"
        ) from problem
