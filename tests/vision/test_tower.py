"""The tower's layers by kernels, under Triton's interpreter, against plain PyTorch."""

from copy import deepcopy
from math import prod

import pytest
import torch

from evoprune import methods
from evoprune.backend import attention, devices
from evoprune.backend.layers import join_tower
from evoprune.methods import Budget, Merger, MethodChain, TowerShape
from evoprune.methods.evoprune import EvoPruneMethod
from evoprune.model import FAMILIES, Tower, VisionConfig
from evoprune.vision import tower
from evoprune.vision.encoder import encode_rows
from tests.backend.failures import forget_failures
from tests.methods.tokens import Largest, plan_of
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip
from tests.vision.devices import varlen_by_hand
from tests.vision.reference import tokens_slowly
from tests.vision.results import assert_same, check_result, encode_patches
from tests.vision.test_encoder import SIZES
from tests.vision.tower import PATCH_WIDTH, QWEN3_WIDTH, random_patches, tiny_qwen3, tiny_tower

FUSED_GRID = (3, 3, 4)


@pytest.fixture
def on_kernels(monkeypatch):
    """Make the CPU use the GPU code path with kernels. The result lists the layers that ran on them."""
    pytest.importorskip("triton")
    from evoprune.backend import kernels

    ran = []

    def counted(*args):
        ran.append(args[1])
        return real(*args)

    real = tower.Layer.by_kernels
    monkeypatch.setattr(devices, "is_host", lambda device: False)
    monkeypatch.setattr(attention, "is_host", lambda device: False)
    monkeypatch.setattr(attention.Attention, "varlen_kernel", property(lambda _: varlen_by_hand))
    monkeypatch.setattr(tower, "kernels_for", lambda device: kernels)
    monkeypatch.setattr(tower.Layer, "by_kernels", counted)
    return ran


@pytest.mark.parametrize(
    ("tower_of", "layers", "joins", "method"),
    [
        (tiny_tower, 4, False, EvoPruneMethod()),
        (tiny_tower, 4, True, EvoPruneMethod()),
        (tiny_tower, 4, True, MethodChain()),
        (tiny_qwen3, 6, False, MethodChain()),  # with layer norms and features of inner layers
    ],
)
def test_layers_by_kernels_are_the_plain_ones(on_kernels, monkeypatch, tower_of, layers, joins, method):
    visual, width = deepcopy(tower_of()), QWEN3_WIDTH if tower_of is tiny_qwen3 else PATCH_WIDTH
    patches = clip(FUSED_GRID, changes(FUSED_GRID, 0.5), width=width)
    given = patches, FUSED_GRID, method, 9 if isinstance(method, EvoPruneMethod) else 36
    with monkeypatch.context() as patch:
        patch.setattr(tower, "fused_kernels", lambda x: None)
        expected = encode_patches(*given, visual)
    assert not on_kernels
    if joins:
        join_tower(visual)
    made = encode_patches(*given, visual)
    assert len(on_kernels) == layers and made.layers == expected.layers
    assert torch.equal(made.kept, expected.kept) and torch.equal(made.unit_to_row, expected.unit_to_row)
    torch.testing.assert_close(made.features, expected.features, atol=2e-4, rtol=2e-4)
    if tower_of is tiny_qwen3:
        torch.testing.assert_close(made.deepstack, expected.deepstack, atol=2e-4, rtol=2e-4)


def test_a_kernel_that_fails_leaves_the_other_layers_to_pytorch(on_kernels, monkeypatch, recwarn):
    patches, real = random_patches(FUSED_GRID), tower.Layer._mlp_by_kernels

    def fails(layer, x):
        if layer.number == 2:
            raise RuntimeError("no kernel image")
        return real(layer, x)

    expected = encode_patches(patches, FUSED_GRID, MethodChain(), 36)
    forget_failures(monkeypatch)
    monkeypatch.setattr(tower.Layer, "_mlp_by_kernels", fails)
    made = encode_patches(patches, FUSED_GRID, MethodChain(), 36)
    assert made.layers == expected.layers
    torch.testing.assert_close(made.features, expected.features, atol=2e-4, rtol=2e-4)
    assert [str(each.message) for each in recwarn if "no kernel image" in str(each.message)]


