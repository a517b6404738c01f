"""Answers follow a schema or a regular expression, no matter how they are decoded."""

import json
import random
import re
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Literal

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from evoprune.backend import Device
from evoprune.errors import UsageError
from evoprune.language import static
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.backend.recorder import Graphs
from tests.schemas import schema_at_random
from tests.thinking import thinking_tokenizer
from tests.tiny import save_tiny

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
COLOURS = ["red", "green", "blue"]
SHOWN = {
    "type": "object",
    "properties": {"colour": {"enum": COLOURS}, "corners": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["colour", "corners"],
    "additionalProperties": False,
}


@dataclass
class Shown:
    colour: str
    still: bool


@pytest.fixture(scope="module")
def qa():
    return VideoQA(load_model("demo"), budget=0.5)


@pytest.fixture(scope="module")
def video(qa):
    return qa.encode(CLIP, frames=4)


def test_an_answer_follows_a_schema(video):
    answer = video.ask(QUESTION, schema=SHOWN)
    report = answer.report
    assert answer.parsed == json.loads(answer.text) == report.parsed
    assert answer.parsed["colour"] in COLOURS and 0 <= answer.parsed["corners"] <= 9
    assert (report.finish_reason, report.generation["schema"]) == ("stop", SHOWN)
    assert json.loads(report.to_json())["parsed"] == answer.parsed


def test_without_a_constraint_an_answer_is_as_before(video):
    answer = video.ask(QUESTION)
    assert answer.text == "green" and answer.parsed is None


def test_an_answer_matches_a_regular_expression(video):
    answer = video.ask(QUESTION, regex="It is (red|green|blue)[.]")
    assert re.fullmatch("It is (red|green|blue)[.]", answer.text)
    assert (answer.report.finish_reason, answer.parsed) == ("stop", None)


@pytest.mark.parametrize("most", range(1, 12))
def test_an_answer_that_is_cut_is_never_called_whole(video, most):
    answer = video.ask(QUESTION, schema=SHOWN, max_new_tokens=most)
    whole = answer.report.finish_reason == "stop"
    assert (answer.parsed is not None) == whole
    assert whole or (answer.report.finish_reason == "length" and "answer_cut" in answer.report.warnings)


def test_an_answer_that_is_complete_with_the_last_token_is_whole(video):
    tokens = video.ask(QUESTION, schema=SHOWN)
    assert tokens.parsed
    answer = video.ask(QUESTION, schema=SHOWN, max_new_tokens=len(tokens.ids))
    assert answer.parsed == tokens.parsed and answer.report.finish_reason == "stop"


def test_a_stop_string_cuts_too(video):
    answer = video.ask(QUESTION, schema=SHOWN, stop=",")
    assert answer.parsed is None and "," not in answer.text and answer.report.stop_reason == ","


def test_draws_follow_it_too(video):
    made = {video.ask(QUESTION, schema=SHOWN, temperature=9.0, seed=seed).text for seed in range(5)}
    assert len(made) > 1 and all(json.loads(text)["colour"] in COLOURS for text in made)
    penalized = video.ask(QUESTION, schema=SHOWN, repetition_penalty=1.5, logprobs=0)
    assert penalized.parsed["colour"] in COLOURS
    assert len(penalized.logprobs) == len(penalized.ids)


def test_classes_are_schemas(video):
    answer = video.ask(QUESTION, schema=Shown, max_new_tokens=100)
    assert (answer.parsed is None) == (answer.report.finish_reason == "length")
    assert answer.report.generation["schema"]["required"] == ["colour", "still"]


@dataclass
class Colour:
    colour: Literal["red", "green"]


def test_what_an_answer_holds_is_an_instance_of_the_class(qa, video):
    import pydantic

    model = pydantic.create_model("Colour", colour=(Literal["red", "green"], ...), inner=(Colour, ...))
    for kind in (Colour, model):
        for asked in (video.ask, video.chat().ask, partial(qa.ask, CLIP)):
            answer = asked(QUESTION, schema=kind, max_new_tokens=60)
            assert type(answer.parsed) is kind and answer.parsed is answer.parsed
            assert answer.report.parsed == json.loads(answer.text) and type(answer.report.parsed) is dict
            assert json.loads(answer.report.to_json())["parsed"] == answer.report.parsed
    assert type(answer.parsed.inner) is Colour
    cut = video.ask(QUESTION, schema=Colour, max_new_tokens=2)
    assert cut.parsed is None and cut.report.finish_reason == "length"


def test_what_the_class_refuses_is_an_error(video):
    @dataclass
    class Never:
        colour: Literal["red", "green"]

        def __post_init__(self):
            raise ValueError("never")

    answer = video.ask(QUESTION, schema=Never, max_new_tokens=60)
    with pytest.raises(UsageError, match=r"the answer is not a valid Never: .*never"):
        answer.parsed  # noqa: B018 (reads it)
    assert answer.report.parsed is None


def test_numbers_are_not_rounded(video):
    answer = video.ask(QUESTION, schema={"const": 0.123456789})
    assert answer.parsed == json.loads(answer.report.to_json())["parsed"] == 0.123456789


def test_an_answer_that_does_not_hold_is_an_error(video, monkeypatch):
    schema = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}
    monkeypatch.setattr(
        "evoprune.language.guidance.find_fault", lambda request: ("", None)
    )  # as if every schema were valid
    monkeypatch.setattr("evoprune.language.isolation.POSSIBLE", False)
    answer = video.ask(QUESTION, schema=schema, max_new_tokens=20)
    with pytest.raises(UsageError, match=r"the answer does not follow the schema: exclusiveMinimum at \$"):
        answer.parsed  # noqa: B018 (reads it)
    report = answer.report
    assert (report.answer, report.parsed, report.finish_reason) == ("0", None, "error")
    assert report.error["message"].startswith("the answer does not follow the schema")


