"""Variants of `evoprune`: as it is without their settings, and each setting does what it says."""

import pytest
import torch

from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.plans import TowerShape
from evoprune.methods.types import Tokens
from experiments.distances import DISTANCES
from experiments.variants import Variant

GRID = (4, 6, 8)
UNITS = 4 * 6 * 8
TOWER = TowerShape(depth=16, full_layers=(3, 7, 11, 15), window=4)


def inner(method):
    """The selector of its first stage, between two layers."""
    return method.stages(TowerShape(8, (1, 3, 5, 7)), (4, 5, 6), 30)[0].selector


@pytest.fixture
def tokens():
    rows = torch.randn(UNITS, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float32).cumsum(0)
    return Tokens(rows, torch.arange(UNITS), GRID, 0)


def test_without_settings_it_is_evoprune(tokens):
    plain, same = inner(EvoPrune()).select(tokens, 30), inner(Variant()).select(tokens, 30)
    assert torch.equal(plain.kept, same.kept) and torch.equal(plain.owner, same.owner)
    counts = [
        [(stage.first_layer, stage.rows) for stage in method.stages(TOWER, GRID, 30)]
        for method in (Variant(), EvoPrune())
    ]
    assert counts[0] == counts[1]
    assert plain.averages is same.averages is False
    needs = [[stage.selector.needs for stage in method.stages(TOWER, GRID, 30)] for method in (Variant(), EvoPrune())]
    assert needs[0] == needs[1] and len(needs[0]) == 2
    plain, same = EvoPrune().tokens.select(tokens, 30), Variant().tokens.select(tokens, 30)
    assert torch.equal(plain.kept, same.kept) and plain.weight is same.weight is None


def test_units_of_contrast_are_selected_first(tokens):
    patches = tokens.rows.view(UNITS, 4, -1)
    patches[:] = patches.mean(1, keepdim=True)  # without contrast
    patches[::5] += 1.5 * torch.randn(patches[::5].shape, generator=torch.Generator().manual_seed(1))
    plain, found = (set(inner(m).select(tokens, 30).kept.tolist()) for m in (EvoPrune(), Variant(contrast=3)))
    units = set(range(0, UNITS, 5))
    assert len(found & units) > len(plain & units)


@pytest.mark.parametrize("name", DISTANCES)
def test_every_distance_selects(tokens, name):
    assert len(inner(Variant(distance=name)).select(tokens, 30).kept) == 30


def test_an_unknown_distance_is_refused():
    with pytest.raises(ValueError, match="distance is one of today"):
        Variant(distance="far")
