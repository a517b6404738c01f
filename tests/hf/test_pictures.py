"""Pictures that are pruned inside a Hugging Face model."""

import pytest
import torch

import evoprune
from evoprune.errors import UsageError
from evoprune.hf import interface
from evoprune.methods import Budget
from evoprune.model import FAMILIES
from tests.hf.reference import ONCE, TAKES_ENCODED, encoded, masked
from tests.prompts import CACHE, processed
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not TAKES_ENCODED, reason="this transformers takes no encoded images")
PROMPTS = {
    "an image": [(5, ("image", 8, 12), 7)],
    "two images": [(5, ("image", 8, 12), 2, ("image", 6, 4), 7)],
    "picture and video": [(5, ("image", 8, 8), 2, ("video", 4, 8, 12), 7, ("image", 4, 4), 1)],
    "batch": [(5, ("video", 4, 8, 12), 7, ("image", 6, 6), 2), (3, ("image", 8, 8), 9, ("video", 1, 4, 4), 2), (9,)],
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    model = tiny_model(family=request.param)
    model.generation_config.pad_token_id = 398
    return model


def generated(model, inputs, **settings):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False, **settings)


@pytest.mark.few(3)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_full_budget_is_the_models_own(model, prompt):
    inputs = processed(model, *PROMPTS[prompt])
    expected = generated(model, inputs)
    with evoprune.EvoPrune(budget=1.0, pictures=True)(model) as run:
        assert torch.equal(generated(model, inputs), expected)
    assert run.report.pruning.kept_ratio == 1


@pytest.mark.few(6)
@pytest.mark.parametrize("method", ["evoprune", "tome", "visionzip"])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_it_is_the_whole_prompt_with_the_dropped_columns_masked(model, prompt, method):
    if interface.LINEAR in (getattr(model.config.text_config, "layer_types", None) or ()):
        pytest.skip("a recurrent state changes with a masked column too")
    inputs = processed(model, *PROMPTS[prompt])
    how = {"method": method} | (ONCE if method == "evoprune" else {})
    videos = encoded(model, inputs, 0.25, how) if "pixel_values_videos" in inputs else None
    expected = generated(model, masked(model, inputs, videos, encoded(model, inputs, 0.25, how, pictures=True)))
    with evoprune.EvoPrune(budget=0.25, pictures=True, **how)(model) as run:
        assert torch.equal(generated(model, inputs), expected)
    left, total = run.columns.take(inputs["input_ids"]), 0
    for name, token in (
        ("video_grid_thw", model.config.video_token_id),
        ("image_grid_thw", model.config.image_token_id),
    ):
        kept = sum(Budget.count(0.25, int(grid.prod()) // 4) for grid in inputs.get(name, []))
        assert int((left == token).sum()) == kept
        total += kept
    assert run.report.pruning.visual_tokens_kept == run.report.tokens.visual == total


@pytest.mark.few(2)
def test_a_cache_goes_on_and_positions_of_qwen_are_possible(model):
    inputs = processed(model, *PROMPTS["picture and video"])
    with evoprune.EvoPrune(budget=0.25, pictures=True, positions="qwen")(model):
        at_once = generated(model, inputs)
        first = model.generate(**inputs, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
        more = {"input_ids": first.sequences, CACHE: first[CACHE]}
        mask = torch.ones_like(first.sequences)
        again = model.generate(**more, attention_mask=mask, max_new_tokens=4, do_sample=False)
    assert torch.equal(again, at_once)


@pytest.mark.few(2)
def test_pictures_stay_whole_unless_asked_for(model):
    inputs = processed(model, *PROMPTS["an image"])
    expected = generated(model, inputs)
    with evoprune.EvoPrune(budget=0.1)(model) as run:
        assert torch.equal(generated(model, inputs), expected)
    assert str(run.report) == "<Report: empty: images are not pruned without pictures=True>"
    with evoprune.EvoPrune(budget=0.1)(model) as run:
        generated(model, processed(model, *PROMPTS["picture and video"]))
    assert run.report.pruning.visual_tokens_kept < run.report.tokens.visual
    assert "images are not pruned without pictures=True" in str(run.report)


def test_pictures_that_do_not_fit_the_prompt_are_refused(model):
    inputs = processed(model, *PROMPTS["two images"])
    inputs["image_grid_thw"] = inputs["image_grid_thw"][:1]
    with evoprune.EvoPrune(budget=0.5, pictures=True)(model), pytest.raises(UsageError, match="image tokens"):
        generated(model, inputs)