def test_a_stream_follows_it(qa):
    with qa.stream(window_s=2.0) as live:
        for number in range(4):
            live.add(np.full((112, 168, 3), 40 * number, np.uint8), number / 2)
        assert live.ask(QUESTION, schema=SHOWN).parsed["colour"] in COLOURS


def test_8_bits_follow_it():
    video = VideoQA(load_model("demo", quantize="int8"), budget=0.5).encode(CLIP, frames=4)
    assert video.ask(QUESTION, schema=SHOWN).parsed["colour"] in COLOURS


def test_what_the_model_thinks_before_is_free(saved):
    loaded = load_model(str(saved), dtype="fp32", pack=False)
    thinking = VideoQA(replace(loaded, tokenizer=thinking_tokenizer("unless off", special=None)), budget=0.5)
    video = thinking.encode(CLIP, frames=2)
    free = video.ask(QUESTION, think="on", max_new_tokens=20)
    answer = video.ask(QUESTION, think="on", max_new_tokens=20, regex="(a|b)c")
    assert answer.text == free.text == "" and answer.ids == free.ids and answer.thoughts
    assert re.fullmatch("(a|b)c", video.ask(QUESTION, max_new_tokens=20, regex="(a|b)c").text)


ENGINES = [
    ("qwen2_5_vl", "native"),
    ("qwen3_vl", "native"),
    ("qwen2_5_vl", "transformers"),
    ("qwen3_5", "transformers"),
]


@pytest.mark.few(3)
@pytest.mark.parametrize(("family", "engine"), ENGINES)
@pytest.mark.parametrize("graph", [False, True])
def test_every_way_to_decode_follows_it(tmp_path, monkeypatch, family, engine, graph):
    loaded = load_model(str(save_tiny(tmp_path, family=family)), dtype="fp32", engine=engine, pack=False)
    if graph:
        made = Graphs()
        monkeypatch.setattr(Device, "capture", property(lambda self: made.capture))
        monkeypatch.setattr(static, "PLAIN_TOKENS", 1)
        monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: True)
    video = VideoQA(loaded, budget=0.5).encode(CLIP, frames=4)
    answers = [video.ask(QUESTION, schema=SHOWN, max_new_tokens=60).parsed for _ in range(2)]
    assert answers[0] == answers[1] and answers[0]["colour"] in COLOURS
    if graph:
        assert made.replayed


# The demo models, and random weights: a family that evoprune decodes, and one that transformers decodes.
MODELS = ["demo", "demo-scenes", "qwen3_vl", "qwen3_5"]
CLIPS = ["square", "three", "pan"]


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Return a function that asks one of `MODELS` about one of `CLIPS`. Models are loaded and clips are encoded only once."""

    @cache
    def loaded(model):
        if model.startswith("demo"):
            return VideoQA(load_model(model), budget=0.3)
        folder = save_tiny(tmp_path_factory.mktemp(model), family=model)
        return VideoQA(load_model(str(folder), dtype="fp32", pack=False), budget=0.3)

    @cache
    def encoded(model, clip):
        return loaded(model).encode(f"samples/{clip}.mp4", frames=4)

    return lambda model, clip, **options: encoded(model, clip).ask(QUESTION, **options)


@pytest.mark.few(3)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("seed", range(125))
def test_an_answer_that_ends_is_valid_by_any_schema(ask, model, seed, monkeypatch):
    # A process for each of 500 schemas would be slow; other tests use one.
    monkeypatch.setattr("evoprune.language.isolation.POSSIBLE", False)
    draw = random.Random(f"{model} {seed}")
    schema = schema_at_random(draw)
    how = {"max_new_tokens": draw.choice([3, 20, 200]), "temperature": draw.choice([0.0, 1.0, 8.0]), "seed": seed}
    answer = ask(model, draw.choice(CLIPS), schema=schema, **how)
    text = answer.text
    report = answer.report
    if report.finish_reason == "length":
        assert answer.parsed is None and "answer_cut" in report.warnings
        assert report.tokens.new == how["max_new_tokens"]
        return
    value = json.loads(text)
    Draft202012Validator(schema).validate(value)
    assert report.finish_reason == "stop" and json.loads(report.to_json())["parsed"] == answer.parsed
    if "inf" in repr(value):
        assert answer.parsed is None  # a number that is too large
    else:
        assert answer.parsed == value
