"""DeepStack: each token has the features of inner layers too, of the rows and clusters that the last features are of."""

from math import prod

import pytest
import torch

from evoprune import methods
from evoprune.methods.base import Merger
from evoprune.methods.plans import keep_count
from evoprune.vision.tower import tower_shape
from tests.methods.tokens import plan_of
from tests.vision.clips import changes, clip
from tests.vision.reference import tokens_slowly
from tests.vision.results import assert_same, check_result, encode_patches
from tests.vision.tower import QWEN3_WIDTH, random_patches, tiny_qwen3

GRID = (4, 3, 5)
# A selection before the first DeepStack layer, between two of them, after all of them; reuse; merging; after the encoder.
METHODS = (
    "evoprune", "evoprune:reuse=0", "evoprune:depth=0.5", "evoprune:depth=1", "tome", "evoprune-merge", "evoprune-paper",
    "divprune", "reuse+divprune", "evs",
)  # fmt: skip


@pytest.mark.few(5)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("budget", [0.5, 0.2])
@torch.no_grad()
def test_pruned_features_against_loops(name, budget):
    method, keep, changed = methods.parse(name), keep_count(budget, prod(GRID)), changes(GRID, 0.4)
    patches = clip(GRID, changed, width=QWEN3_WIDTH)
    reuse = plan_of(method, tower_shape(tiny_qwen3()), GRID, keep).reuse
    kept, tokens, _ = tokens_slowly(tiny_qwen3(), patches, GRID, method, keep, changed if reuse else None)
    made = encode_patches(patches, GRID, method, keep, tiny_qwen3())
    check_result(made, GRID, whole_clip=not isinstance(method.encoder, Merger))
    assert made.kept.tolist() == kept and made.deepstack.shape == tokens[1:].shape
    torch.testing.assert_close(made.features.double(), tokens[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.deepstack.double(), tokens[1:], rtol=1e-4, atol=1e-4)
    for size in (1, 30):
        cut = encode_patches(patches, GRID, method, keep, tiny_qwen3(), chunk_units=size)
        assert_same(cut, made, atol=1e-4)
        torch.testing.assert_close(cut.deepstack, made.deepstack, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ipcv", "earlytom"])
def test_rows_that_come_back_and_whole_pairs_have_features_too(name):
    patches, method = random_patches(GRID, width=QWEN3_WIDTH), methods.parse(name)
    made, cut = (
        encode_patches(patches, GRID, method, 15, tiny_qwen3(), question=torch.ones(2, 24), chunk_units=size)
        for size in (10**6, 1)
    )
    assert made.deepstack.shape == (3, 15, 24)
    torch.testing.assert_close(cut.deepstack, made.deepstack, rtol=1e-4, atol=1e-4)
    if name == "ipcv":  # most of whose rows have not gone by the first of these layers
        whole = encode_patches(patches, GRID, methods.parse("none"), prod(GRID), tiny_qwen3())
        alike = torch.nn.functional.cosine_similarity(made.deepstack[0], whole.deepstack[0, made.kept], dim=1)
        assert alike.mean() > 0.9
