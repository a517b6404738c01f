"""Test the Triton kernels in Triton's interpreter on a CPU. test_kernels.py runs this file in a separate process."""

import pytest
import torch

from evoprune.backend import greedy_cosine, kernels, operators
from tests.backend.cases import SHAPES, clusters, means, points, unit_rows

EVERY = pytest.mark.parametrize("name", SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["32", "b16"])
@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("length", [1, 2, 45])
def test_places(length, projected, dtype):
    random = torch.Generator().manual_seed(length)
    rows = (torch.randn(length, 70, generator=random) * torch.linspace(0.1, 9, 70) + 3).to(dtype)
    owner = torch.cat([torch.randint(-1, length, (60,), generator=random), torch.zeros(1, dtype=torch.int64)])
    args = rows, owner, torch.randn(70, 16, generator=random) / 4 if projected else None, 16384
    count = operators.unit_counts(owner, length)
    place, salience = kernels.standard_places(rows, count, args[2], 16384, operators.VARIANCE_FLOOR, operators.ROUNDING)
    expected = operators.standard_places(*args)
    torch.testing.assert_close(place, expected[0], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(salience, expected[1], atol=1 / 16384, rtol=0)
    same = kernels.standard_places(
        rows[:1].expand(9, -1), torch.ones(9), None, 16384, operators.VARIANCE_FLOOR, operators.ROUNDING
    )
    assert not same[0].any() and not same[1].any()


@EVERY
def test_radii(name):
    args = points(SHAPES[name], 1)
    expected = operators._tube_radii(*args, 1)
    assert torch.equal(kernels.tube_radii(*args, 1), expected)


@EVERY
@pytest.mark.parametrize("step", [1, 4, 1000])
def test_the_nearest(name, step):
    place, half, weight, _, row, time, _ = points(SHAPES[name], 3)
    args = place, half, weight, row, time, (row >= 0).nonzero()[::step, 0]
    assert torch.equal(kernels.nearest_selected(*args), operators._nearest_selected(*args))


def test_distances_are_rounded_to_even():
    """The times of the points lead to distances of 0.5, 1.5 and 2.5, which must be rounded as in torch."""
    place, half, weight, row = torch.zeros(1, 16), torch.zeros(1), torch.ones(1), torch.zeros(4, dtype=torch.int64)
    args = place, half, weight, torch.zeros(1), row, torch.tensor([0.0, 0.5, 1.5, 2.5]), torch.arange(4)[None]
    assert torch.equal(kernels.tube_radii(*args, 4), operators._tube_radii(*args, 4))


@EVERY
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float32, 0), (torch.float16, 0), (torch.bfloat16, 2**-7)], ids=["32", "16", "b16"]
)
def test_means(name, dtype, error):
    """The interpreter truncates numbers when it converts them to bf16, so the tolerance depends on the dtype."""
    args = clusters(SHAPES[name], 4, dtype)
    torch.testing.assert_close(kernels.mean_rows(*args), operators._mean_rows(*args), rtol=error, atol=0)


@pytest.mark.few(5)
@pytest.mark.parametrize("units", [1, 5, 24])
@pytest.mark.parametrize("threshold", [0.0, 8.0])
@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize("kind", ["cut", "noise", "still"])
def test_reuse(units, kind, known, threshold):
    frames = means(3, units, 0, kind)
    held = frames[0] if not known else means(1, units, 1, kind)[0]
    args = frames, held, torch.full((units,), -2), known, 7, threshold
    before = [x.clone() for x in args[:3]]
    made = kernels.reuse_scan(*args, operators.BLOCKS, operators.CHANNELS, operators.BRIGHTNESS)
    expected = operators.reuse_scan(*args)
    assert torch.equal(made[0], expected[0]) and torch.equal(made[2], expected[2])
    torch.testing.assert_close(made[1], expected[1], rtol=1e-6, atol=0)
    assert all(torch.equal(x, then) for x, then in zip(args[:3], before, strict=True))


@pytest.mark.parametrize("rows", [1, 2, 19, 130])
@pytest.mark.parametrize("kind", ["plain", "weight", "bonus"])
@pytest.mark.parametrize("from_nearest", [False, True])
@pytest.mark.parametrize("held", [1, 1 << 26])
def test_greedy(rows, kind, from_nearest, held, monkeypatch):
    monkeypatch.setattr(kernels, "COSINES_HELD", held)
    unit, value = unit_rows(rows, 3)
    args = unit, value if kind == "weight" else None, value if kind == "bonus" else None, 0.5
    for keep in {1, -(-rows // 4), min(rows, 20)}:
        expected = greedy_cosine(*args, keep, from_nearest)
        assert torch.equal(kernels.greedy_cosine(*args, keep, from_nearest), expected)
