"""Answers that follow a schema or a regular expression, of every way to decode."""

import json
import random
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest

from evoprune.language import static
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.backend.recorder import Graphs
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
    penalised = video.ask(QUESTION, schema=SHOWN, repetition_penalty=1.5, logprobs=0)
    assert penalised.parsed["colour"] in COLOURS
    assert len(penalised.logprobs) == len(penalised.ids)


def test_classes_are_schemas(video):
    answer = video.ask(QUESTION, schema=Shown, max_new_tokens=100)
    assert (answer.parsed is None) == (answer.report.finish_reason == "length")
    assert answer.report.generation["schema"]["required"] == ["colour", "still"]


def test_numbers_are_not_rounded(video):
    answer = video.ask(QUESTION, schema={"const": 0.123456789})
    assert answer.parsed == json.loads(answer.report.to_json())["parsed"] == 0.123456789


def test_a_stream_follows_it(qa):
    with qa.stream(window_s=2.0) as live:
        for number in range(4):
            live.add(np.full((112, 168, 3), 40 * number, np.uint8), number / 2)
        assert live.ask(QUESTION, schema=SHOWN).parsed["colour"] in COLOURS


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


@pytest.mark.parametrize(("family", "engine"), ENGINES)
@pytest.mark.parametrize("graph", [False, True])
def test_every_way_to_decode_follows_it(tmp_path, monkeypatch, family, engine, graph):
    loaded = load_model(str(save_tiny(tmp_path, family=family)), dtype="fp32", engine=engine, pack=False)
    if graph:
        made = Graphs()
        monkeypatch.setattr(static, "devices", made)
        monkeypatch.setattr(static, "PLAIN_TOKENS", 1)
        monkeypatch.setattr("evoprune.backend.hosted.is_host", lambda device: True)
    video = VideoQA(loaded, budget=0.5).encode(CLIP, frames=4)
    answers = [video.ask(QUESTION, schema=SHOWN, max_new_tokens=60).parsed for _ in range(2)]
    assert answers[0] == answers[1] and answers[0]["colour"] in COLOURS
    if graph:
        assert made.replayed


def schema_at_random(draw: random.Random, depth: int = 0) -> dict:
    kinds = ["enum", "integer", "boolean", "string", "null"]
    if depth < 2:
        kinds += ["object", "array", "object"]
    kind = draw.choice(kinds)
    if kind == "enum":
        return {"enum": draw.sample(["a", "b c", 'd"e', 3, True, None, "ä"], 2)}
    if kind == "integer":
        return {"type": "integer", "minimum": draw.randint(-50, 0), "maximum": draw.randint(1, 2000)}
    if kind == "string":
        return {"type": "string", "maxLength": draw.randint(1, 5)}
    if kind == "array":
        return {"type": "array", "items": schema_at_random(draw, depth + 1), "maxItems": draw.randint(1, 3)}
    if kind == "object":
        properties = {name: schema_at_random(draw, depth + 1) for name in draw.sample("abcd", draw.randint(1, 3))}
        required = [name for name in properties if draw.random() < 0.7]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    return {"type": kind}


def follows(value, schema: dict) -> bool:
    """Whether a value is valid by a schema of `schema_at_random`."""
    if "enum" in schema:
        return any(type(value) is type(each) and value == each for each in schema["enum"])
    kinds = {"object": dict, "array": list, "integer": int, "boolean": bool, "string": str, "null": type(None)}
    if type(value) is not kinds[schema["type"]]:
        return False
    if isinstance(value, dict):
        known = schema["properties"]
        return {*schema["required"]} <= value.keys() <= known.keys() and all(
            follows(inner, known[name]) for name, inner in value.items()
        )
    if isinstance(value, list):
        return len(value) <= schema["maxItems"] and all(follows(inner, schema["items"]) for inner in value)
    if isinstance(value, str):
        return len(value) <= schema["maxLength"]
    return schema["type"] != "integer" or schema["minimum"] <= value <= schema["maximum"]


@pytest.mark.few(4)
@pytest.mark.parametrize("seed", range(125))
def test_answers_follow_schemas_at_random(video, seed):
    draw = random.Random(seed)
    for number in range(4):
        schema = schema_at_random(draw)
        answer = video.ask(
            QUESTION, schema=schema, max_new_tokens=draw.choice([4, 200]), temperature=float(number), seed=seed
        )
        if answer.text and answer.report.finish_reason == "stop":
            assert follows(json.loads(answer.text), schema)
            assert answer.parsed == json.loads(answer.text)
        else:
            assert answer.report.finish_reason == "length" and answer.parsed is None
