"""The tower's layers by kernels, under Triton's interpreter, against plain PyTorch."""

from copy import deepcopy

import pytest
import torch

from evoprune.backend import devices
from evoprune.backend.layers import join_tower, joined
from evoprune.methods.chain import Pipeline
from evoprune.methods.evoprune import EvoPrune
from evoprune.vision import attention, tower
from tests.vision.clips import changes, clip
from tests.vision.devices import varlen_by_hand
from tests.vision.results import encode_patches
from tests.vision.tower import random_patches, tiny_qwen3, tiny_tower

pytest.importorskip("triton")
GRID = (3, 3, 4)


@pytest.fixture
def on_kernels(monkeypatch):
    """From now on the CPU takes the way of a GPU with kernels; the result counts layers that ran on them."""
    from evoprune.backend import kernels

    ran = []

    def counted(*args):
        ran.append(args[1])
        return real(*args)

    real = tower.VisionBlock.by_kernels
    monkeypatch.setattr(devices, "exact_shapes", lambda device: False)
    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: varlen_by_hand)
    monkeypatch.setattr(tower, "varlen_kernel", lambda device, dtype: varlen_by_hand)
    monkeypatch.setattr(tower, "kernels", lambda device: kernels)
    monkeypatch.setattr(tower.VisionBlock, "by_kernels", counted)
    return ran


@pytest.mark.parametrize("joins", [True, False])
@pytest.mark.parametrize("method", [EvoPrune(), None], ids=["evoprune", "full"])
def test_layers_by_kernels_are_the_plain_ones(on_kernels, monkeypatch, joins, method):
    visual, patches = deepcopy(tiny_tower()), clip(GRID, changes(GRID, 0.5))
    keep = 9 if method else 36
    given = patches, GRID, method or Pipeline(), keep
    with monkeypatch.context() as patch:
        patch.setattr(tower, "can_fuse", lambda x: False)
        expected = encode_patches(*given, visual)
    assert not on_kernels
    if joins:
        join_tower(visual)
    made = encode_patches(*given, visual)
    assert len(on_kernels) == 4 and made.layers == expected.layers
    assert torch.equal(made.kept, expected.kept) and torch.equal(made.owner, expected.owner)
    torch.testing.assert_close(made.features, expected.features, atol=2e-4, rtol=2e-4)


def test_a_tower_with_layer_norms_and_features_of_inner_layers(on_kernels, monkeypatch):
    visual, patches = tiny_qwen3(), random_patches((2, 4, 4), width=1536)
    with monkeypatch.context() as patch:
        patch.setattr(tower, "can_fuse", lambda x: False)
        expected = encode_patches(patches, (2, 4, 4), Pipeline(), 32, visual)
    made = encode_patches(patches, (2, 4, 4), Pipeline(), 32, visual)
    assert len(on_kernels) == 6
    torch.testing.assert_close(made.features, expected.features, atol=2e-4, rtol=2e-4)
    torch.testing.assert_close(made.deepstack, expected.deepstack, atol=2e-4, rtol=2e-4)


def test_a_kernel_that_fails_leaves_the_other_layers_to_pytorch(on_kernels, monkeypatch, recwarn):
    patches, real = random_patches(GRID), tower.VisionBlock._mlp_by_kernels

    def fails(block, x):
        if block.number == 2:
            raise RuntimeError("no kernel image")
        return real(block, x)

    expected = encode_patches(patches, GRID, Pipeline(), 36)
    monkeypatch.setattr(devices, "_failed", set())
    monkeypatch.setattr(tower.VisionBlock, "_mlp_by_kernels", fails)
    made = encode_patches(patches, GRID, Pipeline(), 36)
    assert made.layers == expected.layers
    torch.testing.assert_close(made.features, expected.features, atol=2e-4, rtol=2e-4)
    assert [str(each.message) for each in recwarn if "no kernel image" in str(each.message)]


def test_joined_layers_are_the_same_layers():
    visual, whole = deepcopy(tiny_tower()), tiny_tower()
    join_tower(visual)
    x = torch.randn(7, 32)
    for block, before in zip(visual.blocks, whole.blocks, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            assert torch.equal(block.mlp.get_submodule(name).weight, before.mlp.get_submodule(name).weight)
        weight, bias = joined(block.mlp)
        gate, up = (x @ weight.T + bias).chunk(2, 1)
        assert torch.allclose(gate[:, :48], before.mlp.gate_proj(x), atol=1e-6)
        assert torch.allclose(up[:, :48], before.mlp.up_proj(x), atol=1e-6) and not up[:, 48:].any()
    visual.blocks[0].mlp.gate_proj.weight = torch.nn.Parameter(torch.zeros(48, 32))
    assert joined(visual.blocks[0].mlp) is None  # the weights are others by now
