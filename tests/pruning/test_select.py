from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning import select
from evoprune.pruning.budget import spread
from evoprune.pruning.select import STEP, UNPROJECTED, assign_clusters, farthest_points, points_of
from tests.threads import one_thread  # noqa: F401

CASES = {
    "seed": st.integers(0, 9999),
    "grid": st.sampled_from([(1, 4, 6), (4, 3, 2), (6, 2, 2)]),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "alpha": st.sampled_from([0.0, 1.0, 4.0]),
    "dropped": st.sampled_from([0.0, 0.3]),
}


def video(seed, grid, share=0.4, wide=16, dropped=0.0, signs=False):
    """Rows of a video in which that share of units changes from pair to pair, and the row of each unit.

    With `signs` features are of plus and minus 1, so that cosines are exact and many are equal.
    """
    random = torch.Generator().manual_seed(seed)
    t, units = grid[0], grid[1] * grid[2]
    encoded = torch.rand(t, units, generator=random) < share
    encoded[0] = True
    row = (encoded.flatten().cumsum(0) - 1).view(t, units)
    last = torch.where(encoded, torch.arange(t)[:, None], -1).cummax(0).values
    owner = row[last, torch.arange(units)].flatten()
    features = torch.randn(int(encoded.sum()), wide, generator=random)
    owner[torch.rand(len(owner), generator=random) < dropped] = -1
    return features.sign() if signs else features, owner


