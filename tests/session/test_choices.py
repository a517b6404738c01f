"""For every kind of model, the probabilities of choices agree with those from reading them token by token."""

import json
from functools import cache

import pytest
import torch

from evoprune.errors import ModelError, UsageError
from evoprune.language import GenerationOptions
from evoprune.language.settings import listed_choices
from evoprune.report import Report
from evoprune.session.loading.model import load_model
from evoprune.statistics import stats_block
from evoprune.video_qa import VideoQA
from tests.loading import edit
from tests.tiny import save_tiny

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
# Two that begin alike, one that continues after another's end, and one with nothing in common with them.
CHOICES = ["the green square", "the green square moves", "the red one", "nothing"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @cache
    def load(name, **options):
        folder = "demo" if name == "demo" else str(save_tiny(tmp_path_factory.mktemp("models") / name, family=name))
        return load_model(folder, dtype="fp32", pack=False, **options)

    return load


def logprob(video, loaded, question, text):
    """Read a text and an end token in a separate pass, and return their log probability and number of tokens."""
    ends = list(loaded.eos_ids)
    ids = [*loaded.tokenizer.encode(text), ends[0]]
    logits, _ = video.read_along(question, ids)
    rows = logits.double().log_softmax(1)
    tokens = sum(float(row[token]) for row, token in zip(rows[:-1], ids[:-1], strict=True))
    return tokens + float(rows[-1, ends].logsumexp(0)), len(ids)


@pytest.mark.few(4)
@pytest.mark.parametrize("score", ["sum", "mean"])
@pytest.mark.parametrize("model", ["demo", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "qwen3_vl_moe", "qwen4_exp"])
def test_probabilities_are_those_of_the_tokens(loaded, model, score):
    video = VideoQA(loaded(model), budget=0.5).encode(CLIP, frames=4)
    expected = [logprob(video, loaded(model), QUESTION, text) for text in CHOICES]
    before = video.ask(QUESTION, max_new_tokens=6).ids
    answer = video.ask(QUESTION, choices=CHOICES, choice_score=score)
    assert [each["text"] for each in answer.choices] == CHOICES
    assert [each["tokens"] for each in answer.choices] == [count for _, count in expected]
    assert [each["logprob"] for each in answer.choices] == pytest.approx([value for value, _ in expected], abs=1e-3)
    scores = torch.tensor([value / count if score == "mean" else value for value, count in expected])
    assert [each["probability"] for each in answer.choices] == pytest.approx(scores.softmax(0).tolist(), abs=1e-3)
    assert answer.text == CHOICES[int(scores.argmax())]
    assert answer.ids == loaded(model).tokenizer.encode(answer.text)
    assert video.ask(QUESTION, max_new_tokens=6).ids == before  # scoring leaves nothing in the cache


@pytest.fixture(scope="module")
def probabilities(tmp_path_factory):
    """A function that returns the probabilities of choices of a model with the given end tokens."""
    folder = save_tiny(tmp_path_factory.mktemp("models") / "ends")
    tokenizer = folder / "tokenizer_config.json"

    def score(ends, **options):
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        edit(folder / "config.json", eos_token_id=None, text_config=text | {"eos_token_id": None})
        edit(tokenizer, eos_token=None)
        video = VideoQA(load_model(str(folder), dtype="fp32", pack=False)).encode(CLIP, frames=4)
        return [each["probability"] for each in video.ask(QUESTION, choices=CHOICES, **options).choices]

    text = json.loads((folder / "config.json").read_text())["text_config"]
    return score


@pytest.mark.parametrize("score", ["sum", "mean"])
def test_repeated_end_tokens_change_no_probability(probabilities, score):
    once, often = (probabilities(ends, choice_score=score) for ends in ([7, 8], [7] * 6 + [8]))
    assert often == pytest.approx(once)


def test_a_model_without_end_tokens_chooses(probabilities):
    assert sum(probabilities([])) == pytest.approx(1)


def test_choices_with_the_same_beginning_are_read_together(loaded, monkeypatch):
    from evoprune.language import PrefillState

    read = []
    reading = PrefillState.read
    monkeypatch.setattr(PrefillState, "read", lambda state, ids: (read.append(len(ids)), reading(state, ids))[1])
    tokenizer = loaded("qwen2_5_vl").tokenizer
    first, second = map(tokenizer.encode, CHOICES[:2])
    assert second[: len(first)] == first
    video = VideoQA(loaded("qwen2_5_vl")).encode(CLIP, frames=4)
    assert video.ask(QUESTION, choices=CHOICES[:2]).choices
    assert read == [len(first), len(second) - len(first)]


def test_tokens_that_leave_inside_the_model_do_not_matter(loaded):
    qa = VideoQA(loaded("qwen2_5_vl"), method="evoprune+fastv", budget=0.3)
    video = qa.encode(CLIP, frames=4)
    expected = [logprob(video, qa.loaded, QUESTION, text)[0] for text in CHOICES]
    answer = video.ask(QUESTION, choices=CHOICES)
    assert [each["logprob"] for each in answer.choices] == pytest.approx(expected, abs=1e-3)


def test_a_record_and_the_stats_have_them(loaded):
    video = VideoQA(loaded("demo"), budget=0.5).encode(CLIP, frames=4)
    answer = video.ask(QUESTION, choices=("red", "green", "blue"))
    assert answer.text == "green"
    report = answer.report
    assert (report.answer, report.finish_reason, report.tokens.new) == ("green", "stop", 1)
    assert report.generation["choices"] == ["red", "green", "blue"] and report.generation["choice_score"] == "sum"
    assert sum(each["probability"] for each in report.choices) == pytest.approx(1)
    assert Report.from_json(report.to_json()).choices == json.loads(report.to_json())["choices"]
    (line,) = [line for line in stats_block(report) if line.startswith("choices")]
    assert line.split()[1] == "green"
    plain = video.ask(QUESTION)
    assert plain.choices is None and "choice_score" not in plain.report.generation


def test_a_stream_chooses(loaded):
    import numpy as np

    with VideoQA(loaded("demo"), budget=0.5).stream(window_s=2.0) as live:
        for number in range(4):
            live.add(np.full((112, 168, 3), 40 * number, np.uint8), number / 2)
        answer = live.ask(QUESTION, choices=["red", "green"])
        assert answer.text in ("red", "green") and len(answer.choices) == 2
        assert live.ask(QUESTION, choices=["red", "green"]).choices == answer.choices


@pytest.mark.parametrize(
    "given, said",
    [
        ({"choices": ["red"]}, "choices is"),
        ({"choices": ["red", "red"]}, "choices is"),
        ({"choices": ["red", " "]}, "choices is"),
        ({"choices": "red"}, "choices is 'red'"),
        ({"choices": [1, 2]}, "choices is"),
        ({"choices": 5}, "choices is 5"),
        ({"choices": ["red", "green"], "choice_score": "max"}, "choice_score is 'max'"),
        ({"choice_score": "mean"}, "there are no choices"),
        ({"choices": ["red", "green"], "temperature": 1.0}, "temperature"),
        ({"choices": ["red", "green"], "think": "on"}, "think"),
        ({"choices": ["red", "green"], "stop": "a"}, "stop"),
        ({"choices": ["red", "green"], "logprobs": 1}, "logprobs"),
        ({"choices": ["red", "green"], "regex": "a"}, "regex"),
        ({"choices": "options"}, "works only in batch"),
        ({"choices": ["red", "\ud800"]}, "not valid text"),
        ({"stop": "\ud800"}, "not valid text"),
        ({"choices": ["red", "one two three four"], "max_new_tokens": 2}, "at most 2"),
    ],
)
def test_choices_that_cannot_be_made_are_refused(loaded, given, said):
    video = VideoQA(loaded("demo"), budget=0.5).encode(CLIP, frames=4)
    with pytest.raises(UsageError, match=said):
        video.ask(QUESTION, **given)


def test_a_model_that_always_thinks_cannot_choose(loaded, monkeypatch):
    video = VideoQA(loaded("demo"), budget=0.5).encode(CLIP, frames=4)
    monkeypatch.setattr(loaded("demo").tokenizer, "always_thinks", True)
    with pytest.raises(UsageError, match="thinks before every answer"):
        video.ask(QUESTION, choices=["red", "green"])


def test_logits_that_are_no_numbers_are_an_error(loaded):
    own = load_model("demo", pack=False)
    with torch.no_grad():
        own.model.lm_head.weight[own.tokenizer.encode("green")[0]] = float("nan")
    video = VideoQA(own, budget=0.5).encode(CLIP, frames=4)
    with pytest.raises(ModelError):
        video.ask(QUESTION, choices=["red", "green"]).text  # noqa: B018


def test_what_was_typed_becomes_a_list():
    assert listed_choices(None) is None and listed_choices([]) is None
    assert listed_choices(["red, green", "blue"]) == ["red", "green", "blue"]
    assert listed_choices(["options"]) == "options" and listed_choices(["options,red"]) == ["options", "red"]
    assert GenerationOptions(choices=("a", "b")).choices == ["a", "b"]


def test_stops_count_once():
    assert GenerationOptions(stop=["b", "a"] * 1000).stop == ["b", "a"]
