"""If a model thinks before it answers, its thoughts stay separate, no matter how the answer is read."""

from dataclasses import replace

import pytest

from evoprune.bench import Reference
from evoprune.errors import UsageError
from evoprune.report import warning_text
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.thinking import Saying, thinking_tokenizer

CLIP, QUESTION = "samples/square.mp4", "What happens?"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


@pytest.fixture
def qa(loaded, request):
    """Return a model with the requested kind of template. Its tokenizer has no special tokens for thoughts."""
    kind = getattr(request, "param", "unless off")
    return VideoQA(replace(loaded, tokenizer=thinking_tokenizer(kind, special=None)), budget=0.5)


@pytest.fixture
def video(qa):
    return qa.encode(CLIP, frames=2)


@pytest.fixture
def says(monkeypatch, qa):
    def what(text: str) -> None:
        monkeypatch.setattr("evoprune.language.answer.TokenStream", Saying(qa.session.loaded.tokenizer, text))

    return what


def test_thoughts_are_not_the_answer(video, says):
    says("It turns.\n\nOr not?\n</think>\n\nIt turns left.")
    told = []
    answer = video.ask(QUESTION, think="on", max_new_tokens=200, on_thoughts=told.append)
    assert answer.thoughts is None and not told
    assert "".join(answer) == answer.text == "It turns left." == answer.report.answer
    assert answer.thoughts == "It turns.\n\nOr not?" == "".join(told).strip() and len(told) > 1
    report = answer.report
    assert report.tokens.new == len(answer.ids) > len(answer.text) / 4 and report.finish_reason == "stop"
    assert report.generation["think"] == "on" and not {"thoughts_cut", "thoughts_only", "answer_cut"} & {
        *report.warnings
    }


def test_one_question_at_once_is_the_same(qa, says):
    says("Hm.\n</think>\n\nLeft.")
    told = []
    answer = qa.ask(CLIP, QUESTION, think="on", max_new_tokens=200, on_thoughts=told.append)
    assert answer.text == "Left." and "".join(told).strip() == answer.thoughts == "Hm."


def test_a_question_asked_in_on_thoughts_ends_the_answer_with_an_error(video, says):
    says("It turns.\n</think>\n\nLeft.")
    answer = video.ask(QUESTION, think="on", max_new_tokens=200, on_thoughts=lambda piece: str(video.ask("Red?")))
    with pytest.raises(UsageError, match="another question was asked meanwhile"):
        str(answer)


def test_they_are_off_unless_asked_for(video, says):
    says("It turns left.")
    answer = video.ask(QUESTION, max_new_tokens=200)
    assert answer.text == "It turns left." and answer.thoughts is None and answer.report.generation["think"] == "off"
    with pytest.raises(UsageError, match="think is 'maybe'"):
        video.ask(QUESTION, think="maybe")


def test_an_answer_that_is_cut_inside_thoughts(video, says):
    says("It turns, I would say")
    answer = video.ask(QUESTION, think="on", max_new_tokens=5)
    assert answer.text == "" and answer.thoughts and answer.report.finish_reason == "length"
    assert "thoughts_cut" in answer.report.warnings and "answer_cut" not in answer.report.warnings
    assert "still thinking" in warning_text("thoughts_cut", answer.report.video)
    says("Hm.</think>It turns, I would say")
    answer = video.ask(QUESTION, think="on", max_new_tokens=16)
    assert answer.text and "answer_cut" in answer.report.warnings and "thoughts_cut" not in answer.report.warnings


def test_thoughts_that_are_cut_before_their_first_word(video, says):
    says("\n\nIt turns, I would say")
    told = []
    answer = video.ask(QUESTION, think="on", max_new_tokens=1, on_thoughts=told.append)
    assert answer.text == "" and answer.thoughts is None and not told
    assert "thoughts_cut" in answer.report.warnings and "answer_cut" not in answer.report.warnings


def test_a_model_that_ends_inside_its_thoughts_says_so(video, says):
    says("It turns, I would say.")
    answer = video.ask(QUESTION, think="on", max_new_tokens=200)
    assert answer.text == "" and answer.thoughts and answer.report.finish_reason == "stop"
    assert "thoughts_only" in answer.report.warnings and "thoughts_cut" not in answer.report.warnings


@pytest.mark.parametrize("qa", ["always"], indirect=True)
def test_a_model_that_always_thinks_says_so(video, says):
    for think in ("off", "on"):
        says("Hm.\n</think>\n\nLeft.")
        answer = video.ask(QUESTION, think=think, max_new_tokens=200)
        # Known before generation starts.
        assert (answer.report.warnings.count("always_thinks") == 1) is (think == "off")
        assert answer.text == "Left." and answer.thoughts == "Hm."


@pytest.mark.parametrize("qa", ["none"], indirect=True)
def test_a_model_that_cannot_think_is_not_asked_to(video):
    with pytest.raises(UsageError, match="does not support thinking"):
        str(video.ask(QUESTION, think="on"))
    assert "always_thinks" not in video.ask(QUESTION).report.warnings


def test_a_prompt_that_thinks_is_another_prompt(video):
    """It has neither keys and values nor distributions in common with the prompt that does not think."""
    off, on = (video.read_along(QUESTION, [5, 6], None, think)[0] for think in ("off", "on"))
    again, _ = video.read_along(QUESTION, [5, 6])
    assert not off.equal(on) and again.equal(off)
    ids = [7, 8, 9]
    given = Reference.of(video, QUESTION, ids, ended=False, think="on")
    assert given.agreement(video).agrees.all()
    assert not given.agreement(video).kl.abs().max() > 1e-4
    assert replace(given, think="off").agreement(video).kl.max() > 1e-4