def pooled(pool, *args, **settings):
    """`farthest_points` with pools of another size."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "POOL", pool)
        return farthest_points(*args, **settings)


def points(features, owner, grid, alpha=1.5, seconds=None):
    return points_of(features, owner, grid, seconds or [float(t) for t in range(grid[0])], alpha)


def exact(features, owner, grid, alpha=1.5, seconds=None):
    """Points at multiples of a quarter, features of plus and minus 1 in 16 channels, so that distances are exact."""
    made, salience = points(features, owner, grid, alpha, seconds), (features[:, :4].sum(1) + 4) / 8
    return replace(
        made,
        place=features / 4,
        half=torch.full_like(made.half, 0.5),
        salience=salience,
        weight=alpha / 2 * salience**2,
    )


def same(grid):
    """Points of a video of one feature."""
    return points(torch.ones(1, 8), torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64), grid)


def definition(every, grid):
    """The distance between a selected unit and another; times are 0, 1, 2 and so on."""
    place, last, row = (
        grid[1] * grid[2],
        max(grid[0] - 1, 1),
        dict(zip(every.units.tolist(), every.row.tolist(), strict=True)),
    )

    def between(i, j):
        time = torch.tensor(i // place / last) - torch.tensor(j // place / last)
        space = (every.place[row[i]] - every.place[row[j]]).square().sum() / 2
        return (((every.weight[row[j]] * time.abs() + space) / STEP).round() * STEP).item()

    return between


def greedy(every, grid, keep, within=0.0, least=0, floor=0.0):
    """One distance at a time, first each pair's share as if there were nothing else; without the even spread of what is left."""
    units, between = every.units.tolist(), definition(every, grid)
    salience = dict(zip(units, every.salience[every.row].tolist(), strict=True))

    def select_from(among, count, selected):
        selected = selected or [max(among, key=lambda u: (salience[u], -u))]
        while len(selected) < count:
            left = {j: min(between(i, j) for i in selected) for j in among if j not in selected}
            far, j = max((d, -j) for j, d in left.items())
            if far <= (within if len(selected) >= least else 0):
                break
            selected = [*selected, -j]
        return selected

    start, places = [], grid[1] * grid[2]
    for pair, share in enumerate(spread(keep, grid[0])):
        there = [u for u in units if u // places == pair]
        few = min(int(floor * share), len(there))
        start += select_from(there, few, []) if few else []
    return sorted(select_from(units, keep, start))


def test_points_are_standardised_features():
    features, owner = video(3, (4, 3, 2), 0.5)
    features = features * torch.linspace(0.1, 30, 16) + 5
    of_units = features[owner].double()
    off = features.double() - of_units.mean(0)
    variance = of_units.var(0, unbiased=False)
    off /= (variance + 1e-3 * variance.mean() + (of_units.mean(0) / 256) ** 2).sqrt()
    length = off.norm(dim=1) * torch.isin(torch.arange(len(off)), owner)
    made = points(features, owner, (4, 3, 2), 1.5)
    torch.testing.assert_close(made.place, (off / length.max()).float(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(made.salience, (length / length.max()).float() ** 2, atol=STEP, rtol=0)
    torch.testing.assert_close(made.weight, 0.75 * made.salience**2)
    torch.testing.assert_close(made.half, made.place.square().sum(1) / 2)
    assert made.time.view(4, 6)[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("wide", [16, 2048])
def test_what_carries_no_information_changes_no_point(wide):
    """A common part, channels that are large in all rows, gains of channels, and the scale of all."""
    features, owner = video(4, (20, 6, 8), 0.7, wide)
    random = torch.Generator().manual_seed(1)
    common, large = torch.randn(wide, generator=random), 1000 * (torch.arange(wide) == 3)
    gain = torch.exp(0.3 * torch.randn(wide, generator=random))
    expected = points(features, owner, (20, 6, 8))
    for changed in (
        features + 3 * common,
        features * gain,
        features + 20 * large / 1000,
        1e4 * features,
        1e-4 * features,
    ):
        made = points(changed, owner, (20, 6, 8))
        assert (made.place - expected.place).norm(dim=1).max() < 0.03
        assert (made.salience - expected.salience).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_features_have_no_distance(dtype):
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in (row.expand(2000, -1), row * 0, row * 1e-20):
        made = points(rows, torch.zeros(24, dtype=torch.int64), (1, 4, 6))
        assert not made.place.any() and not made.salience.any()


def test_time_is_relative_to_the_clip():
    features, owner = video(3, (4, 3, 2), 0.5)
    times = [[0.0, 1.0, 2.0, 3.0], [10.0, 14.0, 18.0, 22.0]]
    one, other = (farthest_points(points(features, owner, (4, 3, 2), 2.0, t), (4, 3, 2), 9) for t in times)
    assert torch.equal(one, other)
    assert points(features[:6], torch.arange(6), (1, 3, 2), seconds=[5.0]).time.tolist() == [0.0] * 6


@settings(deadline=None, max_examples=25)
@given(**CASES, pool=st.sampled_from([1, 3, 7, 100]))
def test_the_selection_is_the_greedy_one(seed, grid, share, alpha, pool, dropped):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    keep = max(1, int((owner >= 0).sum()) // 3)
    every = exact(features, owner, grid, alpha)
    made = pooled(pool, every, grid, keep).tolist()
    hand = greedy(every, grid, keep)
    assert set(hand) <= set(made) and len(made) == keep
    if len(hand) == keep:
        assert made == hand


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 9999), CASES["grid"], st.floats(0, 1), CASES["alpha"], st.sampled_from([0.25, 1.0]))
def test_each_pair_may_have_a_share_of_its_own(seed, grid, kept, alpha, floor):
    features, owner = video(seed, grid, 1.0, signs=True)
    keep, places = max(1, round(kept * len(owner) / 2)), grid[1] * grid[2]
    every = exact(features, owner, grid, alpha)
    made = pooled(3, every, grid, keep, floor=floor)
    hand = greedy(every, grid, keep, floor=floor)
    assert set(hand) <= set(made.tolist()) and len(made) == keep and (len(hand) < keep or made.tolist() == hand)
    counts = torch.bincount(made // places, minlength=grid[0]).tolist()
    assert all(count >= int(floor * share) for count, share in zip(counts, spread(keep, grid[0]), strict=True))


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_a_pair_in_which_nothing_differs_has_its_share_too(floor):
    made = farthest_points(same((4, 2, 3)), (4, 2, 3), 12, floor=floor)
    assert torch.bincount(made // 6, minlength=4).tolist() == [3, 3, 3, 3]


@settings(deadline=None, max_examples=20)
@given(**CASES, piece=st.sampled_from([1, 16, 1 << 20]))
def test_every_unit_belongs_to_the_nearest(seed, grid, share, alpha, piece, dropped):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    every = exact(features, owner, grid, alpha)
    kept = farthest_points(every, grid, max(1, len(every) // 3))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "PIECE", piece)
        clusters = assign_clusters(every, kept, len(owner)).tolist()
    between, selected = definition(every, grid), kept.tolist()
    for unit, cluster in enumerate(clusters):
        if owner[unit] < 0 or unit in selected:
            assert cluster == (selected.index(unit) if unit in selected else -1)
            continue
        far = [between(i, unit) for i in selected]
        assert cluster == far.index(min(far))


@pytest.mark.full
@settings(deadline=None, max_examples=20)
@given(st.integers(0, 9999), st.sampled_from([1, 2, 5, 40]), st.sampled_from([8, 100, 1 << 20]), st.floats(0, 6))
def test_pool_and_piece_are_a_matter_of_speed(seed, pool, piece, alpha):
    grid = (5, 4, 6)
    features, owner = video(seed, grid, 0.3, signs=True)
    every = exact(features, owner, grid, alpha, [0.5, 1.5, 2.0, 4.5, 7.0])
    expected = farthest_points(every, grid, 30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "PIECE", piece)
        assert torch.equal(pooled(pool, every, grid, 30), expected)


@settings(deadline=None, max_examples=20)
@given(
    st.integers(0, 9999),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)),
    st.floats(0, 1),
    st.floats(0, 0.9),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_count_is_exact(seed, grid, share, dropped, budget, dtype):
    features, owner = video(seed, grid, share, 200, dropped)
    owner[0] = 0
    can = (owner >= 0).nonzero()[:, 0]
    every = points(features.to(dtype), owner, grid)
    for keep in {max(1, round(budget * len(can))), 1, len(can)}:
        made = farthest_points(every, grid, keep)
        assert made.dtype == torch.int64 and len(made) == keep
        assert (made.diff() > 0).all() and (owner[made] >= 0).all()
    assert torch.equal(farthest_points(every, grid, len(can)), can)


@pytest.mark.parametrize("keep", [0, -1, 25])
def test_a_count_out_of_range_is_refused(keep):
    with pytest.raises(ValueError, match="cannot select"):
        farthest_points(points(*video(0, (1, 4, 6)), (1, 4, 6)), (1, 4, 6), keep)


def test_one_unit_is_the_most_salient():
    features = torch.ones(24, 8)
    features[17] = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])
    assert farthest_points(points(features, torch.arange(24), (1, 4, 6)), (1, 4, 6), 1).tolist() == [17]


def test_what_stands_out_is_selected_at_its_first_and_last_time():
    """Background and one thing, encoded once in eight pairs: the thing is selected at several times, the background is not."""
    grid, units = (8, 4, 6), 24
    random = torch.Generator().manual_seed(0)
    features = torch.ones(units, 64) + 0.1 * torch.randn(units, 64, generator=random)
    features[9] = torch.randn(64, generator=random)
    owner = torch.arange(units).repeat(8)
    made = farthest_points(points(features, owner, grid), grid, 5).tolist()
    assert {9, 9 + 7 * units} <= set(made)
    assert sum(u % units == 9 for u in made) >= 4
    flat = farthest_points(points(features, owner, grid, 0.0), grid, 5).tolist()
    assert len({u % units for u in flat}) == 5


@pytest.mark.parametrize("grid", [(8, 8, 12), (6, 4, 6), (5, 9, 13), (1, 16, 24)])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.5])
def test_equal_features_are_spread_over_time_and_space(grid, budget):
    t, h, w = grid
    keep = max(1, round(budget * t * h * w))
    made = farthest_points(same(grid), grid, keep)
    per_pair = torch.bincount(made // (h * w), minlength=t)
    assert per_pair.max() - per_pair.min() <= 1
    # Over all pairs, each quarter of the frame has about its share, and no place is taken over and over again.
    y, x = made // w % h, made % w
    quarters = torch.bincount((y * 2 // h) * 2 + x * 2 // w, minlength=4)
    tall, broad = torch.bincount(torch.arange(h) * 2 // h), torch.bincount(torch.arange(w) * 2 // w)
    share = (tall[:, None] * broad).flatten() / (h * w) * keep
    assert ((quarters - share).abs() <= 0.1 * share + 2).all()
    assert torch.bincount(made % (h * w)).max() <= budget * t + 2


def test_duplicates_are_selected_last():
    """Two kinds of units only: one of each first, then the rest evenly."""
    owner = torch.zeros(6 * 24, dtype=torch.int64)
    owner[50] = 1
    made = farthest_points(points(torch.eye(2, 8), owner, (6, 4, 6)), (6, 4, 6), 14)
    assert 50 in made
    assert torch.bincount(made // 24, minlength=6).min() >= 1


def test_features_may_be_zero():
    assert len(farthest_points(points(torch.zeros(24, 8), torch.arange(24), (1, 4, 6)), (1, 4, 6), 6)) == 6


def test_a_projection_keeps_distances_and_duplicates_and_is_always_the_same():
    grid = (20, 6, 8)
    features, owner = video(5, grid, share=0.7, wide=2048)
    features[3] = features[8]
    assert len(features) > UNPROJECTED
    made = points(features, owner, grid)
    assert made.place.shape[1] == 128
    some = torch.arange(100)
    apart = made.in_features(some, some)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "UNPROJECTED", len(features))
        true = points(features, owner, grid).in_features(some, some)
    assert apart[3, 8] < STEP / 2
    other = true > 0.1
    assert ((apart / true)[other] - 1).abs().mean() < 0.12
    select._projection.cache_clear()
    assert torch.equal(points(features, owner, grid).place, made.place)


@pytest.mark.full
@settings(deadline=None, max_examples=8)
@given(
    CASES["seed"],
    CASES["grid"],
    st.sampled_from([0.2, 0.7, 1.3]),
    st.sampled_from([1, 4, 10]),
    st.sampled_from([1, 7, 100]),
)
def test_it_stops_where_every_unit_is_near_a_selected_one(seed, grid, within, least, pool):
    features, owner = video(seed, grid, 0.5, signs=True)
    every = exact(features, owner, grid, 2.0)
    made = pooled(pool, every, grid, 12, within=within, least=least).tolist()
    hand = greedy(every, grid, 12, within, least)
    assert made == hand if len(hand) >= least else set(hand) < set(made) and len(made) == least
    # What is selected is what a budget of that many would have selected.
    assert made == pooled(pool, every, grid, len(made)).tolist()


def test_where_nothing_differs_it_stops_at_the_least():
    grid = (2, 4, 6)
    assert len(farthest_points(same(grid), grid, 24, within=0.1, least=5)) == 5
    every = points(*video(1, grid, 1.0), grid)
    assert len(farthest_points(every, grid, 48, within=100.0, least=3)) == 3
    assert len(farthest_points(every, grid, 48, within=1e-6)) == 48
