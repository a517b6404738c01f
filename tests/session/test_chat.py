"""Answers in conversations equal transformers' `generate` on the whole conversation, whatever the cache contains."""

from copy import copy
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

import evoprune
from evoprune.errors import UsageError
from evoprune.language import decoder, hosted
from evoprune.model import FAMILIES
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.session.test_video_qa import hugging_faces
from tests.thinking import THINKING
from tests.tiny import save_tiny

CLIP = "samples/square.mp4"
QUESTIONS = ["What happens?", "And then?", " How many red squares are there?\n", "Why?"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Return a tiny model of a family, or the demo model, together with its folder."""

    @cache
    def load(name):
        folder = "demo" if name == "demo" else str(save_tiny(tmp_path_factory.mktemp("models") / name, family=name))
        return load_model(folder, dtype="fp32", pack=False), folder

    return load


@pytest.fixture
def tiny(models):
    return models("qwen2_5_vl")[0]


def said(chat, question, **options):
    answer = chat.ask(question, max_new_tokens=6, **options)
    assert answer.text is not None
    return answer.ids


def messages(*turns):
    roles = [role for turn in turns for role in zip(("user", "assistant"), turn, strict=True)]
    return [{"role": role, "content": text} for role, text in roles]


def conversation(loaded, folder, paths, chat, question, **limits):
    """Return the processor's inputs for a conversation, for templates that contain only roles and texts."""
    asked = [each["content"] for each in chat if each["role"] == "user"]
    inputs = evoprune.processor_inputs(folder, paths, [*asked, question][0], **limits)
    if not chat:
        return inputs
    backend, start = loaded.tokenizer.backend, loaded.tokenizer.specials()["<|im_start|>"]
    ids = inputs["input_ids"][0]
    ids = ids[: int((ids == start).nonzero()[-1])]
    texts = [*chat[1:], {"role": "user", "content": question}]
    text = "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in texts)
    backend.encode_special_tokens = False
    more = backend.encode(f"{text}<|im_start|>assistant\n", add_special_tokens=False).ids
    backend.encode_special_tokens = True
    inputs["input_ids"] = torch.cat([ids, torch.tensor(more)])[None]
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    kinds = torch.zeros_like(inputs["input_ids"])
    kinds[:, : len(ids)] = inputs["mm_token_type_ids"][:, : len(ids)]
    inputs["mm_token_type_ids"] = kinds
    return inputs


@pytest.mark.few(2)
@pytest.mark.parametrize("inputs", ["one", "several"])
@pytest.mark.parametrize("model", [*FAMILIES, "demo"])
def test_a_conversation_at_full_budget_is_hugging_faces_generate(models, model, inputs, tmp_path):
    from PIL import Image

    loaded, folder = models(model)
    paths, limits = [CLIP], {"max_visual_tokens": 4096}
    if inputs == "several":
        picture = np.random.default_rng(0).integers(0, 255, (90, 60, 3), dtype=np.uint8)
        Image.fromarray(picture).save(tmp_path / "noise.png")
        paths = [str(tmp_path / "noise.png"), CLIP]
    chat = VideoQA(loaded, budget=1.0).encode(paths, **limits).chat()
    for turn, question in enumerate(QUESTIONS):
        expected = hugging_faces(loaded, conversation(loaded, folder, paths, chat.messages, question, **limits), 6)
        assert said(chat, question) == expected
        assert len(chat.messages) == 2 * turn + 2 and chat.messages[-2] == {"role": "user", "content": question}


@pytest.mark.few(3)
@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_5", "qwen3_vl_moe", "qwen4_exp"])
@pytest.mark.parametrize("budget", [1.0, 0.3])
def test_an_answer_depends_on_nothing_but_what_was_said(models, model, budget):
    """Earlier conversations, single questions, interrupted answers and retracted turns do not affect an answer."""
    qa = VideoQA(models(model)[0], budget=budget)
    video = qa.encode(CLIP)
    chat, other = video.chat(), video.chat("Be brief.")
    for question in QUESTIONS:
        said(other, question[::-1])
        next(chat.ask("Is this one read to its end?", max_new_tokens=40), None)
        before = chat.messages
        fresh = said(qa.encode(CLIP).chat(messages=before), question)
        assert said(chat, question) == fresh
        video.ask(question, max_new_tokens=3).text  # noqa: B018 (generates it)
        assert chat.undo() == question and chat.messages == before
        assert said(chat, question) == fresh
    chat.clear()
    assert chat.messages == [] and chat.undo() is None
    assert said(chat, QUESTIONS[0]) == said(qa.encode(CLIP).chat(), QUESTIONS[0])
    assert video.ask(QUESTIONS[1], max_new_tokens=6).text == qa.encode(CLIP).ask(QUESTIONS[1], max_new_tokens=6).text


@pytest.mark.parametrize("model", ["qwen2_5_vl", "qwen3_5"])
def test_what_was_read_is_not_read_again(models, model, monkeypatch):
    qa = VideoQA(models(model)[0], budget=1.0)
    chat, passes = qa.encode(CLIP).chat(), []
    module = decoder if model == "qwen2_5_vl" else hosted

    def count(*args, **kwargs):
        passes.append(len(args[1]))
        return forward(*args, **kwargs)

    forward = module.forward
    monkeypatch.setattr(module, "forward", count)
    prompts = []
    for question in QUESTIONS:
        passes.clear()
        answer = chat.ask(question, max_new_tokens=6)
        assert answer.text is not None
        read = sum(passes) - (len(answer.ids) - 1)
        if prompts:  # at most the previous answer and the new question
            assert read < 6 + 40 and read < answer.report.tokens.prompt - prompts[-1] + 20
        prompts.append(answer.report.tokens.prompt)


def test_the_oldest_turns_go_where_the_context_is_full(tiny, monkeypatch):
    qa = VideoQA(tiny, budget=1.0)
    chat = qa.encode(CLIP, frames=4).chat()
    alone = chat.ask("And now?", max_new_tokens=6)
    assert alone.text is not None and alone.report.conversation == {"turns": 0, "dropped": 0}
    chat.clear()
    room = alone.report.tokens.prompt + 6 + 70
    text = replace(tiny.model.config.text_config, max_position_embeddings=room)
    monkeypatch.setattr(tiny.model, "config", replace(tiny.model.config, text_config=text))
    turns = 0
    for number in range(9):
        answer = chat.ask(f"And now, {number}?", max_new_tokens=6)
        kept = answer.report.conversation
        assert kept["turns"] + kept["dropped"] == turns
        assert ("history_cut" in answer.report.warnings) == bool(kept["dropped"])
        assert answer.text is not None and answer.report.tokens.prompt + 6 <= room
        turns = kept["turns"] + 1
        assert len(chat.messages) == 2 * turns and chat.messages[-2]["content"] == f"And now, {number}?"
    assert turns < 9
    before = chat.messages
    with pytest.raises(UsageError, match="do not fit"):
        chat.ask("And now? " * 99)
    assert chat.messages == before


def test_what_is_no_complete_answer_is_not_remembered(tiny):
    video = VideoQA(tiny).encode(CLIP)
    chat = video.chat()
    closed = chat.ask("What happens?", max_new_tokens=9, temperature=1.0)
    next(closed)
    closed.close()
    assert closed.report.finish_reason == "interrupt" and chat.messages == []
    first = chat.ask("What happens?", max_new_tokens=9, temperature=1.0)
    second = chat.ask("And then?", max_new_tokens=9)
    assert second.text is not None
    with pytest.raises(UsageError, match="another question"):
        first.text  # noqa: B018 (generates it)
    assert chat.messages == messages(("And then?", second.text))


def test_thoughts_are_not_remembered(tmp_path):
    folder = save_tiny(tmp_path / "model", family="qwen3_5")
    (folder / "chat_template.jinja").write_text(THINKING["unless off"])
    chat = VideoQA.load(str(folder), dtype="fp32").encode(CLIP, frames=4).chat()
    cut = chat.ask("What happens?", think="on", max_new_tokens=3)
    assert cut.text == "" and cut.thoughts and chat.messages == []
    answer = chat.ask("What happens?", max_new_tokens=3)
    assert answer.text and chat.messages == messages(("What happens?", answer.text))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("What?", "not a list"),
        ([{"role": "user", "content": "What?"}], "is a question"),
        ([{"role": "assistant", "content": "What?"}], "not 'user'"),
        ([{"role": "user", "content": " "}], "not a string"),
        ([{"role": "user", "content": ["What?"]}], "not a string"),
        ([{"role": "system", "content": "Be brief."}], "is a system prompt"),
        ([{"role": "user"}], "not a dict with role and content"),
        (["What?"], "not a dict with role and content"),
    ],
)
def test_messages_that_are_none(tiny, given, said):
    with pytest.raises(UsageError, match=said):
        VideoQA(tiny).encode(CLIP, frames=4).chat(messages=given)