# DeepStack: each token also has inner-layer features, from the same rows and clusters as its last-layer features.

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
    method, keep, changed = methods.MethodChain.parse(name), Budget.count(budget, prod(GRID)), changes(GRID, 0.4)
    patches = clip(GRID, changed, width=QWEN3_WIDTH)
    reuse = plan_of(method, TowerShape.of_tower(tiny_qwen3()), GRID, keep).reuse
    kept, tokens, _ = tokens_slowly(tiny_qwen3(), patches, GRID, method, keep, changed if reuse else None)
    made = encode_patches(patches, GRID, method, keep, tiny_qwen3())
    check_result(made, GRID, whole_clip=not isinstance(method.encoder, Merger))
    assert made.kept.tolist() == kept and made.deepstack.shape == tokens[1:].shape
    torch.testing.assert_close(made.features.double(), tokens[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.deepstack.double(), tokens[1:], rtol=1e-4, atol=1e-4)
    for size in (1, 30):
        cut = encode_patches(patches, GRID, method, keep, tiny_qwen3(), piece_units=size)
        assert_same(cut, made, atol=1e-4)
        torch.testing.assert_close(cut.deepstack, made.deepstack, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["ipcv", "earlytom"])
def test_rows_that_come_back_and_whole_pairs_have_features_too(name):
    patches, method = random_patches(GRID, width=QWEN3_WIDTH), methods.MethodChain.parse(name)
    made, cut = (
        encode_patches(patches, GRID, method, 15, tiny_qwen3(), question=torch.ones(2, 24), piece_units=size)
        for size in (10**6, 1)
    )
    assert made.deepstack.shape == (3, 15, 24)
    torch.testing.assert_close(cut.deepstack, made.deepstack, rtol=1e-4, atol=1e-4)
    if name == "ipcv":  # most of its rows are still there before the first of these layers
        whole = encode_patches(patches, GRID, methods.MethodChain.parse("none"), prod(GRID), tiny_qwen3())
        alike = torch.nn.functional.cosine_similarity(made.deepstack[0], whole.deepstack[0, made.kept], dim=1)
        assert alike.mean() > 0.9


# At full budget, the towers of all families equal transformers'.


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return tiny_model(family=request.param)


@pytest.mark.few(18)
@pytest.mark.parametrize("grid", SIZES)
def test_budget_one_is_transformers_tower(model, grid):
    width = model.model.visual.patch_embed.proj.weight[0].numel()
    patches, thw = random_patches(grid, width=width), torch.tensor([[grid[0], grid[1] * 2, grid[2] * 2]])
    with torch.inference_mode():
        theirs = model.model.visual(patches, thw)
        inner = getattr(theirs, "deepstack_features", None)
        theirs = theirs.pooler_output
    for name in ("none", "evoprune", "divprune"):
        ours = encode_patches(patches, grid, methods.MethodChain.parse(name), prod(grid), model.model.visual)
        torch.testing.assert_close(ours.features, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
        assert (ours.deepstack is None) == (inner is None)
        for one, other in zip(ours.deepstack if inner else (), inner or (), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * other.abs().max().item())


@pytest.mark.few(3)
def test_the_bare_tree_has_the_weights_of_transformers_tower(model):
    theirs = model.model.visual
    ours = Tower(VisionConfig.of(theirs.config))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    patches = random_patches((3, 4, 6), width=theirs.patch_embed.proj.weight[0].numel())
    made, expected = (encode_patches(patches, (3, 4, 6), EvoPruneMethod(), 18, visual) for visual in (ours, theirs))
    assert torch.equal(made.features, expected.features) and torch.equal(made.kept, expected.kept)


@pytest.mark.parametrize("piece", [1, 3, 6, 7, 8])
def test_pieces_together_are_the_whole(piece):
    x = torch.arange(14.0).view(7, 2)
    y = torch.arange(7.0)[:, None]
    given = []

    def both(a, b):
        given.append(len(a))
        return a * 2 + b

    assert torch.equal(tower.in_pieces(both, piece, x, y), x * 2 + y)
    assert sum(given) == 7 and max(given) <= piece
    assert torch.equal(tower.in_pieces(lambda a: a[:, :1] + 1, piece, x), x[:, :1] + 1)
    place = x.clone()
    assert torch.equal(tower.in_pieces(both, piece, place, y, into=place), x * 2 + y)
    assert torch.equal(place, x * 2 + y) == (piece < 7)


@pytest.mark.parametrize("name", ["none", "divprune", "reuse+divprune"])
def test_what_a_layer_makes_on_the_way_is_bounded(name):
    """Norms, rotations and MLPs of 600 units run in pieces of 20, so no tensor is larger than queries, keys and values."""
    grid = (30, 4, 5)
    pieces = clip(grid, changes(grid, 0.5)).split(4 * 20)
    plan = plan_of(methods.MethodChain.parse(name), TowerShape.of_tower(tiny_tower()), grid, 60)
    with Largest() as largest:
        encode_rows(tiny_tower(), (piece.clone() for piece in pieces), plan, piece_units=20)
    assert largest.numbers <= max(20 * 4 * PATCH_WIDTH, prod(grid) * 4 * 3 * 32)
