import pytest
import torch

from evoprune.methods import select
from evoprune.methods.evoprune import FarthestPoints
from evoprune.methods.types import Tokens
from experiments.distances import DISTANCES, TODAY, using
from experiments.geometry import common, duplicated, gains, shares_kept

GRID = (4, 6, 8)


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(4 * 6 * 8, 24, generator=generator).cumsum(0)
    return Tokens(rows, torch.arange(len(rows)), GRID, 0)


def kept(tokens: Tokens, rows: torch.Tensor) -> set[int]:
    changed = Tokens(rows, tokens.owner, GRID, 0)
    return set(FarthestPoints().select(changed, 20).kept.tolist())


@pytest.mark.parametrize("name", [name for name in DISTANCES if "centred" in name or "standardised" in name])
def test_a_common_part_changes_nothing_where_it_is_taken_off(tokens, name):
    with using(DISTANCES[name]):
        assert kept(tokens, tokens.rows) == kept(tokens, common(3)(tokens.rows, torch.Generator()))


def test_gains_change_a_standardised_distance_little(tokens):
    changed = gains(0.3)(tokens.rows, torch.Generator())
    with using(DISTANCES["standardised"]):
        assert len(kept(tokens, tokens.rows) & kept(tokens, changed)) >= 18


def test_the_distance_is_restored():
    before = select.places_and_salience
    with pytest.raises(ValueError), using(DISTANCES["standardised"]):
        assert select.places_and_salience is not before
        raise ValueError
    assert select.places_and_salience is before and DISTANCES[TODAY] is None


def test_duplicates_stand_at_the_right_of_what_was_there(tokens):
    wide = duplicated(tokens, torch.Generator())
    owner = wide.owner.view(wide.grid)
    assert torch.equal(owner[:, :, :8].flatten(), tokens.owner) and wide.grid[2] * 4 * 6 - len(tokens.rows) >= 2000
    assert torch.allclose(wide.rows[owner[:, :, 8:].flatten()].std(0).mean(), torch.tensor(0.0), atol=0.2)


def test_every_change_has_a_share(tokens):
    found = dict(shares_kept(tokens, 20, FarthestPoints()))
    assert len(found) == 12 and all(0 <= share <= 1 for share in found.values())
