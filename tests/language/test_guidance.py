"""What llguidance allows, token by token, and what is refused with its place."""

import json

import pytest
import torch

from evoprune.errors import UsageError
from tests.language.test_schema import refusal
from tests.tiny import tiny_tokenizer

pytest.importorskip("llguidance")

from evoprune.language.guidance import REGEX, SCHEMA, Vocabulary, grammar_of
from evoprune.language.prompt import Tokenizer
from evoprune.language.settings import GenerationOptions

VOCABULARY = 600  # more than the tokenizer has, as most models' output layers are


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


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"properties": {"a": {}, "b/c": {"properties": {"not": NOT}}}}, "at /properties/b~1c/properties/not/items: "),
        ({"anyOf": [{"type": "null"}, {"type": "string", "format": "wat"}]}, "at /anyOf/1: Unknown format: wat"),
        ({"type": "wat"}, "followed: Invalid type: wat"),
        ({"$defs": {"a": {"$ref": "#/$defs/b"}}, "$ref": "#/$defs/a"}, "'/$defs/b' does not exist"),
        ({"type": "object", "properties": {"a": {"pattern": "(", "type": "string"}}}, "unclosed group"),
        ({"enum": []}, "Unsatisfiable schema"),
        ({"$ref": "#"}, "it allows no answer"),
        ({"enum": [f"{number:06}" for number in range(60_000)]}, "too big"),
    ],
)  # fmt: skip
def test_a_schema_that_cannot_be_followed_is_refused_with_its_place(schema, said):
    assert said in refusal(GenerationOptions, schema=schema)


@pytest.mark.parametrize(
    ("regex", "said"),
    [("(", "unclosed group"), ("(?=a)b", "look-around"), ("a" * 10_001, "more than 10,000 characters")],
)
def test_a_regular_expression_that_cannot_be_followed_is_refused(regex, said):
    assert said in refusal(GenerationOptions, regex=regex)


def test_a_schema_and_a_regular_expression_exclude_each_other():
    assert "exclude each other" in refusal(GenerationOptions, schema={}, regex="a")


def test_a_schema_may_refer_to_itself(tokenizer, vocabulary):
    schema = {"type": "object", "properties": {"in": {"$ref": "#"}}, "additionalProperties": False}
    constraint = vocabulary.constraint(grammar_of(SCHEMA, schema))
    for token in tokenizer.encode(json.dumps({"in": {"in": {}}})):
        assert constraint.mask(VOCABULARY)[token]
        constraint.advance(token)
    assert constraint.complete


def test_a_token_that_is_not_allowed_ends_it_with_an_error(tokenizer, vocabulary):
    constraint = vocabulary.constraint(grammar_of(REGEX, "a{3}"))
    with pytest.raises(UsageError, match="could not be followed"):
        constraint.advance(tokenizer.encode("b")[0])