def test_what_a_conversation_does_not_take(tiny):
    reads = VideoQA(tiny, method="cdpruner").encode(CLIP, frames=4)
    with pytest.raises(UsageError, match="prunes for a single question"):
        reads.chat()
    chat = VideoQA(tiny).encode(CLIP, frames=4).chat("Be brief.")
    with pytest.raises(UsageError, match="one system prompt"):
        chat.ask("What happens?", system="Be long.")
    assert said(chat, "What happens?", system="Be brief.")
    with pytest.raises(TypeError, match="pickled"):
        copy(chat)


def test_a_live_stream_remembers(tiny):
    qa, frames = VideoQA(tiny), np.random.default_rng(0).integers(0, 255, (12, 56, 56, 3), dtype=np.uint8)
    with qa.stream(fps=2, window_s=2.0) as stream:
        for number, frame in enumerate(frames):
            stream.add(frame, number / 2)
        chat = stream.chat()
        first = said(chat, "What happens?")
        assert said(stream.chat(), "What happens?") == first
        later = said(chat, "And then?")
        assert said(stream.chat(messages=chat.messages[:2]), "And then?") == later


def test_the_demo_model_is_said_to_know_single_questions():
    chat = VideoQA.load("demo").encode(CLIP).chat()
    first, second = (chat.ask("What colour is the square?") for _ in range(2))
    assert "demo_history" not in first.report.warnings + second.report.warnings
    assert second.text == chat.messages[1]["content"]
    assert "demo_history" in chat.ask("What digit is it?").report.warnings
