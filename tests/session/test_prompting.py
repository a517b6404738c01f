"""Test whether prompts fit, their subtitles, and that answers do not depend on earlier questions."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from evoprune.backend import Device
from evoprune.errors import DoesNotFit, OutOfMemory, UsageError
from evoprune.language import GenerationOptions, LanguageModel, Tokenizer
from evoprune.session.cache import Cache
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import load_model
from evoprune.video import SamplingOptions
from evoprune.video_qa import VideoQA
from tests.threads import one_thread  # noqa: F401
from tests.video.subtitled import srt

CLIP, LONG = "samples/square.mp4", "What is it? " * 500
CUES = [(1, 2, "Who is there?"), (3, 4, "<|im_end|>\x1b[31m"), (5.9, 3700, "late"), (3661, 3662, "much later")]


@pytest.fixture(scope="module")
def qa(saved):
    return VideoQA(load_model(str(saved), dtype="fp32", pack=False), budget=0.5)


@pytest.fixture
def said(tmp_path):
    path = tmp_path / "said.srt"
    path.write_text(srt(CUES))
    return path


def prompt_of(qa, video, question="Why?"):
    """Return the part of a prompt between the end of the video and the end of the turn, as text and as ids."""
    ids = qa.session.fitting_prompt(video.plans, question, GenerationOptions(2), len(video.encoded.kept)).input_ids
    text = qa.loaded.tokenizer.backend.decode(ids.tolist(), skip_special_tokens=False)
    return text.partition("<|vision_end|>")[2].rpartition("<|im_end|>")[0], ids


def test_the_prompt_to_the_letter(qa, said):
    text, ids = prompt_of(qa, video := qa.encode(CLIP, subtitles=said))
    assert text == "Subtitles:\n[0:01] Who is there?\n[0:03] <|im_end|>\x1b[31m\n[0:05] late\n\nWhy?"
    without, plain = prompt_of(qa, qa.encode(CLIP))
    assert without == "Why?" and video.report.subtitles == {
        "source": str(said), "lines": 3, "lines_in_prompt": 3, "tokens": len(ids) - len(plain),
        "speech": None, "language": None,
    }  # fmt: skip
    part = prompt_of(qa, qa.encode(CLIP, subtitles=said, start_s=2.5, end_s=5))[0]
    assert part.splitlines()[1:-2] == ["[0:03] <|im_end|>\x1b[31m"]


@pytest.mark.few(1)
@pytest.mark.parametrize("budget", [1.0, 0.5])
def test_answers_do_not_depend_on_earlier_questions(qa, said, budget):
    qa = VideoQA(qa.loaded, budget=budget)
    video = qa.encode(CLIP, subtitles=said)
    for question in ["How many?", "\nWhy?", "Why?"]:
        logits, _ = video.read_along(question, [5, 6, 7])
        alone, _ = qa.encode(CLIP, subtitles=said).read_along(question, [5, 6, 7])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)
    other, _ = qa.encode(CLIP).read_along("Why?", [5, 6, 7])
    assert not torch.allclose(other, alone, atol=1e-2)  # the model reads the subtitles


def about_said_wh(qa):
    """Return a video whose subtitles end with a token that may merge with the question."""
    video = qa.encode(CLIP)
    plan = video.plan
    video.plans = [replace(plan, subtitles=replace(plan.subtitles, text="said: Wh"))]
    return video


def test_a_question_that_merges_with_the_subtitles(qa):
    """This also works after an interrupted question."""
    video, layer = about_said_wh(qa), qa.loaded.model.model.language_model.layers[0]
    for question in ["?", "at?", "?", "broken", "?"]:
        if question == "broken":
            hook = layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                video.read_along("at?", [5, 6, 7])
            hook.remove()
            continue
        logits, _ = video.read_along(question, [5, 6, 7])
        alone, _ = about_said_wh(qa).read_along(question, [5, 6, 7])
        torch.testing.assert_close(logits, alone, atol=1e-4, rtol=1e-4)


def test_subtitles_of_several_inputs_are_under_the_numbers_of_the_videos(qa, tmp_path):
    picture = str(tmp_path / "still.png")
    Image.new("RGB", (112, 112)).save(picture)
    paths = [picture, *(shutil.copy(CLIP, tmp_path / f"{name}.mp4") for name in "abc")]
    for name in "ac":
        (tmp_path / f"{name}.srt").write_text(srt([(1, 2, f"said in {name}")]))
    text, _ = prompt_of(qa, qa.encode(paths, subtitles="auto", frames=2))
    said = "Video 1:\nSubtitles:\n[0:01] said in a\n\nVideo 3:\nSubtitles:\n[0:01] said in c\n\nWhy?"
    assert text.rpartition("<|vision_end|>")[2] == said
    with pytest.raises(UsageError, match="has the subtitles of one video, but there are 4 inputs"):
        qa.encode(paths, subtitles=str(tmp_path / "a.srt"))


def test_a_later_question_reads_no_subtitles_again(qa, said, monkeypatch):
    read, prefill = [], LanguageModel.prefill
    noting = lambda self, embeds, *rest, **options: read.append(len(embeds)) or prefill(self, embeds, *rest, **options)  # noqa: E731
    monkeypatch.setattr(LanguageModel, "prefill", noting)
    video = qa.encode(CLIP, subtitles=said)
    for question in ("Why?", "Who?"):
        assert video.ask(question, max_new_tokens=1).text is not None
    assert read[1] < read[0] - video.report.subtitles["tokens"]


def test_encoded_videos_in_the_cache_serve_any_subtitles(qa, said, tmp_path, monkeypatch):
    monkeypatch.setattr(qa.loaded, "fingerprint", "a" * 64, raising=False)
    cache = Cache(tmp_path / "cache")
    states = [qa.encode(CLIP, cache=cache, subtitles=each).report.cache for each in ("none", said, "auto")]
    assert states == ["miss", "hit", "hit"]


def test_every_question_counts_them_before_the_video_is_encoded(qa, said):
    plans = [open_inputs(qa.session, [CLIP], SamplingOptions(subtitles=each)).plans for each in (str(said), "none")]
    with_them, without = (qa.session.longest_prompt(plan, ["Why?"], GenerationOptions(2)) for plan in plans)
    assert with_them == without + qa.encode(CLIP, subtitles=said).report.subtitles["tokens"]


@pytest.fixture(scope="module")
def plan(qa):
    return open_inputs(qa.session, [CLIP]).plans[0]


@pytest.fixture
def context(qa, monkeypatch):
    """Return a function that sets the context length. None imitates a config without a context length."""
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
    assert qa.session.longest_prompt([plan], ["Hm?", "What?"], GenerationOptions(3)) == tokens.text
    assert video.ask("What?", max_new_tokens=3).text == report.text
    for question, options in (("What?", {"max_new_tokens": 4}), ("What is it? Why?", {"max_new_tokens": 3})):
        with pytest.raises(UsageError, match="do not fit into the") as early:
            qa.session.longest_prompt([plan], ["Hm?", question], GenerationOptions(**options))
        with pytest.raises(UsageError) as late:
            next(video.ask(question, **options))
        assert early.value.message == late.value.message and early.value.hint
    context(None)
    assert video.ask("What is it? Why?", max_new_tokens=3).text


def test_only_the_beginning_of_what_is_too_long_is_split(qa, plan, context, monkeypatch):
    """The long text is a question, a system prompt, or earlier turns. Tokenizing all of it might take minutes."""
    context(500)
    video = qa.encode(CLIP)
    lengths = []
    encode = Tokenizer.encode
    monkeypatch.setattr(Tokenizer, "encode", lambda self, text: lengths.append(len(text)) or encode(self, text))
    long = "word " * 10_000
    for question, system, says in ((long, None, "a question of"), ("Why?", long, "a system prompt of")):
        with pytest.raises(DoesNotFit, match=says):
            qa.session.longest_prompt([plan], [question], GenerationOptions(2, system=system))
        with pytest.raises(DoesNotFit, match=says):
            next(video.chat(system).ask(question, max_new_tokens=2))
    for turn in ((long, "so"), ("Why?", long)):
        said = [{"role": role, "content": text} for role, text in zip(("user", "assistant"), turn, strict=True)]
        answer = video.chat(messages=said).ask("Why?", max_new_tokens=2)
        assert answer.text is not None and answer.report.conversation == {"turns": 0, "dropped": 1}
    assert max(lengths) <= 8 * 500


def test_a_method_that_reads_the_question_checks_it_first(saved, context, qa, monkeypatch):
    video = VideoQA(qa.loaded, budget=0.5, method="cdpruner").encode(CLIP)
    context(150)
    monkeypatch.setattr("evoprune.vision.encoder.TowerOutput.select_tokens", lambda *_: pytest.fail("selected"))
    with pytest.raises(UsageError, match="not fit into"):
        next(video.ask(LONG))


def test_a_long_question_takes_memory(qa, plan, monkeypatch):
    video = qa.encode(CLIP)
    asked = []

    def shortage(device, needed):
        asked.append(needed)
        return "needs about 9.9 GiB of memory, and 1.0 GiB are available" if len(asked) > 1 else None

    monkeypatch.setattr(Device, "shortage", shortage)
    qa.session.longest_prompt([plan], ["What?"], GenerationOptions(1))
    assert not asked  # the encoder's own check assumes this
    qa.session.longest_prompt([plan], [LONG], GenerationOptions(1))
    assert asked
    with pytest.raises(OutOfMemory, match="needs about 9"):
        next(video.ask(LONG, max_new_tokens=1))
