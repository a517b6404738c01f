"""Test schemas from files and classes, and schemas that are rejected before a model is loaded."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, make_dataclass

import pytest

from evoprune.errors import UsageError
from evoprune.language.schema import MAX_BYTES, read_schema, schema_of, value_of
from evoprune.language.settings import GenerationOptions
from evoprune.util import install_hint

SHOWN = {"type": "object", "properties": {"colour": {"enum": ["red", "green"]}}, "required": ["colour"]}


@dataclass
class Shown:
    colour: str
    corners: list[int]


def refusal(call, *args, **options) -> str:
    with pytest.raises(UsageError) as caught:
        call(*args, **options)
    assert caught.value.hint and "\n" not in caught.value.message
    return caught.value.message


def test_a_schema_is_read_from_a_file(tmp_path):
    file = tmp_path / "shown.json"
    file.write_text(json.dumps(SHOWN))
    assert read_schema(str(file)) == schema_of(SHOWN) == SHOWN and read_schema(None) is None
    assert read_schema(" " + json.dumps(SHOWN)) == SHOWN
    assert "is not valid JSON" in refusal(read_schema, "{type: object}")
    assert "no such file: gone.json" in refusal(read_schema, "gone.json")
    for text, said in (
        ("[1]", "not a JSON object"),
        ("{", "is not valid JSON"),
        ('{"a": NaN}', "is not valid JSON"),
        (" " * MAX_BYTES + "{}", "larger than 1 MiB"),
        ('{"items":' * 10_000 + "{}" + "}" * 10_000, "is not valid JSON"),
    ):
        file.write_text(text)
        assert said in refusal(read_schema, str(file))
    file.write_bytes(b"\xff\xfe")
    assert "is not valid JSON" in refusal(read_schema, str(file))


def test_a_dataclass_and_a_model_of_pydantic_have_schemas():
    import pydantic

    of_class = schema_of(Shown)
    assert of_class["required"] == ["colour", "corners"]
    assert of_class["properties"]["corners"]["items"] == {"type": "integer"}
    model = pydantic.create_model("Shown", colour=(str, ...), corners=(list[int], ...))
    assert schema_of(model)["properties"] == of_class["properties"]


def test_the_schema_of_a_class_allows_the_fields_of_the_class_alone():
    import pydantic

    inner = pydantic.create_model("Inner", properties=(int, ...))
    free = pydantic.create_model("Free", __config__={"extra": "allow"}, a=(int, 3))
    counts = dict[str, inner]
    fields = {"inner": (inner, ...), "free": (free, ...), "counts": (counts, ...), "any": (dict, ...)}
    made = schema_of(pydantic.create_model("Outer", **fields))
    inside = made["$defs"]
    assert made["additionalProperties"] is False and inside["Inner"]["additionalProperties"] is False
    assert inside["Free"]["additionalProperties"] is True
    assert "additionalProperties" not in inside["Inner"]["properties"]
    assert made["properties"]["counts"]["additionalProperties"] == {"$ref": "#/$defs/Inner"}
    assert made["properties"]["any"]["additionalProperties"] is True
    assert schema_of(Shown)["additionalProperties"] is False and "additionalProperties" not in schema_of(SHOWN)


def test_a_class_that_has_no_schema_is_refused():
    import pydantic

    for field in (Callable, object()):
        assert "the class Odd has no JSON Schema" in refusal(schema_of, make_dataclass("Odd", [("field", field)]))
    model = pydantic.create_model("Odd", field=(Callable, ...))
    assert "the class Odd has no JSON Schema" in refusal(schema_of, model)


@pytest.mark.parametrize("given", [3, "object", [SHOWN], {"a": {1}}])
def test_what_is_no_schema_is_refused(given):
    assert refusal(schema_of, given).startswith(("schema is ", "schema cannot "))


def test_a_schema_does_not_change_with_what_was_given():
    given = {"type": "object", "properties": {}}
    made = schema_of(given)
    given["properties"]["late"] = {}
    assert made == {"type": "object", "properties": {}}


def test_what_python_cannot_hold_has_no_value():
    assert value_of('{"a": [1.5, null]}') == {"a": [1.5, None]}
    assert value_of("1e999") is value_of("1" * 5000) is value_of("{") is None


def test_without_llguidance_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)  # as if it were not installed
    with pytest.raises(UsageError) as caught:
        GenerationOptions(schema={"type": "integer", "minimum": 20261127})
    assert str(caught.value).splitlines() == [
        "a schema or a regular expression needs llguidance, which is not installed",
        f"hint: {install_hint('schema')}",
    ]
    assert GenerationOptions(max_new_tokens=3).grammar is None


def test_without_jsonschema_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert "needs jsonschema" in refusal(GenerationOptions, schema={"type": "integer", "minimum": 20261129})
    assert GenerationOptions(regex="[a-z]+").grammar
