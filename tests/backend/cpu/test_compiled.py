"""Test the products of the compiled library, and that evoprune works without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from evoprune.backend import Quantization
from evoprune.backend.cpu import compiled as module
from evoprune.backend.cpu import four_bits
from evoprune.backend.cpu.quantize import (
    RowMajorInt4Linear,
    RowMajorInt8Linear,
    int8_weights,
    row_major_int4_weights,
)
from tests.backend.cpu.library import compile_library, compiled, library, use  # noqa: F401
from tests.threads import one_thread  # noqa: F401

SHAPES = [(64, 32), (96, 64), (32, 96), (64, 2080), (32, 8192)]
NONE, LARGE = torch.zeros(0, dtype=torch.int64), torch.tensor([3, 17])


def random_layer(outputs, length, bias=True) -> nn.Linear:
    torch.manual_seed(outputs + length)
    layer = nn.Linear(length, outputs, bias=bias).requires_grad_(False)
    layer.weight *= torch.rand(outputs, 1) * 3
    return layer


def eight_bits(layer, large=NONE):
    """A layer in 8 bits, and the weights that it stands for, float64."""
    weights = int8_weights(layer.weight, large)
    exact = weights["whole"].double() * weights["scale"].double()[:, None]
    exact[:, large] = layer.weight[:, large].double()
    return RowMajorInt8Linear(weights, layer.weight.shape, layer.bias), exact


def four_bits_of(layer, large=NONE):
    """A layer in 4 bits, and the weights that it stands for, float64."""
    weights = row_major_int4_weights(layer.weight, large)
    exact = by_hand(weights["packed"], layer.in_features)
    exact[:, large] = layer.weight[:, large].double()
    return RowMajorInt4Linear(weights, layer.weight.shape, layer.bias), exact


def by_hand(packed, length):
    """Read packed weights byte by byte, as four_bits.py describes the layout. Returns float64 `[N, length]`."""
    rows = []
    for row in packed:
        numbers = []
        for chunk in row.split(144):
            scales = chunk[128:].clone().view(torch.bfloat16).tolist()
            for block, scale in enumerate(scales):
                both = chunk[block // 2 * 32 :][:32].tolist()
                numbers += [((byte >> 4 if block % 2 else byte & 15) - 8) * scale for byte in both]
        assert not any(numbers[length:])
        rows.append(numbers[:length])
    return torch.tensor(rows, dtype=torch.float64)


def rounded(x):
    """Round rows in blocks of 32 to 127 steps on either side of zero."""
    blocks = x.double().unflatten(-1, (-1, 32))
    step = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return ((blocks / step).round() * step).flatten(-2)


def answer(layer, x):
    with Quantization.decoding():
        return layer(x)


@pytest.mark.few(37)
@pytest.mark.parametrize("large", [NONE, LARGE], ids=["none", "large"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_eight_bits_are_multiplied_by_float32(compiled, outputs, length, count, bias, large):  # noqa: F811
    layer = random_layer(outputs, length, bias)
    made, weights = eight_bits(layer, large)
    x = torch.randn(count, length)
    check_product(made, x, x.double() @ weights.T, layer.bias)


@pytest.mark.few(37)
@pytest.mark.parametrize("large", [NONE, LARGE], ids=["none", "large"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_four_bits_are_multiplied_by_rounded_rows(compiled, outputs, length, count, bias, large):  # noqa: F811
    layer = random_layer(outputs, length, bias)
    made, weights = four_bits_of(layer, large)
    x = torch.randn(count, length) * 3
    exact = rounded(x.index_fill(1, large, 0.0)) @ weights.T + x[:, large].double() @ weights[:, large].T
    check_product(made, x, exact, layer.bias)


def test_clang_compiles_the_same_products(tmp_path, monkeypatch):
    """Without OpenMP, which clang may lack, and without any warning."""
    made = compile_library(shutil.which("clang"), tmp_path, "-Wall", "-Werror", "-Wno-unknown-pragmas")
    use(made, monkeypatch)
    for outputs, length in SHAPES:
        layer = random_layer(outputs, length)
        x = torch.randn(3, length)
        eight, weights = eight_bits(layer, LARGE)
        check_product(eight, x, x.double() @ weights.T, layer.bias)
        four, weights = four_bits_of(layer)
        check_product(four, x, rounded(x) @ weights.T, layer.bias)


def test_the_library_is_left_out_without_a_compiler(tmp_path):
    folder = Path(module.__file__).parents[3]
    command = [sys.executable, "-c", "import setuptools; setuptools.setup()", "build_ext"]
    environment = os.environ | {"CC": str(tmp_path / "no-compiler"), "LDSHARED": str(tmp_path / "no-compiler")}
    outputs = ("--build-lib", str(tmp_path / "lib"), "--build-temp", str(tmp_path / "temp"))
    done = subprocess.run([*command, *outputs], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so")) and "_rows" in done.stdout + done.stderr


def check_product(made, x, exact, bias) -> None:
    exact = exact if bias is None else exact + bias.double()
    y = answer(made, x)
    assert y.dtype == torch.float32 and (y - exact).abs().max() < 1e-5 * exact.abs().max()
    assert all(torch.equal(answer(made, x[row : row + 1])[0], y[row]) for row in range(len(x)))


@pytest.mark.parametrize("form", [eight_bits, four_bits_of])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threads_and_the_layout_of_the_rows_change_nothing(compiled, form, dtype):  # noqa: F811
    made, _ = form(random_layer(96, 320), LARGE)
    x = torch.randn(4, 640).to(dtype)[:, ::2]
    expected = answer(made, x.clone(memory_format=torch.contiguous_format))
    assert expected.dtype == dtype
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(answer(made, x), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_unpacked_weights_are_the_nearest_of_eight_bits(compiled, outputs, length):  # noqa: F811
    packed, scale = four_bits.pack(random_layer(outputs, length).weight)
    whole, near = module.unpack(packed, scale, length), by_hand(packed, length)
    assert whole.shape == near.shape and whole.dtype == torch.int8 and whole.abs().max() == 127
    assert ((whole * scale[:, None].double() - near).abs() <= 0.5001 * scale[:, None]).all()


@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_each_weight_is_rounded_to_one_of_sixteen(outputs, length):
    weights = random_layer(outputs, length).weight
    packed, _ = four_bits.pack(weights)
    assert packed.shape == (outputs, four_bits.packed_bytes(length)) and packed.dtype == torch.uint8
    near = by_hand(packed, length)
    blocks, error = weights.unflatten(1, (-1, 32)), (near - weights).unflatten(1, (-1, 32))
    # If the largest weight is -8.5 steps, one at the other end may be 8.5 steps, of which 7 can be stored.
    largest = blocks.abs().amax(-1, keepdim=True)
    assert (error.abs() <= largest * 1.51 / 8.5).all()


def test_the_end_of_a_block_with_the_smallest_error_is_chosen():
    weights = torch.randn(64, 2048)
    errors = [error_of(weights)]
    for end in four_bits.ENDS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(four_bits, "ENDS", (end,))
            errors.append(error_of(weights))
    best, *each = errors
    torch.testing.assert_close(best, torch.stack(each).amin(0), rtol=1e-4, atol=0)
    assert all((best < other).any() for other in each)
    assert best.sum() < 0.0072 * weights.square().sum()  # 0.0074 with the first end alone


def error_of(weights):
    """The squared error of each block of packed weights."""
    near = by_hand(four_bits.pack(weights)[0], weights.shape[1])
    return (near - weights).square().unflatten(1, (-1, 32)).sum(-1)


def test_zeros_constants_and_tiny_weights(compiled):  # noqa: F811
    layer = nn.Linear(512, 32, bias=False).requires_grad_(False)
    layer.weight.zero_()
    layer.weight[1] = 2.5
    layer.weight[2, :32] = -1e-41  # too small for a scale in bf16
    layer.weight[3, 40] = 7.0
    made, _ = four_bits_of(layer)
    torch.testing.assert_close(answer(made, torch.ones(1, 512)), layer.weight.sum(1)[None], rtol=5e-3, atol=1e-6)
    assert not answer(made, torch.zeros(2, 512)).any()
    packed, scale = four_bits.pack(layer.weight)
    torch.testing.assert_close(module.unpack(packed, scale, 512) * scale[:, None], layer.weight, rtol=5e-3, atol=1e-6)


def test_large_channels_cost_the_others_no_precision(compiled):  # noqa: F811
    layer = random_layer(256, 512, bias=False)
    x = torch.randn(20, 512)
    x[:, LARGE] *= 1000
    layer.weight[:, LARGE] /= 1000
    made, weights = four_bits_of(layer, LARGE)
    y, exact = answer(made, x), x.double() @ weights.T
    assert (y - exact).norm() < 0.01 * exact.norm()


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_numbers_that_are_none_are_not_hidden(compiled, number):  # noqa: F811
    layer = random_layer(64, 512)
    x = torch.randn(2, 512)
    x[1, 40] = number
    y = answer(four_bits_of(layer)[0], x)
    assert y[0].isfinite().all() and not y[1].isfinite().any()
    layer.weight[3, 300] = number
    made = RowMajorInt4Linear(row_major_int4_weights(layer.weight, NONE), layer.weight.shape)
    for y in (answer(made, x[:1]), made(x[:1])):
        assert not y[0, 3].isfinite() and y[0, :3].isfinite().all() and y[0, 4:].isfinite().all()


@pytest.mark.parametrize("content", ["noise", "nothing of ours", "older"])
def test_another_library_is_left_out(content, tmp_path, library, monkeypatch):  # noqa: F811
    path = tmp_path / "_rows.so"
    if content == "noise":
        path.write_bytes(b"no library")
    elif content == "older":
        path = Path(library._name)
        monkeypatch.setattr(module, "LAYOUT", module.LAYOUT + 1)
    else:
        (tmp_path / "empty.c").write_text("int other(void) { return 1; }\n")
        subprocess.run(["cc", "-shared", "-fPIC", tmp_path / "empty.c", "-o", path], check=True)
    assert module.load(str(path)) is None
