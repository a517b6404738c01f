import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.model.linear import PackedLinear, can_pack, linear, pack

pytestmark = pytest.mark.skipif(not can_pack(torch.empty(1)), reason="this torch has no packed products")


def layer_and_input(rows, dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).to(dtype).requires_grad_(False), torch.randn(*rows, 48, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [(1,), (3,), (5, 4), (600,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
def test_what_follows_the_product(rows, dtype, bias, packed):
    plain, x = layer_and_input(rows, dtype, bias)
    layer = PackedLinear(plain) if packed else plain
    y = F.linear(x.double(), plain.weight.double(), None if plain.bias is None else plain.bias.double())
    other = torch.randn(*rows, 80, dtype=dtype)
    kept = other.clone()
    near = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
    for got, expected in (
        (layer(x), y),
        (linear(layer, x), y),
        (linear(layer, x, silu=True), F.silu(y)),
        (linear(layer, x, times=other), y * other.double()),
        (linear(layer, x, plus=other), y + other.double()),
    ):
        assert got.dtype == dtype and got.shape == expected.shape
        torch.testing.assert_close(got.double(), expected, **near)
    assert torch.equal(other, kept)


def test_packing_replaces_every_plain_linear_layer_and_nothing_else():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.ModuleDict({"deep": nn.Linear(8, 8), "own": Special(8, 8)}))
    x = torch.randn(3, 8)
    before = model[2]["deep"](model[1](model[0](x)))
    pack(model.requires_grad_(False))
    assert isinstance(model[0], PackedLinear) and isinstance(model[2]["deep"], PackedLinear)
    assert type(model[2]["own"]) is Special
    torch.testing.assert_close(model[2]["deep"](model[1](model[0](x))), before)


def test_what_cannot_be_packed_stays():
    layer = nn.Linear(8, 8).half()
    assert not can_pack(layer.weight) and not can_pack(torch.empty(1, device="meta"))
    model = nn.Sequential(layer)
    pack(model)
    assert model[0] is layer
