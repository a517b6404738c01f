"""The towers of Qwen2-VL and Qwen3-VL on the same code: transformers' own at full budget, and the same properties below it."""

from math import prod

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.methods.base import Merger
from evoprune.methods.plans import keep_count
from evoprune.model.config import QWEN2, QWEN2_5, QWEN3, vision_sizes
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip
from tests.vision.results import assert_same, check_result, encode_patches
from tests.vision.test_encoder import SIZES
from tests.vision.tower import random_patches

WIDTH = {QWEN2: 1176, QWEN3: 1536}  # values of a patch


@pytest.fixture(scope="module", params=[QWEN2, QWEN3])
def model(request):
    return tiny_model(family=request.param)


def patches_of(model, grid, made=random_patches, *args):
    return made(grid, *args, width=WIDTH[model.config.model_type])


@pytest.mark.parametrize("grid", SIZES)
def test_budget_one_is_transformers_tower(model, grid):
    patches, thw = patches_of(model, grid), torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])
    with torch.inference_mode():
        theirs = model.model.visual(patches, thw)
        inner = getattr(theirs, "deepstack_features", None)
        theirs = theirs.pooler_output
    for name in ("none", "evoprune", "divprune"):
        ours = evoprune.encode(model, patches, thw, budget=1.0, method=name)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert (ours.deepstack is None) == (inner is None)
        for one, other in zip(ours.deepstack if inner else (), inner or (), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["evoprune", "evoprune:depth=1", "evoprune-paper", "tome", "scope"])
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_pruned_results_do_not_depend_on_the_chunk_size(model, name, budget):
    grid, method = (6, 5, 7), methods.parse(name)
    keep, patches = keep_count(budget, prod(grid)), patches_of(model, grid, clip, changes(grid, 0.4))
    whole, chunks = (
        encode_patches(patches, grid, method, keep, model.model.visual, chunk_units=size) for size in (10**6, 35)
    )
    check_result(whole, grid, whole_clip=not isinstance(method.encoder, Merger))
    assert len(whole.kept) == keep and (whole.live_share < 1) == (name != "scope")
    assert_same(chunks, whole, atol=1e-4)


def test_the_rows_of_a_still_clip_are_those_of_its_first_frame_pair(model):
    first, visual = patches_of(model, (1, 4, 6)), model.model.visual
    alone = encode_patches(first, (1, 4, 6), methods.parse("none"), 24, visual)
    made = encode_patches(first.repeat(5, 1), (5, 4, 6), methods.parse("evoprune:depth=1"), 60, visual)
    torch.testing.assert_close(made.rows, alone.rows, rtol=1e-5, atol=1e-5)


def test_all_families_name_their_sizes_alike():
    sizes = vision_sizes(tiny_model(family=QWEN2).config.vision_config)
    assert sizes.family == QWEN2 and (sizes.hidden_size, sizes.out_hidden_size, sizes.intermediate_size) == (48, 64, 96)
    assert sizes.fullatt_block_indexes == (0, 1) and sizes.tokens_per_second is None and len(sizes.traits.mlp) == 2
    assert vision_sizes(sizes) is sizes
    assert vision_sizes(tiny_model().config.vision_config).family == QWEN2_5
    sizes = vision_sizes(tiny_model(family=QWEN3).config.vision_config)
    assert sizes.family == QWEN3 and sizes.deepstack_visual_indexes == (1, 2, 4) and sizes.layers_read == 4
