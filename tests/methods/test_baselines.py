"""Compare each baseline with a line-by-line implementation of its specification, on random and adversarial features."""

from math import prod

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.backend.cosine import nearest_cosine
from evoprune.methods import snap
from evoprune.methods.baselines import Random, smaller_frame
from evoprune.methods.plans import spread
from evoprune.methods.types import Selection, Tokens
from tests.methods.tokens import KINDS, cosine, features_of, first_of, selected, tokens_of

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def divprune_line_by_line(x: torch.Tensor, keep: int) -> list[int]:
    n = len(x)
    distance = [[1 - cosine(a, b) for b in x] for a in x]
    nearest = [min((distance[i][j] for j in range(n) if j != i), default=0) for i in range(n)]
    picked = [first_of(nearest, max)]
    while len(picked) < keep:
        score = [-1.0 if i in picked else min(distance[i][j] for j in picked) for i in range(n)]
        picked.append(first_of(score, max))
    return sorted(picked)


def evs_line_by_line(tokens: Tokens, keep: int, floor: bool) -> list[int]:
    t, h, w = tokens.grid
    x, place = tokens.features, h * w
    score = [1 - cosine(x[i], x[i - place]) for i in range(place, t * place)]
    first = score[:place] if t > 1 else [0.0] * place
    score = ([float("inf")] * place if floor else first) + score
    order = sorted(range(t * place), key=lambda i: (-score[i], i))
    return sorted(order[: max(keep, place) if floor else keep])


@pytest.mark.full
# The same examples every time: in rounding ties, the last bits of two ways to compute a cosine decide.
@settings(max_examples=80, deadline=None, derandomize=True)
@given(grids, st.sampled_from(KINDS), st.integers(0, 1000), st.data())
def test_they_do_what_their_papers_say(grid, kind, seed, data):
    keep = data.draw(st.integers(1, prod(grid)))
    tokens = tokens_of(kind, grid, seed)
    assert selected("divprune", tokens, keep) == divprune_line_by_line(tokens.features, keep)
    assert selected("evs", tokens, keep) == evs_line_by_line(tokens, keep, floor=True)
    assert selected("evs-nofloor", tokens, keep) == evs_line_by_line(tokens, keep, floor=False)


def test_nearest_cosine_over_several_blocks():
    x = torch.nn.functional.normalize(features_of("random", 1300, width=4), dim=1)
    whole = snap(x @ x.T).fill_diagonal_(-torch.inf).amax(1)
    assert (nearest_cosine(x) - whole).abs().max() <= 1 / 16384
    assert nearest_cosine(x[:1]).tolist() == [-torch.inf]


# Constraints that follow from a shape.


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 900))
def test_a_smaller_frame_is_the_nearest_one(height, width, most):
    h, w = smaller_frame(height, width, most)
    assert 1 <= h <= height and 1 <= w <= width
    assert h * w <= max(1, most)
    if most >= height * width:
        assert (h, w) == (height, width)

    def like(a, b):  # one side follows from the other, rounded
        return abs(a - b * height / width) < 1 or abs(b - a * width / height) < 1

    assert like(h, w) or 1 in (h, w)
    for a in range(1, height + 1):
        for b in range(1, width + 1):
            assert not (h * w < a * b <= most and like(a, b))


