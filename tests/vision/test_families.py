"""Qwen2-VL's tower on the same code: transformers' own at full budget, and the same properties below it."""

from math import prod

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.methods.base import Merger
from evoprune.model.config import QWEN2, QWEN2_5, vision_sizes
from evoprune.pruning.budget import keep_count
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip
from tests.vision.results import assert_same, check_result, encode_patches
from tests.vision.test_encoder import SIZES
from tests.vision.tower import random_patches


@pytest.fixture(scope="module")
def model():
    return tiny_model(family=QWEN2)


@pytest.mark.parametrize("grid", SIZES)
def test_budget_one_is_transformers_tower(model, grid):
    patches, thw = random_patches(grid), torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])
    with torch.inference_mode():
        theirs = model.model.visual(patches, thw).pooler_output
    for name in ("none", "evoprune", "divprune"):
        ours = evoprune.encode(model, patches, thw, budget=1.0, method=name)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.few(4)
@pytest.mark.parametrize("name", ["evoprune", "evoprune:depth=1", "evoprune-paper", "tome", "scope"])
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_pruned_results_do_not_depend_on_the_chunk_size(model, name, budget):
    grid, method = (6, 5, 7), methods.parse(name)
    keep, patches = keep_count(budget, prod(grid)), clip(grid, changes(grid, 0.4))
    whole, chunks = (
        encode_patches(patches, grid, method, keep, model.model.visual, chunk_units=size) for size in (10**6, 35)
    )
    check_result(whole, grid, whole_clip=not isinstance(method.encoder, Merger))
    assert len(whole.kept) == keep and (whole.live_share < 1) == (name != "scope")
    assert_same(chunks, whole, atol=1e-4)


def test_the_rows_of_a_still_clip_are_those_of_its_first_frame_pair(model):
    first, visual = random_patches((1, 4, 6)), model.model.visual
    alone = encode_patches(first, (1, 4, 6), methods.parse("none"), 24, visual)
    made = encode_patches(first.repeat(5, 1), (5, 4, 6), methods.parse("evoprune:depth=1"), 60, visual)
    torch.testing.assert_close(made.rows, alone.rows, rtol=1e-5, atol=1e-5)


def test_both_families_name_their_sizes_alike(model):
    sizes = vision_sizes(model.config.vision_config)
    assert sizes.family == QWEN2 and (sizes.hidden_size, sizes.out_hidden_size, sizes.intermediate_size) == (48, 64, 96)
    assert sizes.fullatt_block_indexes == (0, 1) and sizes.tokens_per_second is None and sizes.mlp_matrices == 2
    assert vision_sizes(sizes) is sizes
    assert vision_sizes(tiny_model().config.vision_config).family == QWEN2_5
