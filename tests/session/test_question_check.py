from dataclasses import replace

import pytest

from evoprune.errors import OutOfMemory, UsageError
from evoprune.session import planning, prompting
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import load_model
from evoprune.session.options import GenerationOptions
from evoprune.session.planning import estimate_first_token
from evoprune.session.prompting import longest_prompt
from evoprune.video_qa import VideoQA
from tests.threads import one_thread  # noqa: F401

CLIP, LONG = "samples/square.mp4", "What is it? " * 500


@pytest.fixture(scope="module")
def qa(saved):
    return VideoQA(load_model(str(saved), dtype="fp32", pack=False), budget=0.5)


@pytest.fixture(scope="module")
def plan(qa):
    return open_inputs(qa.engine, [CLIP]).plans[0]


@pytest.fixture
def context(qa, monkeypatch):
    """Sets the length of the model's context; None for one that its config does not state."""
    config = qa.loaded.model.config

    def set_to(length):
        text = replace(config.text_config, max_position_embeddings=length)
        monkeypatch.setattr(qa.loaded.model, "config", replace(config, text_config=text))

    return set_to


def test_prompt_and_answer_fill_the_context_to_the_last_token(qa, plan, context):
    video = qa.encode(CLIP)
    report = video.ask("What?", max_new_tokens=3)
    report.text  # noqa: B018 (generates it)
    tokens = report.report.tokens
    context(tokens.prompt + 3)
    assert longest_prompt(qa.engine, [plan], ["Hm?", "What?"], GenerationOptions(3)) == tokens.text
    assert video.ask("What?", max_new_tokens=3).text == report.text
    for question, options in (("What?", {"max_new_tokens": 4}), ("What is it? Why?", {"max_new_tokens": 3})):
        with pytest.raises(UsageError, match="do not fit into the") as early:
            longest_prompt(qa.engine, [plan], ["Hm?", question], GenerationOptions(**options))
        with pytest.raises(UsageError) as late:
            next(video.ask(question, **options))
        assert early.value.message == late.value.message and early.value.hint
    context(None)
    assert video.ask("What is it? Why?", max_new_tokens=3).text


def test_a_method_that_reads_the_question_checks_it_first(saved, context, qa, monkeypatch):
    video = VideoQA(qa.loaded, budget=0.5, method="cdpruner").encode(CLIP)
    context(150)
    monkeypatch.setattr("evoprune.session.encoding.select_tokens", lambda *_: pytest.fail("selected"))
    with pytest.raises(UsageError, match="not fit into"):
        next(video.ask(LONG))


def test_a_long_question_takes_time(qa, plan, monkeypatch):
    monkeypatch.setattr("evoprune.model.cost.matmul_rate", lambda *_: 1e9)
    text = longest_prompt(qa.engine, [plan], [LONG], GenerationOptions(1))
    assert text > 500
    assert estimate_first_token(qa.engine, plan, text) > 1.2 * estimate_first_token(qa.engine, plan)


def test_a_long_question_takes_memory(qa, plan, monkeypatch):
    video = qa.encode(CLIP)
    asked = []

    def shortage(needed, device):
        asked.append(needed)
        return "needs about 9.9 GiB of memory, and 1.0 GiB are available" if len(asked) > 1 else None

    for module in (planning, prompting):
        monkeypatch.setattr(module, "shortage", shortage)
    longest_prompt(qa.engine, [plan], ["What?"], GenerationOptions(1))
    assert not asked  # what the encoder's own check assumes
    longest_prompt(qa.engine, [plan], [LONG], GenerationOptions(1))
    assert asked
    with pytest.raises(OutOfMemory, match="needs about 9"):
        next(video.ask(LONG, max_new_tokens=1))
