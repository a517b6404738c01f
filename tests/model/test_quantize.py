import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.errors import UsageError
from evoprune.language.decoder import KVCache, logits
from evoprune.model.quantize import GROUP, Int4Linear, Int8Linear, check, quantize
from tests.quantized import parameters
from tests.tiny import tiny_model

MADE = {"int8": Int8Linear, "int4": Int4Linear}


def layer_of(out=64, inner=96, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inner, out, bias=bias).requires_grad_(False)
    layer.weight *= torch.rand(out, 1) * 3
    return layer.to(dtype)


def int8_by_hand(weight):
    """Each row rounded to 127 steps either side of zero."""
    rows = []
    for row in weight.double():
        step = row.abs().max() / 127
        rows.append(torch.tensor([round(float(w / step)) for w in row], dtype=torch.float64) * step)
    return torch.stack(rows)


def int4_by_hand(weight):
    """Every 32 neighbours rounded to 16 steps from the least to the largest."""
    out = weight.double().clone()
    for row in out:
        for group in row.split(GROUP):
            low, high = float(group.min()), float(group.max())
            step = (high - low) / 15
            group.copy_(torch.tensor([low + round((float(w) - low) / step) * step for w in group]))
    return out


@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", parameters(*MADE))
def test_only_the_weights_are_rounded(kind, rows, bias):
    by_hand = {"int8": int8_by_hand, "int4": int4_by_hand}[kind]
    layer = layer_of(bias=bias)
    x = torch.randn(*rows, 96)
    x[..., 5] *= (
        300  # activations of real models have a few such features; they must not cost the others their precision
    )
    expected = F.linear(x.double(), by_hand(layer.weight), layer.bias.double() if bias else None)
    got = MADE[kind](layer)(x)
    assert got.shape == expected.shape and got.dtype == x.dtype
    # Rounding a weight the other way, at a tie that falls differently, is one step of one weight.
    assert (got.double() - expected).abs().max() < 2e-3 * expected.abs().max()
    assert (got.double() - expected).abs().median() < 2e-4 * expected.abs().max()


@pytest.mark.parametrize("kind", parameters(*MADE))
def test_half_precision(kind):
    layer = layer_of(dtype=torch.bfloat16)
    x = torch.randn(1, 96).bfloat16()
    got = MADE[kind](layer)(x)
    assert got.dtype == torch.bfloat16
    error = (got.double() - F.linear(x.double(), layer.weight.double(), layer.bias.double())).abs().max()
    assert error < {"int8": 0.05, "int4": 0.5}[kind]


@pytest.mark.parametrize("kind", parameters(*MADE))
def test_zeros_and_constants(kind):
    layer = layer_of()
    layer.weight[0], layer.weight[1] = 0, 2.5
    made = MADE[kind](layer)
    assert torch.equal(made(torch.zeros(1, 96)), layer.bias[None])
    torch.testing.assert_close(made(torch.ones(1, 96))[0, :2], layer(torch.ones(1, 96))[0, :2], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", parameters(*MADE))
def test_prompts_go_through_the_unquantised_layer_if_it_was_kept(kind):
    layer, make = layer_of(), MADE[kind]
    x = torch.randn(20, 96)
    assert torch.equal(make(layer, full=layer)(x), layer(x))
    assert not torch.equal(make(layer)(x), layer(x))
    assert not torch.equal(make(layer, full=layer)(x[:1]), layer(x[:1]))


@pytest.mark.parametrize("kind", parameters(*MADE))
@pytest.mark.parametrize("with_wide", [True, False])
def test_a_language_model(kind, with_wide):
    plain = tiny_model()
    model = copy.deepcopy(plain)
    seen = []
    quantize(model, kind, plain if with_wide else None, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 15) for i in range(1, 16)]  # two layers of seven, and the output
    vision = [type(m) for m in model.model.visual.modules()]
    assert vision == [type(m) for m in plain.model.visual.modules()]
    x, positions = torch.randn(5, 64), torch.arange(5).expand(3, -1)
    a, b = (logits(m, x, positions, KVCache(m, 8))[0] for m in (plain, model))
    assert 0 < (a - b).abs().max() < {"int8": 0.25, "int4": 3}[kind] * a.std()
    assert torch.corrcoef(torch.stack([a, b]))[0, 1] > {"int8": 0.999, "int4": 0.95}[kind]


def test_kinds_and_devices():
    check("none", torch.device("meta"))
    with pytest.raises(UsageError, match="unknown quantisation"):
        check("int3", torch.device("cpu"))
    with pytest.raises(UsageError, match="works on the CPU"):
        check("int8", torch.device("meta"))


@pytest.mark.parametrize("kind", parameters(*MADE))
@pytest.mark.parametrize("out", [100, 256, 330])
def test_weights_quantised_piece_by_piece_are_the_same(kind, out, monkeypatch):
    layer, x, make = layer_of(out=out), torch.randn(2, 96), MADE[kind]
    whole = make(layer)(x)
    monkeypatch.setattr("evoprune.model.quantize.ROWS", 64)
    assert torch.equal(make(layer)(x), whole)
