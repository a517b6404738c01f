import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from evoprune.backend import Quantization
from evoprune.backend.cpu import quantize
from evoprune.backend.cpu.quantize import (
    MANY_ROWS,
    Bytes,
    Int8Linear,
    RowMajorInt4Linear,
    RowMajorInt8Linear,
    form_of,
    int8_weights,
    large_channels,
    levels,
    row_major_int4_weights,
)
from evoprune.errors import UsageError
from evoprune.methods import EncoderPlan, TowerShape
from evoprune.session import calibrate
from evoprune.vision import encode_rows
from tests.backend.cpu.library import compiled, library, use  # noqa: F401
from tests.quantized import int8, parameters
from tests.tiny import tiny_model

LARGE = torch.tensor([5, 17])


def layer_of(out=64, inner=96, bias=True, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = nn.Linear(inner, out, bias=bias).requires_grad_(False)
    layer.weight *= torch.rand(out, 1) * 3
    return layer.to(dtype)


def rounded(rows, steps):
    """Round each row to this many steps on either side of zero."""
    step = (rows.double().abs().amax(1, keepdim=True) / steps).clamp(min=1e-30)
    return (rows.double() / step).round() * step


def without(x, channels):
    return x.index_fill(-1, channels, 0.0)


def int8_by_hand(layer, x, large):
    """Round rows of the input and the weights, except in the large channels."""
    rows, weight = x.reshape(-1, x.shape[-1]), layer.weight
    product = rounded(without(rows, large), levels()) @ rounded(without(weight, large), 127).T
    product += rows[:, large].double() @ weight[:, large].double().T
    return product.view(*x.shape[:-1], -1) + (0 if layer.bias is None else layer.bias.double())


@pytest.mark.parametrize("large", [LARGE[:0], LARGE])
@pytest.mark.parametrize("rows", [(1,), (3,), (2, 5), (40,)])
@pytest.mark.parametrize("bias", parameters("int8") and [True, False])
def test_rows_are_rounded_and_large_channels_are_not(rows, bias, large):
    layer, x = layer_of(bias=bias), torch.randn(*rows, 96)
    layer.weight[:, large] *= 50
    got, expected = int8(layer, large)(x), int8_by_hand(layer, x, large)
    assert got.shape == expected.shape and got.dtype == x.dtype
    # A tie that is rounded the other way changes one number by one step.
    assert (got.double() - expected).abs().max() < 0.02 * expected.abs().max()
    assert (got.double() - expected).abs().median() < 1e-5 * expected.abs().max()


def relative(got, expected):
    return float((got - expected).norm() / expected.norm())


def test_large_channels_cost_the_others_no_precision():
    layer, x = layer_of(256, 512), torch.randn(100, 512)
    x[:, LARGE] *= 100
    layer.weight[:, LARGE] /= 100
    assert large_channels(x).tolist() == LARGE.tolist()
    error = {name: relative(int8(layer, large)(x), layer(x)) for name, large in (("apart", LARGE), ("in", None))}
    assert error["apart"] < 0.025 < 0.1 < error["in"]


def test_few_channels_are_large():
    x = torch.randn(50, 320)
    assert large_channels(x).tolist() == []
    x[:, :40] *= 100  # an eighth
    assert len(large_channels(x)) == 10 and set(large_channels(x).tolist()) <= set(range(40))
    assert large_channels(x[:, :20]).tolist() == []


@pytest.mark.parametrize("large", [None, LARGE])
def test_rows_do_not_depend_on_one_another_nor_on_threads(large):
    layer, x = int8(layer_of(200, 320), large), torch.randn(300, 320) * torch.rand(300, 1) * 10
    before, whole = torch.get_num_threads(), layer(x)
    pieces = torch.cat([layer(piece) for piece in x.split([1, 2, 7, 90, 200])])
    try:
        torch.set_num_threads(3)
        others = layer(x.clone())
    finally:
        torch.set_num_threads(before)
    if large is None:
        assert torch.equal(whole, pieces) and torch.equal(whole, others)
    else:  # float32 products of the large channels
        torch.testing.assert_close(whole, pieces, rtol=0, atol=1e-5 * float(whole.abs().max()))


def test_layers_with_the_same_input_round_it_once():
    to_bytes, x = Bytes(), torch.randn(3, 96)
    made = to_bytes(x, LARGE)
    assert to_bytes(x, LARGE) is made
    assert to_bytes(x, LARGE[:1]) is not made and to_bytes(x.clone(), LARGE) is not made


def test_zeros_constants_and_half_precision():
    layer = layer_of()
    layer.weight[0], layer.weight[1] = 0, 2.5
    made = int8(layer)
    assert torch.equal(made(torch.zeros(1, 96)), layer.bias[None])
    torch.testing.assert_close(made(torch.ones(1, 96))[0, :2], layer(torch.ones(1, 96))[0, :2], rtol=1e-3, atol=1e-3)
    layer, x = layer_of(dtype=torch.bfloat16), torch.randn(1, 96).bfloat16()
    got, expected = int8(layer)(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert got.dtype == torch.bfloat16 and (got.double() - expected).abs().max() < 0.1 * expected.abs().max()


def features_of(model):
    visual, patches = model.model.visual, torch.randn(96, 1176, generator=torch.Generator().manual_seed(1))
    plan = EncoderPlan.full(TowerShape.of_tower(visual), (2, 4, 3))
    return encode_rows(visual, [patches], plan).select_tokens().features


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_a_whole_model(kind):
    plain, seen = tiny_model(), []
    model = copy.deepcopy(plain)
    Quantization(kind).apply(model, calibrate, progress=lambda done, total: seen.append((done, total)))
    linear = [name for name, layer in plain.named_modules() if type(layer) is nn.Linear]
    assert seen == [(done + 1, len(linear)) for done in range(len(linear))]
    made = {name: type(model.get_submodule(name)) for name in linear}
    assert {kind for name, kind in made.items() if "visual" in name} == {Int8Linear}
    assert made == {name: form_of(kind, name, plain.get_submodule(name).weight.shape) for name in linear}
    assert (kind == "int4") == (RowMajorInt4Linear in made.values())
    assert relative(features_of(model), features_of(plain)) < 0.05
    again = copy.deepcopy(plain)
    Quantization(kind).apply(again, calibrate)
    assert torch.equal(features_of(model), features_of(again))


def test_a_layer_that_is_not_called_is_an_error():
    with pytest.raises(RuntimeError, match="were not called"):
        Quantization("int8").apply(copy.deepcopy(tiny_model()), lambda model: None)


def test_kinds_and_devices():
    Quantization("none").check(torch.device("meta"))
    with pytest.raises(UsageError, match="works on the CPU"):
        Quantization("int8").check(torch.device("meta"))


@pytest.mark.parametrize("weights_of", [int8_weights, row_major_int4_weights])
@pytest.mark.parametrize("out", [100, 256, 330])
def test_weights_quantised_piece_by_piece_are_the_same(weights_of, out, monkeypatch):
    weight = layer_of(out=out).weight
    whole = weights_of(weight, LARGE)
    monkeypatch.setattr("evoprune.backend.cpu.quantize.PIECE_WEIGHTS", 64 * 96)
    pieces = weights_of(weight, LARGE)
    assert whole.keys() == pieces.keys() and all(torch.equal(whole[name], pieces[name]) for name in whole)


@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_threads_change_no_more_than_float32_does(kind):
    """On some CPUs the last bit of float32 products, such as the patch embedding, depends on the number of threads."""
    plain, found, without = copy.deepcopy(tiny_model()), [], []
    model = copy.deepcopy(plain)
    Quantization(kind).apply(model, calibrate)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(features_of(model))
            without.append(features_of(plain))
    finally:
        torch.set_num_threads(before)
    for features, exact in zip(found, without, strict=True):
        # A byte that is rounded the other way is one step of many: less than the error of rounding itself.
        assert (
            torch.equal(features, found[0]) if torch.equal(exact, without[0]) else relative(features, found[0]) < 0.02
        )


# --- row-major weights ---
row_major = pytest.mark.skipif(
    not quantize._has_row_major_products(), reason="this CPU has no fast and exact products of row-major weights"
)


def in_rows(layer, large=None) -> RowMajorInt8Linear:
    return RowMajorInt8Linear(int8_weights(layer.weight, large), layer.weight.shape, layer.bias)


@row_major
@pytest.mark.parametrize("large", [None, LARGE])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_row_major_weights_give_the_same_prompt(large, bias, dtype):
    layer = layer_of(bias=bias)
    for shape in ((1,), (3,), (2, 300), (513,)):
        x = torch.randn(*shape, 96).to(dtype)
        torch.testing.assert_close(in_rows(layer, large)(x), int8(layer, large)(x), rtol=1e-2, atol=1e-4)


@row_major
@pytest.mark.parametrize("large", [None, LARGE])
def test_a_row_of_a_long_prompt_is_the_same_in_a_short_one(large):
    layer = in_rows(layer_of(bias=True), large)
    x = torch.randn(MANY_ROWS + 100, 96)
    together, fewer = layer(x)[: MANY_ROWS - 1], layer(x[: MANY_ROWS - 1])
    torch.testing.assert_close(together, fewer, rtol=0, atol=1e-5)
    if large is None:
        assert torch.equal(together, fewer)


@row_major
@pytest.mark.parametrize("large", [None, LARGE])
def test_only_row_major_weights_are_rounded_while_decoding(compiled, large):  # noqa: F811
    layer, x = layer_of(bias=True), torch.randn(9, 96)
    if large is not None:
        x[:, large] *= 50
    made = in_rows(layer, large)
    rest = layer.weight.clone()
    if large is not None:
        rest[:, large] = 0
    weights = rounded(rest, 127) + (layer.weight - rest)
    expected = x.double() @ weights.double().T + layer.bias
    with Quantization.decoding():
        together = made(x)
        one_by_one = torch.cat([made(row) for row in x.split(1)])
    assert relative(together.double(), expected) < 4e-3
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6 * float(expected.abs().max()))
    if large is None:
        assert torch.equal(together, one_by_one)


def in_four_bits(layer, large) -> RowMajorInt4Linear:
    return RowMajorInt4Linear(row_major_int4_weights(layer.weight, large), layer.weight.shape, layer.bias)


def with_unpacked_weights(layer, made) -> nn.Linear:
    """Return a copy of a layer with the weights that `made` keeps in 4 bits, in float32."""
    unpacked = copy.deepcopy(layer)
    unpacked.weight.copy_(made._weights(0, made.out_features) * made.scale[:, None])
    unpacked.weight[:, made.large] = layer.weight[:, made.large]
    return unpacked


@row_major
@pytest.mark.parametrize("large", [LARGE[:0], LARGE])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_unpacked_for_prompts(compiled, large, bias, dtype):  # noqa: F811
    layer = layer_of(bias=bias)
    made = in_four_bits(layer, large)
    expected = int8(with_unpacked_weights(layer, made), large)
    for shape in ((1,), (3,), (2, 300), (513,)):
        x = torch.randn(*shape, 96).to(dtype)
        torch.testing.assert_close(made(x), expected(x), rtol=1e-2, atol=1e-4)


@row_major
def test_a_large_layer_is_unpacked_in_pieces(compiled, monkeypatch):  # noqa: F811
    made, x = in_four_bits(layer_of(out=320), LARGE), torch.randn(5, 96)
    expected = made(x)
    asked = []
    unpack = made._weights
    monkeypatch.setattr(made, "_weights", lambda first, last: asked.append((first, last)) or unpack(first, last))
    monkeypatch.setattr("evoprune.backend.cpu.quantize.PIECE_FEATURES", 128)
    assert torch.equal(made(x), expected) and asked == [(0, 128), (128, 256), (256, 320)]


@row_major
@pytest.mark.parametrize("large", [LARGE[:0], LARGE])
def test_four_bits_decode(compiled, large):  # noqa: F811
    layer, x = layer_of(), torch.randn(9, 96)
    x[:, large] *= 50
    made = in_four_bits(layer, large)
    expected = with_unpacked_weights(layer, made)(x)
    with Quantization.decoding():
        together = made(x)
        one_by_one = torch.cat([made(row) for row in x.split(1)])
    assert relative(together, expected) < 0.01
    torch.testing.assert_close(together, one_by_one, rtol=0, atol=1e-6 * float(expected.abs().max()))


@row_major
def test_four_bits_take_nine_sixteenths_of_eight(compiled):  # noqa: F811
    layer = layer_of(64, 4096, bias=False)
    eight, four = int8_weights(layer.weight), row_major_int4_weights(layer.weight, LARGE[:0])
    assert four["packed"].nbytes / eight["whole"].nbytes == 9 / 16


@pytest.mark.skipif(not quantize.has_exact_products(127), reason="no int8 on this CPU")
def test_four_bits_need_the_compiled_library(monkeypatch):
    use(None, monkeypatch)
    assert Quantization.kinds(torch.device("cpu")) == ["int8"]
    with pytest.raises(UsageError, match="compiled library") as raised:
        Quantization("int4").check(torch.device("cpu"))
    assert "int8" in raised.value.hint


def forms_of(kind: str) -> dict[str, set[type]]:
    """Return the forms of the layers in the tower and in the language model, without the output layer."""
    model = copy.deepcopy(tiny_model())
    Quantization(kind).apply(model, calibrate)
    forms = {"visual": set(), "language_model": set()}
    for name, layer in model.named_modules():
        if isinstance(layer, Int8Linear) and name != "lm_head":
            forms["visual" if "visual" in name else "language_model"].add(type(layer))
    return forms


@row_major
@pytest.mark.parametrize(("kind", "form"), [("int8", RowMajorInt8Linear), ("int4", RowMajorInt4Linear)])
def test_only_the_language_model_has_row_major_weights(compiled, kind, form):  # noqa: F811
    assert forms_of(kind) == {"visual": {Int8Linear}, "language_model": {form}}


@pytest.mark.parametrize("kind", parameters("int8"))
def test_without_a_library_all_weights_are_packed(kind, monkeypatch):
    use(None, monkeypatch)
    assert forms_of(kind) == {"visual": {Int8Linear}, "language_model": {Int8Linear}}


@pytest.mark.parametrize("shape", [(63, 96), (64, 100)])
def test_other_shapes_have_packed_weights(compiled, shape):  # noqa: F811
    assert not RowMajorInt8Linear.suits(shape)