@settings(max_examples=60, deadline=None)
@given(grids, st.data())
def test_input_methods_ask_for_no_more_than_there_is(grid, data):
    keep = data.draw(st.integers(1, prod(grid)))
    t, h, w = methods.get("downscale").resize(grid, keep)
    assert (t, h, w) == (grid[0], *smaller_frame(*grid[1:], keep // grid[0])) and (t * h * w <= keep or h * w == 1)
    t, h, w = methods.get("subsample").resize(grid, keep)
    assert (h, w) == grid[1:] and 1 <= t <= grid[0]
    assert t == 1 or t * h * w <= keep < (t + 1) * h * w or t == grid[0]


@settings(max_examples=60, deadline=None)
@given(grids, st.data())
def test_pooling_is_the_mean_of_blocks(grid, data):
    keep = data.draw(st.integers(1, prod(grid)))
    tokens = tokens_of("random", grid)
    made = methods.get("pool").select(tokens, keep)
    t, h, w = grid
    pairs_left = min(t, keep)
    rows, columns = smaller_frame(h, w, keep // pairs_left)
    assert len(made.kept) == pairs_left * rows * columns <= keep

    def edges(length, count):
        return [i * length // count for i in range(count + 1)]

    x, expected, places = tokens.features.view(t, h, w, -1), [], []
    index = torch.arange(t * h * w).view(t, h, w)
    cuts = [edges(*pair) for pair in zip(grid, (pairs_left, rows, columns), strict=True)]
    for a, b in zip(cuts[0], cuts[0][1:], strict=False):
        for c, d in zip(cuts[1], cuts[1][1:], strict=False):
            for e, f in zip(cuts[2], cuts[2][1:], strict=False):
                expected.append(x[a:b, c:d, e:f].flatten(0, 2).mean(0))
                places.append(int(index[(a + b - 1) // 2, (c + d - 1) // 2, (e + f - 1) // 2]))
    assert made.kept.tolist() == places
    torch.testing.assert_close(made.features(tokens.features), torch.stack(expected))
    assume(keep >= t)
    # Every frame pair keeps its time.
    assert (made.unit_to_token.view(t, -1) // (rows * columns) == torch.arange(t)[:, None]).all()


# kept, owner, weight and means of a selection; rows, and the row of each unit; the tokens.
SHARED = torch.tensor([0, 1, 1, 0]), torch.tensor([1, 3, 2, 2]), torch.tensor([1.0, 1.0, 0.5, 1.0])
SELECTIONS = {
    "units are dropped": ([1, 3], [0, 0, -1, 1], None, None, [1, 3, 9, 5], [0, 1, 2, 3], [2, 5]),
    "units share rows": ([1, 3], [0, 0, -1, 1, 1], None, None, [1, 4, 9], [0, 1, 2, 1, 0], [2.5, 2.5]),
    "tokens share units": ([1, 3], None, None, SHARED, [1, 3, 9, 6], [0, 1, 2, 3], [6, 7]),
    "tokens share rows": ([1, 3], None, None, SHARED, [1, 3, 9, 6], [1, 0, 2, 1], [5, 5]),
    "units have weights": ([0], [0, 0, -1], [3.0, 1.0, 7.0], None, [1, 5, 9], [0, 1, 2], [2]),
}


@pytest.mark.parametrize("at_once", [1, 2, 4096])
@pytest.mark.parametrize("name", SELECTIONS)
def test_the_tokens_of_a_selection(name, at_once, monkeypatch):
    monkeypatch.setattr("evoprune.backend.operators.MAX_DISTANCES", at_once)
    kept, owner, weight, means, rows, of, tokens = SELECTIONS[name]
    made = Selection(*(None if x is None else torch.tensor(x) for x in (kept, owner, weight)), means=means)
    rows, of = torch.tensor(rows).float()[:, None], torch.tensor(of)
    assert made.features(rows, of).flatten().tolist() == tokens == made.features(rows[of]).flatten().tolist()
    assert made.features(rows.bfloat16(), of).dtype == torch.bfloat16


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
    """torch's CPU generator would use only the low 32 bits of a large seed."""
    seeds = [*range(20), 2**32, 2**33, 5 + 2**32, 2**63 - 1, 2**32 - 1, -1]
    assert torch.equal(select((3, 5, 6), 20, 7), select((3, 5, 6), 20, 7))
    assert len({tuple(select((3, 5, 6), 20, seed).tolist()) for seed in seeds}) == len(seeds)
    tokens = Tokens(torch.zeros(4, 2), torch.arange(4), (1, 2, 2), 2**40)  # plug-ins seed their generator with this
    assert 0 <= tokens.seed < 2**32 and tokens.copied().seed == tokens.seed
    assert Tokens(torch.zeros(4, 2), torch.arange(4), (1, 2, 2), 7).seed == 7


@pytest.mark.parametrize("keep", [6, 12])
def test_every_unit_is_as_likely_as_any_other(keep):
    draws = 600
    kept = [select((2, 3, 4), keep, seed) for seed in range(draws)]
    counts, expected = torch.bincount(torch.cat(kept), minlength=24), draws * keep / 24
    assert ((counts - expected).abs() < 5 * expected**0.5).all()
    # Frame pairs draw independently.
    assert sum(torch.equal(each[: keep // 2], each[keep // 2 :] - 12) for each in kept) < draws / 4
