"""Test where an answer stops and the probabilities of its tokens, both in Python and on the command line."""

import json

import pytest

from evoprune.errors import UsageError
from evoprune.language import GenerationOptions
from evoprune.report import Report
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.thinking import Saying

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture(scope="module")
def qa():
    return VideoQA(load_model("demo"), budget=0.5)


@pytest.fixture(scope="module")
def video(qa):
    return qa.encode(CLIP, frames=4)


def test_an_answer_stops_before_a_text_that_spans_tokens(video):
    whole = video.ask("What happens?", max_new_tokens=12)
    text = whole.text
    assert whole.report.stop_reason is None and len(whole.ids) == 12
    middle = len(text) // 2
    stop = text[middle : middle + 6]
    answer = video.ask("What happens?", max_new_tokens=12, stop=["never said", stop])
    pieces = list(answer)
    assert "".join(pieces) == answer.text == text[: text.index(stop)]
    report = answer.report
    assert (report.finish_reason, report.stop_reason, report.warnings.count("answer_cut")) == ("stop", stop, 0)
    assert answer.ids == whole.ids[: len(answer.ids)] and report.tokens.new == len(answer.ids)
    assert report.generation["stop"] == ["never said", stop]
    assert Report.from_json(report.to_json()).stop_reason == stop


def test_one_text_is_a_list_of_one():
    assert GenerationOptions(stop="a") == GenerationOptions(stop=("a",)) == GenerationOptions(stop=["a"])
    assert GenerationOptions(stop=[]).stop is None


def test_thoughts_may_have_the_text_and_an_answer_may_begin_with_it(qa, video, monkeypatch):
    monkeypatch.setattr(
        "evoprune.language.answer.TokenStream", Saying(qa.loaded.tokenizer, "Hm. So.</think>So. It is.")
    )
    monkeypatch.setattr("evoprune.language.answer.opens_thoughts", lambda prompt: True)
    answer = video.ask(QUESTION, stop="So.")
    assert (answer.text, answer.thoughts, answer.report.stop_reason) == ("", "Hm. So.", "So.")
    assert "thoughts_only" not in answer.report.warnings


def test_every_token_has_its_log_probability(video):
    assert video.ask(QUESTION).logprobs is None
    answer = video.ask(QUESTION, logprobs=2)
    assert answer.text == video.ask(QUESTION).text
    assert [each["id"] for each in answer.logprobs] == answer.ids
    assert "".join(each["token"] for each in answer.logprobs).strip() == answer.text
    for each in answer.logprobs:
        top = each["top_logprobs"]
        assert top[0] == {name: each[name] for name in ("id", "token", "logprob", "bytes")}  # greedy
        assert len(top) == 2 and 0 >= top[0]["logprob"] >= top[1]["logprob"]
    chosen = video.ask(QUESTION, logprobs=0)
    assert chosen.logprobs == [] and chosen.text
    assert [each["top_logprobs"] for each in chosen.logprobs] == [[]] * len(chosen.ids)
    assert len(json.loads(answer.report.to_json())["logprobs"]) == len(answer.ids)


def test_a_stream_has_both(qa):
    import numpy as np

    with qa.stream(window_s=2.0) as live:
        for number in range(4):
            live.add(np.full((112, 168, 3), 40 * number, np.uint8), number / 2)
        whole = live.ask(QUESTION, max_new_tokens=6)
        stop = whole.text[1:3]
        answer = live.ask(QUESTION, max_new_tokens=6, stop=stop, logprobs=0)
        assert answer.text == whole.text[: whole.text.index(stop)]
        assert len(answer.logprobs) == len(answer.ids)


def test_a_bad_option_is_refused_before_anything_is_read(qa):
    with pytest.raises(UsageError, match="logprobs is 30"):
        qa.ask("gone.mp4", QUESTION, logprobs=30)
