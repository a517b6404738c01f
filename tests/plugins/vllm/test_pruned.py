"""vLLM with evoprune's encoder on a server that prunes answers like `VideoQA` with the same settings."""

import numpy as np
import pytest
import torch
from PIL import Image

from evoprune.backend.cpu.linear import PackedLinear
from evoprune.model import Tower
from tests.plugins.vllm.serving import (
    NEW,
    PROMPT,
    VIDEO,
    Asked,
    answers,
    farthest,
    outputs,
    pruning,
    same,
    samples,
)

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def llm(start):
    return start(**pruning(0.75))


@pytest.fixture(scope="module")
def quarter():
    return samples(budget=0.25)


def test_it_answers_as_video_qa_does(llm, quarter):
    found = outputs(llm, [asked.request() for asked in quarter])
    assert same([output.outputs[0].text for output in found], quarter)
    video = llm.llm_engine.model_config.hf_config.video_token_id
    for output, asked in zip(found, quarter, strict=True):
        frames, height, width, _ = asked.media[0].frames.shape
        units = frames // 2 * (height // 28) * (width // 28)
        assert output.prompt_token_ids.count(video) == int(0.25 * units + 0.5)


def test_the_default_selects_the_tokens_of_video_qa(llm, monkeypatch):
    """evoprune first selects rows inside the tower, and then selects tokens among them."""
    from evoprune_vllm import model

    found, encoded = [], model.encoded
    monkeypatch.setattr(model, "encoded", lambda *args: found.append(encoded(*args)) or found[-1])
    asked = [each for each in samples(budget=0.05) if each.question == "Describe the video."]
    answers(llm, [each.request(0.05) for each in asked], together=False)
    for mine, each in zip(found, asked, strict=True):
        right = each.encoded.encoded
        rows = [count for _, count in mine.layers]
        assert mine.layers == right.layers and rows[0] > rows[-1] > len(mine.kept)
        assert torch.equal(mine.kept, right.kept) and torch.equal(mine.size, right.size)


def test_the_tower_is_in_memory_once_and_packed(llm):
    from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VisionTransformer

    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    kinds = [type(module) for module in runner.model.modules()]
    assert kinds.count(Tower) == 1 and Qwen2_5_VisionTransformer not in kinds
    packed = [module for module in runner.model.visual.modules() if isinstance(module, PackedLinear)]
    assert packed and all(module.nbytes and not module.waits for module in packed)
    assert not any(type(module) is torch.nn.Linear for module in runner.model.visual.modules())


def test_text_pictures_and_a_single_frame(llm, quarter):
    clip = quarter[0].media[0]
    short = type(clip)(np.ascontiguousarray(clip.frames[:1]), 1.0)
    media = (Image.fromarray(clip.frames[0]),), (short,)
    asked = [Asked((), "Who are you?"), *(Asked(each, "What colour is the square?") for each in media)]
    assert [said.strip() for said in answers(llm, [each.request() for each in asked])][1:] == ["green"] * 2


def test_log_probabilities_are_those_of_video_qa(llm, quarter):
    """They depend on the tokens' positions and weights."""
    assert farthest(llm, quarter) < 1e-3
    assert farthest(llm, samples(budget=0.1), 0.1) < 1e-3
    assert farthest(llm, samples(budget=1.0), 1.0) < 1e-3
    assert farthest(llm, samples(budget=0.1, method="evoprune:count=0"), 0.1) > 0.1


@pytest.mark.parametrize(("fps", "budget"), [(1.5, None), (3.0, None), (4.0, None), (2.0, 0.1), (2.0, 0.5), (2.0, 1.0)])
def test_frame_rates_and_budgets_of_requests(llm, fps, budget):
    asked = samples(fps, names=("three.mp4", "vanish.webm", "pan.mp4"), budget=budget or 0.25)
    assert same(answers(llm, [each.request(budget) for each in asked]), asked)


def test_requests_with_other_budgets_side_by_side(llm, quarter):
    tenth = samples(budget=0.1)
    both = [request for a, b in zip(quarter, tenth, strict=True) for request in (a.request(), b.request(0.1))]
    found = answers(llm, both)
    assert same(found[::2], quarter) and same(found[1::2], tenth)


def test_a_request_alone_and_a_prefix_that_is_in_the_cache_change_no_answer(llm, quarter):
    llm.reset_prefix_cache()
    assert same(answers(llm, [asked.request() for asked in quarter], together=False), quarter)
    again = outputs(llm, [asked.request() for asked in quarter])
    assert same([output.outputs[0].text for output in again], quarter)
    assert all(output.num_cached_tokens >= 32 for output in again)


@pytest.mark.parametrize("budget", [0, 1.5, "auto", None])
def test_a_bad_budget_of_a_request_is_an_error_of_this_request(llm, quarter, budget):
    with pytest.raises(ValueError, match=r"not a share of tokens|does not work here"):
        answers(llm, [quarter[0].request() | {"mm_processor_kwargs": {"evoprune_budget": budget}}])
    assert same(answers(llm, [quarter[0].request()]), quarter[:1])


def test_what_has_no_positions_is_an_error(llm, quarter):
    clip, asked = quarter[0].media[0], quarter[0].request()
    bad = asked | {"prompt": PROMPT.partition("{}")[0] + VIDEO.removesuffix("<|vision_end|>")}
    with pytest.raises(ValueError, match="ends with a video"):
        answers(llm, [bad])
    with pytest.raises(ValueError, match="positions"):
        answers(llm, [Asked((type(clip)(clip.frames, 10_000.0),), "What colour is the square?").request()])


def test_placeholders_that_a_user_writes_change_no_position(llm, quarter):
    stray = "Is <|image_pad|> or <|video_pad|> in it? What colour is the square?"
    found = outputs(llm, [Asked(quarter[0].media, stray).request()] * 2, together=False)
    assert found[0].outputs[0].token_ids == found[1].outputs[0].token_ids and len(found[0].outputs[0].token_ids) <= NEW
