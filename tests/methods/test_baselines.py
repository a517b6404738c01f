"""Random tokens: even over frame pairs, each as likely, the same for a seed."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods.baselines import Random
from evoprune.methods.plans import spread
from evoprune.methods.types import Tokens


def select(grid, keep, seed=0):
    n = grid[0] * grid[1] * grid[2]
    return Random().select(Tokens(torch.zeros(n, 2), torch.arange(n), grid, seed), keep).kept


@settings(deadline=None, max_examples=50)
@given(st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)), st.data(), st.integers(0, 2**63 - 1))
def test_the_count_is_exact_and_spread_over_the_pairs(grid, data, seed):
    n = grid[0] * grid[1] * grid[2]
    keep = data.draw(st.integers(1, n))
    kept = select(grid, keep, seed)
    assert kept.dtype == torch.int64 and len(kept) == keep
    assert (kept.diff() > 0).all() and kept[0] >= 0 and kept[-1] < n
    assert torch.bincount(kept // (grid[1] * grid[2]), minlength=grid[0]).tolist() == spread(keep, grid[0])


def test_a_seed_gives_one_draw_and_another_seed_another():
    assert torch.equal(select((3, 5, 6), 20, 7), select((3, 5, 6), 20, 7))
    assert len({tuple(select((3, 5, 6), 20, seed).tolist()) for seed in range(20)}) == 20
    large = [
        0,
        2**32,
        2**33,
        5 + 2**32,
        5,
        2**63 - 1,
        2**32 - 1,
        -1,
    ]  # of which torch's CPU generator takes the low 32 bits
    assert len({tuple(select((3, 5, 6), 20, seed).tolist()) for seed in large}) == len(large)


def test_what_a_plug_in_seeds_its_generator_with_fits_it():
    tokens = Tokens(torch.zeros(4, 2), torch.arange(4), (1, 2, 2), 2**40)
    assert 0 <= tokens.seed < 2**32 and tokens.copied().seed == tokens.seed
    assert Tokens(torch.zeros(4, 2), torch.arange(4), (1, 2, 2), 7).seed == 7


@pytest.mark.parametrize("keep", [6, 12])
def test_every_unit_is_as_likely_as_any_other(keep):
    draws = 600
    counts = torch.bincount(torch.cat([select((2, 3, 4), keep, seed) for seed in range(draws)]), minlength=24)
    expected = draws * keep / 24
    assert ((counts - expected).abs() < 5 * expected**0.5).all()


def test_pairs_do_not_repeat_each_others_draw():
    kept = select((2, 10, 10), 50, 3)
    first, second = kept[:25].tolist(), (kept[25:] - 100).tolist()
    assert first != second
