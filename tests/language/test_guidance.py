"""Test which tokens llguidance allows at each step, and the location of errors in rejected schemas."""

import json
import random
from functools import partial

import pytest
import torch

from evoprune.errors import UsageError
from evoprune.language import guidance
from evoprune.language.guidance import REGEX, SCHEMA, Vocabulary, grammar_of
from evoprune.language.prompt import Tokenizer
from evoprune.language.settings import GenerationOptions
from tests.language.test_schema import refusal
from tests.tiny import tiny_tokenizer

VOCABULARY = 600  # larger than the tokenizer's vocabulary, like most models' output layers


@pytest.fixture(scope="module")
def tokenizer():
    import tokenizers

    hf = tiny_tokenizer()
    return Tokenizer(tokenizers.Tokenizer.from_str(hf.backend_tokenizer.to_str()), hf.chat_template)


@pytest.fixture(scope="module")
def end(tokenizer):
    return tokenizer.specials()["<|im_end|>"]


@pytest.fixture(scope="module")
def vocabulary(tokenizer, end):
    return Vocabulary(tokenizer, [end])


def allowed(tokenizer, constraint) -> set[str]:
    mask = constraint.mask(VOCABULARY)
    assert mask.shape == (VOCABULARY,) and mask.dtype == torch.bool
    return {tokenizer.backend.decode([token], skip_special_tokens=False) for token in mask.nonzero()[:, 0].tolist()}


def test_a_regular_expression_allows_what_goes_on(tokenizer, vocabulary, end):
    constraint = vocabulary.constraint(grammar_of(REGEX, "yes|no"))
    first = allowed(tokenizer, constraint)
    assert "n" in first and "y" in first and all("yes".startswith(text) or "no".startswith(text) for text in first)
    for token in tokenizer.encode("no"):
        assert not constraint.complete
        constraint.advance(token)
    assert constraint.complete and allowed(tokenizer, constraint) == {"<|im_end|>"}


def test_an_answer_that_may_go_on_may_end(tokenizer, vocabulary):
    constraint = vocabulary.constraint(grammar_of(REGEX, "[0-9]+"))
    assert "<|im_end|>" not in allowed(tokenizer, constraint)
    for token in tokenizer.encode("12"):
        constraint.advance(token)
    assert {"<|im_end|>", "0"} <= allowed(tokenizer, constraint) and not constraint.complete


def test_json_has_at_most_one_space_between_its_parts(tokenizer, vocabulary):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for text, possible in (('{"a": 1}', True), ('{"a":1}', True), ('{"a":  1}', False), ('{\n"a": 1}', False)):
        constraint = vocabulary.constraint(grammar_of(SCHEMA, schema))
        ids = tokenizer.encode(text)
        followed = 0
        for token in ids:
            if not constraint.mask(VOCABULARY)[token]:
                break
            constraint.advance(token)
            followed += 1
        assert (followed == len(ids)) == possible


NOT = {"type": "array", "items": {"not": {"type": "null"}}}


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a": {}, "b/c": {"properties": {"not": NOT}}}}, "at /properties/b~1c/properties/not/items: "),
        ({"anyOf": [{"type": "null"}, {"type": "string", "format": "wat"}]}, "at /anyOf/1: Unknown format: wat"),
        ({"type": "wat"}, "used: Invalid type: wat"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}}, "$ref": "#/$defs/a"}, "'/$defs/b' does not exist"),
        ({"type": "object", "properties": {"a": {"pattern": "(", "type": "string"}}}, "unclosed group"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"$ref": "#"}, "no text can match it"),
        ({"x-guidance": {"lenient": True}, "not": {"type": "null"}}, "Unimplemented keys"),
        ({"type": "object", "properties": {f"field{number}": {} for number in range(600)}}, "max is 2000"),
        ({"const": [0] * 70_000}, "panic"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_with_its_place(schema, said):
    assert said in refusal(GenerationOptions, schema=schema)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("regex", "said"),
    [
        ("", "the regular expression is empty"),
        ("(", "unclosed group"),
        ("(?=a)b", "look-around"),
        ("a" * 10_001, "more than 10,000 characters"),
        ("(" * 4000 + ")" * 4000, "nested"),
        ("(a{1000}){1000}", "used: "),
        (r"[^\s\S]", "no text can match it"),
        ("\ud800", "surrogates"),
    ],
)  # fmt: skip
def test_a_regular_expression_that_cannot_be_followed_is_refused(regex, said):
    assert said in refusal(GenerationOptions, regex=regex)


LARGE = 2**53 + 1


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"const": LARGE}, "used: integers of more than 53 bits are rounded; strings are exact"),
        (
            {"properties": {"id": {"enum": [1, 10**30 + 1]}}},
            "at /properties/id: integers of more than 53 bits are rounded",
        ),
        ({"items": {"const": {"id": [LARGE]}}}, "at /items: integers of more than 53 bits are rounded"),
        ({"type": "integer", "minimum": LARGE}, f"used: {LARGE - 1} would pass minimum"),
        ({"type": "integer", "exclusiveMaximum": LARGE + 2}, "would pass exclusiveMaximum"),
        ({"items": {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}}, "at /items: 0 would pass"),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.1}, "0 would pass exclusiveMinimum; "),
        ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5}, "1 would pass"),
        ({"properties": {"a": {"title": 3}}}, "3 is not of type 'string', at $.properties.a.title"),
    ],
)
def test_numbers_that_would_not_be_followed_exactly_are_refused(schema, said):
    assert said in refusal(GenerationOptions, schema=schema)


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**60},  # exact as a float
        {"const": {"maximum": LARGE}, "default": LARGE} | {"const": 1},
        {"properties": {"const": {"type": "integer"}, "enum": {"type": "number", "minimum": 0.5}}},
        {"type": "number", "exclusiveMinimum": 0},
        {"type": "integer", "exclusiveMinimum": 5, "maximum": 2**52},
        {"type": "number", "minimum": 0, "maximum": 1, "multipleOf": 0.1},
        {"type": "number", "minimum": 1e-7},
    ],
)
def test_numbers_that_are_followed_exactly_are_accepted(schema):
    assert GenerationOptions(schema=schema).grammar


