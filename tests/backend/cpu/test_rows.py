"""Test the compiled product of a few rows with 8-bit weights, and that evoprune works without it."""

import pytest
import torch

from evoprune.backend.cpu import rows
from tests.compiled import compiled, library  # noqa: F401
from tests.threads import one_thread  # noqa: F401

SHAPES = [(96, 64), (2048, 2048), (512, 11008)]


@pytest.fixture(params=["compiled", "PyTorch's"])
def product(request, monkeypatch):
    """Both products, and the rounding error of their rows."""
    if request.param == "compiled":
        request.getfixturevalue("compiled")
    else:
        monkeypatch.setattr(rows, "library", lambda: None)
    return rows.row_product, 1e-6 if request.param == "compiled" else 1e-2


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 9])
@pytest.mark.parametrize(("outputs", "length"), SHAPES)
def test_the_product_is_right_and_each_row_is_independent(product, outputs, length, count):
    multiply, error = product
    random = torch.Generator().manual_seed(count)
    weights = torch.randint(-127, 128, (outputs, length), generator=random, dtype=torch.int8)
    scale = torch.rand(outputs, generator=random)
    x = torch.randn(count, length, generator=random)
    y = multiply(x, weights, scale)
    exact = x.double() @ weights.double().T * scale.double()
    assert y.dtype == torch.float32 and (y - exact).abs().max() < error * exact.abs().max()
    assert all(torch.equal(multiply(x[row : row + 1], weights, scale)[0], y[row]) for row in range(count))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_threads_and_the_layout_of_the_rows_change_nothing(compiled, dtype):  # noqa: F811
    weights = torch.randint(-127, 128, (96, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    x = torch.randn(4, 128, generator=torch.Generator().manual_seed(1)).to(dtype)[:, ::2]
    made = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            made.append(rows.row_product(x, weights, torch.ones(96)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])


def test_what_is_no_library_is_left_out(tmp_path):
    (tmp_path / "_rows.so").write_bytes(b"no library")
    assert rows.load(str(tmp_path / "_rows.so")) is None
