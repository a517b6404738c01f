"""All implementations of the selection operators agree, and the radii are correct."""

import pytest
import torch

from evoprune.backend import operators
from tests.backend.cases import SHAPES, clusters, points
from tests.threads import one_thread  # noqa: F401

EVERY = pytest.mark.parametrize("name", SHAPES)
KEEP = pytest.mark.parametrize("share", [0.0, 0.3, 1.0])


@EVERY
@KEEP
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_radii_are_the_same_in_the_form_of_the_cpu(name, share, held, monkeypatch):
    """Only the `keep` largest radii are compared, because the CPU may leave all others at 0."""
    monkeypatch.setattr(operators, "MAX_DISTANCES", held)
    args = points(SHAPES[name], 1)
    keep = max(1, round(share * int((args[4] >= 0).sum())))
    plain = operators._tube_radii(*args, keep)
    made = operators.tube_radii(*args, keep)
    assert made.dtype == torch.float32 and made.shape == args[4].shape
    first = plain >= plain.sort(descending=True).values[keep - 1]
    assert torch.equal(made[first], plain[first]) and ((made == plain) | (made == 0)).all()
    assert torch.equal(made < 0, args[4] < 0)
    assert torch.equal(plain, operators._tube_radii(*args, 1))


@EVERY
@KEEP
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_the_nearest_is_the_same_in_the_form_of_the_cpu(name, share, held, monkeypatch):
    place, half, weight, _, row, time, _ = points(SHAPES[name], 3)
    there = (row >= 0).nonzero()[:, 0]
    selected = there[:: max(1, round(1 / (share or 1e-3)))]
    args = place, half, weight, row, time, selected
    expected = operators._nearest_selected(*args)
    monkeypatch.setattr(operators, "MAX_DISTANCES", held)
    monkeypatch.setattr(operators, "MAX_DISTANCES_ON_DEVICE", max(held, len(selected)))
    assert torch.equal(operators.nearest_selected(*args), expected)
    assert torch.equal(operators._nearest_selected(*args), expected)
    assert torch.equal(expected < 0, row < 0)
    assert torch.equal(expected[selected], torch.arange(len(selected)))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("held", [1, 1 << 23])
def test_means_are_the_same_in_the_form_of_the_cpu(name, dtype, held, monkeypatch):
    rows, into, row, weight, count = args = clusters(SHAPES[name], 4, dtype)
    monkeypatch.setattr(operators, "MAX_DISTANCES", held)
    made = operators.mean_rows(*args)
    assert made.dtype == dtype and torch.equal(made, operators._mean_rows(*args))
    for mean in range(count):
        mine = into == mean
        total = (weight[mine][:, None] * rows[row[mine]].float()).sum(0)
        assert torch.equal(made[mean], (total / weight[mine].sum()).to(dtype))