def references(count: int) -> dict:
    inner = {f"d{n}": {"type": "array", "items": {"$ref": f"#/$defs/d{n + 1}"}} for n in range(count)}
    return {"$defs": {**inner, f"d{count}": {"type": "null"}}, "$ref": "#/$defs/d0"}


def test_a_schema_whose_references_go_too_deep_is_refused():
    """llguidance does not limit its recursion, so it would crash the program."""
    assert GenerationOptions(schema=references(50)).grammar
    assert "too much" in refusal(GenerationOptions, schema=references(4000))


@pytest.mark.full
def test_a_check_without_an_end_is_ended(monkeypatch):
    monkeypatch.setattr(guidance, "SECONDS", 1)
    patterns = [{"type": "string", "pattern": f"a.{{{number}}}b"} for number in range(400)]
    assert "does not finish within 1 s" in refusal(GenerationOptions, schema={"allOf": patterns})


@pytest.mark.parametrize("regex", ["(a|b)*a(a|b){200}c", "(.*a.{100}){30}", r"(\w+\s+){1000}", "((a*)*)*b"])
def test_a_regular_expression_that_other_programs_explode_at_is_followed(tokenizer, vocabulary, regex):
    constraint = vocabulary.constraint(grammar_of(REGEX, regex))
    draw = random.Random(0)
    for _ in range(300):
        if constraint.complete:
            break
        ids = constraint.mask(VOCABULARY).nonzero()[:, 0].tolist()
        constraint.advance(draw.choice(ids[:-1] or ids))


def test_a_schema_is_checked_once(monkeypatch):
    schema = {"type": "integer", "minimum": 20261128}
    assert GenerationOptions(schema=schema).grammar
    monkeypatch.setattr(guidance, "run_isolated", partial(pytest.fail, "a second process"))
    assert GenerationOptions(schema=schema).grammar


def test_a_wrong_schema_is_checked_once_unless_it_takes_too_long(monkeypatch):
    checks = []

    def check(work, request, *limits):
        checks.append(request)
        if "slow" in request:
            raise ValueError("it does not finish")
        return "it is wrong", "/a"

    monkeypatch.setattr(guidance, "run_isolated", check)
    for _ in range(2):
        assert "cannot be used at /a: it is wrong" in refusal(GenerationOptions, schema={"const": "wrong 1128"})
    assert len(checks) == 1
    for _ in range(2):  # on another day, the machine may be faster
        assert "does not finish" in refusal(GenerationOptions, schema={"const": "slow 1128"})
    assert len(checks) == 3


def test_a_schema_and_a_regular_expression_exclude_each_other():
    assert "cannot be combined" in refusal(GenerationOptions, schema={}, regex="a")


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"properties": {"a": {"type": "integer"}}}, r'{"\u0061":"x"}'),  # the escaped name is a
        ({"x-guidance": {"key_separator": "::"}}, '{"a"::1}'),
        ({"properties": {"a": {"type": "integer"}}}, '{"a":1,"a":2}'),
        ({}, r'"\ud800"'),  # not a character
    ],
)
def test_what_is_not_valid_json_by_the_schema_cannot_be_written(tokenizer, vocabulary, schema, text):
    constraint = vocabulary.constraint(grammar_of(SCHEMA, {"type": ["object", "string"], **schema}))
    for token in tokenizer.encode(text):
        if not constraint.mask(VOCABULARY)[token]:
            return
        constraint.advance(token)
    pytest.fail("it could be written")


def test_all_tokens_that_end_an_answer_end_it(tokenizer, end):
    other = tokenizer.specials()["<|endoftext|>"]
    constraint = Vocabulary(tokenizer, [end, other, 10**6]).constraint(grammar_of(REGEX, "ab?"))
    assert allowed(tokenizer, constraint) == {"a"}
    constraint.advance(tokenizer.encode("a")[0])
    assert allowed(tokenizer, constraint) == {"b", "<|im_end|>", "<|endoftext|>"}


def test_a_schema_may_refer_to_itself(tokenizer, vocabulary):
    schema = {"type": "object", "properties": {"in": {"$ref": "#"}}, "additionalProperties": False}
    constraint = vocabulary.constraint(grammar_of(SCHEMA, schema))
    for token in tokenizer.encode(json.dumps({"in": {"in": {}}})):
        assert constraint.mask(VOCABULARY)[token]
        constraint.advance(token)
    assert constraint.complete


def test_a_token_that_is_not_allowed_ends_it_with_an_error(tokenizer, vocabulary):
    constraint = vocabulary.constraint(grammar_of(REGEX, "a{3}"))
    with pytest.raises(UsageError, match="could not follow"):
        constraint.advance(tokenizer.encode("b")[0])
