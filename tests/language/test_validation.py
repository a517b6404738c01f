"""Test the exact validation of a finished answer against its schema."""

import pytest

from evoprune.language.validation import ENDLESS_REFERENCES, wrong_schema, wrong_value

LARGE = 2**53 + 1


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"const": LARGE}, LARGE, LARGE - 1),
        ({"enum": [LARGE, 10**30 + 1]}, 10**30 + 1, 10**30),
        ({"minimum": LARGE}, LARGE, LARGE - 1),
        ({"multipleOf": LARGE}, 3 * LARGE, 3 * LARGE - 1),
        ({"exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, 1e-300, 0),
        ({"exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, 1.49, 1.5),
        ({"multipleOf": 0.1}, 0.3, 0.35),
        ({"multipleOf": 1e-300}, 1.7e308, 1.5e-300),
        ({"type": "integer"}, 1e300, 0.5),
        ({"$defs": {"id": {"const": LARGE}}, "items": {"$ref": "#/$defs/id"}}, [LARGE], [1]),
        ({"$schema": "http://json-schema.org/draft-07/schema#", "items": [{"const": LARGE}]}, [LARGE], [LARGE - 1]),
    ],
)
def test_numbers_are_compared_exactly(schema, right, wrong):
    assert wrong_schema(schema) is None and wrong_value(right, schema) is None
    assert wrong_value(wrong, schema)


def test_the_place_of_what_is_wrong_is_named():
    schema = {"properties": {"a": {"items": {"maximum": 3}}}}
    assert wrong_value({"a": [1, 4]}, schema) == "maximum at $.a[1]"


def test_patterns_are_left_to_the_engine():
    # Python does not know this syntax, and others take forever on it
    schema = {"type": "string", "pattern": r"^(a*)*\p{L}$"}
    assert wrong_schema(schema) is None and wrong_value("a" * 100, schema) is None
    schema = {"patternProperties": {"((a*)*)*b": {}}, "additionalProperties": False}
    assert wrong_schema(schema) is None and wrong_value({"a" * 100: 1}, schema) is None


def test_a_dialect_inside_a_schema_brings_no_patterns_back():
    inner = {"$schema": "http://json-schema.org/draft-07/schema#", "pattern": r"\p{L}"}
    assert wrong_value({"a": "x"}, {"properties": {"a": inner}}) is None


@pytest.mark.full
def test_references_without_an_end_are_named():
    assert wrong_schema({"anyOf": [{"$ref": "#"}, {"type": "null"}]}) == ENDLESS_REFERENCES
    twice = {"allOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/a"}]}
    schema = {"$defs": {"a": {"properties": {"a": twice}}}, "$ref": "#/$defs/a"}
    value = {}
    for _ in range(60):
        value = {"a": value}
    assert wrong_schema(schema) is None and wrong_value(value, schema) == ENDLESS_REFERENCES


def test_nothing_is_fetched():
    assert wrong_schema({"$ref": "http://127.0.0.1:9/schema.json"}) == (
        "the reference http://127.0.0.1:9/schema.json cannot be resolved"
    )


def test_a_schema_that_is_none_is_refused():
    assert (
        wrong_schema({"properties": {"a": {"minimum": "1"}}})
        == "'1' is not of type 'number', at $.properties.a.minimum"
    )
