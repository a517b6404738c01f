"""Qwen2-VL's tower on the same code: transformers' own at full budget, and the same books below it."""

from math import prod

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.model.config import QWEN2, QWEN2_5, vision_sizes
from evoprune.pruning.budget import keep_count
from evoprune.vision.encoder import encode
from tests.tiny import tiny_model
from tests.vision.test_encoder import SIZES, check_books
from tests.vision.tower import random_patches


@pytest.fixture(scope="module")
def model():
    return tiny_model(family=QWEN2)


def moving(grid, seed=0):
    """Patches of a clip in which some units change from grid to grid."""
    t, h, w = grid
    patches = random_patches(grid, seed).view(t, h * w, 4, -1)
    still = torch.rand(t, h * w, generator=torch.Generator().manual_seed(seed)) < 0.6
    for moment in range(1, t):
        patches[moment][still[moment]] = patches[moment - 1][still[moment]]
    return patches.view(t * h * w * 4, -1)


@pytest.mark.parametrize("grid", SIZES)
def test_budget_one_is_transformers_tower(model, grid):
    patches, thw = random_patches(grid), torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])
    with torch.inference_mode():
        theirs = model.model.visual(patches, thw).pooler_output
    for name in ("none", "evoprune", "divprune"):
        ours = evoprune.encode(model, patches, thw, budget=1.0, method=name)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("name", ["evoprune", "evoprune:depth=1:merge=0.5", "evoprune-paper", "tome", "scope"])
@pytest.mark.parametrize("budget", [0.5, 0.1])
def test_pruned_the_counts_hold_whatever_the_chunk(model, name, budget):
    grid, method = (6, 5, 7), methods.get(name)
    keep = keep_count(budget, prod(grid))
    whole = encode(model.model.visual, [moving(grid)], grid, method, keep, seconds_per_grid=0.5)
    check_books(whole, grid, None)
    assert len(whole.kept) == keep and (whole.live_share < 1) == (name != "scope")
    parts = encode(model.model.visual, [moving(grid)], grid, method, keep, seconds_per_grid=0.5, chunk_units=35)
    assert torch.equal(parts.kept, whole.kept) and torch.equal(parts.owner, whole.owner)
    torch.testing.assert_close(parts.features, whole.features, rtol=1e-4, atol=1e-5)


def test_where_nothing_changes_one_grid_is_all(model):
    grid = (5, 4, 6)
    still = random_patches((1, 4, 6)).repeat(5, 1)
    one = encode(model.model.visual, [random_patches((1, 4, 6))], (1, 4, 6), methods.get("none"), 24)
    made = encode(model.model.visual, [still], grid, methods.get("evoprune:depth=1"), 60)
    torch.testing.assert_close(made.rows, one.rows, rtol=1e-5, atol=1e-5)


def test_sizes_go_by_one_set_of_names(model):
    sizes = vision_sizes(model.config.vision_config)
    assert sizes.family == QWEN2 and (sizes.hidden_size, sizes.out_hidden_size, sizes.intermediate_size) == (48, 64, 96)
    assert sizes.fullatt_block_indexes == (0, 1) and sizes.tokens_per_second is None and sizes.mlp_matrices == 2
    assert vision_sizes(sizes) is sizes
    assert vision_sizes(tiny_model().config.vision_config).family == QWEN2_5
