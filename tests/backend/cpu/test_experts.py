"""Test quantized experts against experts with the same weights in float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend import Quantization
from evoprune.backend.cpu import compiled as compiled_library
from evoprune.backend.cpu import four_bits
from evoprune.backend.cpu.experts import MATRICES, QuantizedExperts, experts_output
from evoprune.backend.cpu.quantize import experts_weights
from tests.backend.cpu.library import compiled, library  # noqa: F401
from tests.quantized import parameters

COUNT, HIDDEN, INNER, CHOSEN = 6, 64, 96, 2


class Plain(nn.Module):
    def __init__(self, inner: int = INNER, hidden: int = HIDDEN):
        super().__init__()
        random = torch.Generator().manual_seed(0)
        for name, shape in zip(MATRICES, ((2 * inner, hidden), (hidden, inner)), strict=True):
            weight = torch.randn(COUNT, *shape, generator=random) / shape[1] ** 0.5
            setattr(self, name, nn.Parameter(weight, requires_grad=False))


def quantized(plain: nn.Module, kind: str) -> QuantizedExperts:
    matrices = {name: getattr(plain, name) for name in MATRICES}
    return QuantizedExperts(experts_weights(matrices, kind), {name: each.shape for name, each in matrices.items()})


def given(rows: int, hidden: int = HIDDEN):
    random = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, hidden, generator=random)
    chosen = torch.rand(rows, COUNT, generator=random).topk(CHOSEN).indices
    return x, chosen, torch.rand(rows, CHOSEN, generator=random)


def dequantized(made: QuantizedExperts, plain: nn.Module) -> nn.Module:
    """Return plain experts with the values of quantized weights, computed without the compiled library."""
    for name in MATRICES:
        weight, shape = made.weights[name], getattr(plain, name).shape
        if weight.dtype == torch.int8:
            value = weight.float() * made.weights[f"{name}_scale"][..., None]
        else:
            chunks = weight.view(*shape[:2], -1, four_bits.CHUNK_BYTES)
            pairs = chunks[..., :128].unflatten(-1, (4, 32))
            whole = torch.stack([pairs & 15, pairs >> 4], -2).flatten(-3, -2).float() - 8
            scale = chunks[..., 128:].contiguous().view(torch.bfloat16).float()
            value = (whole * scale[..., None]).flatten(2)[..., : shape[2]]
        setattr(plain, name, nn.Parameter(value, requires_grad=False))
    return plain


def by_hand(experts: nn.Module, x, chosen, weights):
    out = torch.zeros_like(x)
    for row in range(len(x)):
        for number, weight in zip(chosen[row].tolist(), weights[row], strict=True):
            gate, up = (experts.gate_up_proj[number] @ x[row]).chunk(2)
            out[row] += weight * (experts.down_proj[number] @ (F.silu(gate) * up))
    return out


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_the_result_is_that_of_the_rounded_weights(kind, rows, compiled):  # noqa: F811
    plain = Plain()
    made = quantized(plain, kind)
    assert made.weights["down_proj"].dtype == (torch.int8 if kind == "int8" else torch.uint8)
    expected = by_hand(dequantized(made, Plain()), *given(rows))
    # With 4 bits, the library rounds the rows to 8 bits.
    torch.testing.assert_close(made(*given(rows)), expected, atol=1e-5 if kind == "int8" else 0.05, rtol=1e-5)
    assert (expected - by_hand(plain, *given(rows))).norm() < (0.02 if kind == "int8" else 0.2) * expected.norm()


def test_plain_experts_need_no_library():
    plain = Plain()
    torch.testing.assert_close(experts_output(plain, *given(20)), by_hand(plain, *given(20)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("inner", "missing"), [(INNER, True), (40, False)])
def test_without_a_library_or_with_other_sizes_weights_are_dequantized(inner, missing, compiled, monkeypatch):  # noqa: F811
    if missing:
        monkeypatch.setattr(compiled_library, "library", lambda: None)
    made = quantized(Plain(inner), "int8" if missing else "int4")
    assert not made.is_compiled and made.weights["gate_up_proj"].dtype == torch.int8
    expected = by_hand(dequantized(made, Plain(inner)), *given(5))
    torch.testing.assert_close(made(*given(5)), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_a_few_rows_are_computed_as_each_alone(kind, compiled):  # noqa: F811
    made, (x, chosen, weights) = quantized(Plain(), kind), given(Quantization.few_rows)
    alone = [made(x[i : i + 1], chosen[i : i + 1], weights[i : i + 1]) for i in range(len(x))]
    assert torch.equal(made(x, chosen, weights), torch.cat(alone))


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_only_chosen_experts_are_read(kind, compiled):  # noqa: F811
    made, (x, _, weights) = quantized(Plain(), kind), given(4)
    chosen = torch.tensor([[1, 4]]).expand(4, -1)
    expected = made(x, chosen, weights)
    for name, tensor in made.weights.items():
        others = tensor.new_full(tensor.shape, 77)
        made.weights[name] = others.index_copy(0, torch.tensor([1, 4]), tensor[[1, 4]])
    assert torch.equal(made(x, chosen, weights), expected)


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_the_size_is_known_before(kind, compiled):  # noqa: F811
    model = nn.Module()
    model.model = nn.Module()
    model.model.language_model = nn.Module()
    model.model.language_model.embed_tokens = nn.Embedding(2, 2)
    model.model.language_model.experts = Plain()
    wide = sum(weight.nbytes for weight in Plain().parameters())
    made = quantized(Plain(), kind)
    assert wide - Quantization(kind).saved_bytes(model) == pytest.approx(made.nbytes, rel=0.05)
