import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.cpu import linear as module
from evoprune.cpu.linear import MANY_ROWS, SMALL_WEIGHT, PackedLinear, PackingTime, can_pack, linear, pack
from tests.threads import one_thread  # noqa: F401

pytestmark = pytest.mark.skipif(not can_pack(torch.empty(1)), reason="this torch has no packed products")


def layer_and_input(rows, dtype, bias=True):
    torch.manual_seed(0)
    return nn.Linear(48, 80, bias=bias).to(dtype).requires_grad_(False), torch.randn(*rows, 48, dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [dtype for dtype in (torch.float32, torch.bfloat16) if can_pack(torch.empty(1, dtype=dtype))]
)
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


@pytest.fixture(scope="module")
def large():
    """A layer that is worth waiting with."""
    torch.manual_seed(0)
    layer = nn.Linear(1536, 1408).bfloat16().requires_grad_(False)
    assert layer.weight.numel() > SMALL_WEIGHT
    if not can_pack(layer.weight):
        pytest.skip("bf16 is not packed here")
    return layer


def test_a_layer_waits_with_packing_until_few_rows_come(large):
    spent = PackingTime()
    waiting, packed = PackedLinear(large, spent), PackedLinear(large)
    many, few = (torch.randn(rows, 1536, dtype=torch.bfloat16) for rows in (MANY_ROWS, MANY_ROWS - 1))
    other = torch.randn(MANY_ROWS, 1408, dtype=torch.bfloat16)
    assert torch.equal(linear(waiting, many, silu=True), linear(packed, many, silu=True))
    assert torch.equal(linear(waiting, many, plus=other), linear(packed, many, plus=other))
    assert waiting.waits and not packed.waits and spent.seconds == 0
    assert waiting.nbytes == packed.nbytes == large.weight.nbytes
    assert torch.equal(waiting(few), packed(few))
    assert not waiting.waits and spent.seconds > 0
    once = spent.seconds
    assert torch.equal(waiting(many), packed(many)) and torch.equal(waiting(few[:1]), packed(few[:1]))
    assert spent.seconds == once


def test_small_weights_do_not_wait():
    assert not PackedLinear(nn.Linear(48, 80).requires_grad_(False), PackingTime()).waits


def test_a_layer_stays_plain_where_memory_is_short_when_few_rows_come(large, monkeypatch):
    asked = []
    monkeypatch.setattr(module, "available_memory", lambda device: asked.append(device) or large.weight.nbytes)
    waiting, x = PackedLinear(large, PackingTime()), torch.randn(1, 1536, dtype=torch.bfloat16)
    torch.testing.assert_close(waiting(x), F.linear(x, large.weight, large.bias), rtol=0.02, atol=0.02)
    waiting(x)
    assert waiting.weights_for(x).data_ptr() == large.weight.data_ptr() and asked == ["cpu"]


def test_what_was_packed_in_inference_mode_serves_outside_of_it(large):
    waiting = PackedLinear(large, PackingTime())
    x = torch.randn(1, 1536, dtype=torch.bfloat16)
    with torch.inference_mode():
        inside = waiting(x)
    assert torch.equal(waiting(x.requires_grad_()), inside)
