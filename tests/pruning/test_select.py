import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning import select
from evoprune.pruning.budget import spread
from evoprune.pruning.select import STEP, choose_units, nearest_chosen, points_and_salience
from tests.threads import one_thread  # noqa: F401

CASES = {
    "seed": st.integers(0, 9999),
    "grid": st.sampled_from([(1, 4, 6), (4, 3, 2), (6, 2, 2)]),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "alpha": st.sampled_from([0.0, 1.0, 4.0]),
    "tau": st.sampled_from([1.0, 2.0, 8.0]),
    "dropped": st.sampled_from([0.0, 0.3]),
}


def video(seed, grid, share=0.4, wide=16, dropped=0.0, signs=False):
    """Features of the rows of a video in which that share of units changes from grid to grid, and who owns what.

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


def distances(features, owner, grid, seconds, alpha, tau):
    """The definition: a function of a chosen unit and another, and the salience."""
    place = grid[1] * grid[2]
    points, salience = points_and_salience(features, owner, None)

    def distance(i, j):
        lapse = torch.tensor(abs(seconds[i // place] - seconds[j // place]) / tau).clamp(max=1)
        space = 1 - points[owner[i]] @ points[owner[j]]
        return (((alpha / 2 * salience[owner[j]] ** 2 * lapse + space) / STEP).round() * STEP).item()

    return distance, salience


def by_hand(features, owner, grid, seconds, keep, alpha, tau, within=0.0, least=0):
    """One distance at a time; without the even spread of what is left."""
    units = [u for u in range(len(owner)) if owner[u] >= 0]
    distance, salience = distances(features, owner, grid, seconds, alpha, tau)
    chosen = [max(units, key=lambda u: (salience[owner[u]].item(), -u))]
    while len(chosen) < keep:
        left = {j: min(distance(i, j) for i in chosen) for j in units if j not in chosen}
        far, j = max((d, -j) for j, d in left.items())
        if far <= (within if len(chosen) >= least else 0):
            break
        chosen.append(-j)
    return sorted(chosen)


def by_hand_with_floor(features, owner, grid, seconds, keep, alpha, tau, floor):
    """First each grid's share as if there were nothing else, then among all. Dense features, so that nothing is at distance 0."""
    units = [u for u in range(len(owner)) if owner[u] >= 0]
    distance, salience = distances(features, owner, grid, seconds, alpha, tau)
    places, chosen = grid[1] * grid[2], []

    def go_on(chosen, among, count):
        chosen = chosen or [max(among, key=lambda u: (salience[owner[u]].item(), -u))]
        while len(chosen) < count:
            left = {j: min(distance(i, j) for i in chosen) for j in among if j not in chosen}
            chosen = [*chosen, -max((d, -j) for j, d in left.items())[1]]
        return chosen

    for g, share in enumerate(spread(keep, grid[0])):
        there = [u for u in units if u // places == g]
        few = min(int(floor * share), len(there))
        chosen += go_on([], there, few) if few else []
    return sorted(go_on(chosen, units, keep)), [min(int(floor * share), places) for share in spread(keep, grid[0])]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 9999),
    CASES["grid"],
    st.floats(0, 1),
    CASES["alpha"],
    st.sampled_from([0.25, 0.5, 1.0]),
    st.integers(1, 9),
)
def test_each_grid_may_have_a_share_of_its_own(seed, grid, kept, alpha, floor, pool):
    features, owner = video(seed, grid, 1.0)
    keep, seconds = max(1, round(kept * len(owner))), [float(t) for t in range(grid[0])]
    made = choose_units(features, owner, grid, seconds, keep, alpha=alpha, tau=8.0, floor=floor, pool=pool)
    hand, least = by_hand_with_floor(features, owner, grid, seconds, keep, alpha, 8.0, floor)
    counts = torch.bincount(made // (grid[1] * grid[2]), minlength=grid[0]).tolist()
    assert all(count >= few for count, few in zip(counts, least, strict=True)) and len(made) == keep
    assert made.tolist() == (hand if keep < len(owner) else list(range(len(owner))))
    if floor == 1:
        assert counts == spread(keep, grid[0])


@pytest.mark.parametrize("floor", [0.5, 1.0])
def test_a_grid_in_which_nothing_differs_has_its_share_too(floor):
    features, owner = torch.ones(1, 8), torch.zeros(24, dtype=torch.int64)
    made = choose_units(features, owner, (4, 2, 3), [0.0, 1.0, 2.0, 3.0], 12, floor=floor)
    assert torch.bincount(made // 6, minlength=4).tolist() == [3, 3, 3, 3]


@settings(deadline=None, max_examples=60)
@given(**CASES, pool=st.sampled_from([1, 3, 7, 100]))
def test_it_is_the_greedy_choice(seed, grid, share, alpha, tau, pool, dropped):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    can = int((owner >= 0).sum())
    keep = max(1, can // 3)
    seconds = [float(t) for t in range(grid[0])]
    made = choose_units(features, owner, grid, seconds, keep, alpha=alpha, tau=tau, pool=pool).tolist()
    hand = by_hand(features, owner, grid, seconds, keep, alpha, tau)
    assert set(hand) <= set(made) and len(made) == keep
    if len(hand) == keep:
        assert made == hand


@settings(deadline=None, max_examples=60)
@given(**CASES, piece=st.sampled_from([1, 16, 1 << 20]))
def test_every_unit_is_stood_for_by_the_nearest(seed, grid, share, alpha, tau, piece, dropped):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    keep = max(1, int((owner >= 0).sum()) // 3)
    seconds = [float(t) for t in range(grid[0])]
    kept = choose_units(features, owner, grid, seconds, keep, alpha=alpha, tau=tau)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "PIECE", piece)
        stands = nearest_chosen(features, owner, grid, seconds, kept, alpha=alpha, tau=tau).tolist()
    (distance, _), chosen = distances(features, owner, grid, seconds, alpha, tau), kept.tolist()
    for unit, who in enumerate(stands):
        if owner[unit] < 0 or unit in chosen:
            assert who == (chosen.index(unit) if unit in chosen else -1)
            continue
        far = [distance(i, unit) for i in chosen]
        assert who == far.index(min(far))


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 9999), st.sampled_from([1, 2, 5, 40]), st.sampled_from([8, 100, 1 << 20]), st.floats(0, 6))
def test_pool_and_piece_are_a_matter_of_speed(seed, pool, piece, alpha):
    grid, seconds = (5, 4, 6), [0.5, 1.5, 2.0, 4.5, 7.0]
    features, owner = video(seed, grid, 0.3, signs=True)
    expected = choose_units(features, owner, grid, seconds, 30, alpha=alpha)
    before, select.PIECE = select.PIECE, piece
    try:
        assert torch.equal(choose_units(features, owner, grid, seconds, 30, alpha=alpha, pool=pool), expected)
    finally:
        select.PIECE = before


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9999),
    st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 5)),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_the_count_is_exact(seed, grid, share, dropped, budget, dtype):
    features, owner = video(seed, grid, share, 200, dropped)
    can = (owner >= 0).nonzero()[:, 0]
    seconds = [0.75 * t for t in range(grid[0])]
    for keep in {max(1, round(budget * len(can))), 1, len(can)}:
        if not len(can):
            continue
        made = choose_units(features.to(dtype), owner, grid, seconds, keep)
        assert made.dtype == torch.int64 and len(made) == keep
        assert (made.diff() > 0).all()
        assert (owner[made] >= 0).all()
        if keep == len(can):
            assert torch.equal(made, can)


@pytest.mark.parametrize("keep", [0, -1, 25])
def test_a_count_out_of_range(keep):
    features, owner = video(0, (1, 4, 6))
    with pytest.raises(ValueError):
        choose_units(features, owner, (1, 4, 6), [0.0], keep)


def test_one_unit_is_the_most_salient():
    features = torch.ones(24, 8)
    features[17] = torch.tensor([-1.0, 1, 1, 1, 1, 1, 1, 1])
    assert choose_units(features, torch.arange(24), (1, 4, 6), [0.0], 1).tolist() == [17]


def test_what_stands_out_is_told_at_its_first_and_last_moment():
    """Background and one thing, encoded once in eight grids: the thing is shown at more than one time, the background is not."""
    grid, units = (8, 4, 6), 24
    random = torch.Generator().manual_seed(0)
    features = torch.ones(units, 64) + 0.1 * torch.randn(units, 64, generator=random)
    features[9] = torch.randn(64, generator=random)
    owner = torch.arange(units).repeat(8)
    seconds = [float(t) for t in range(8)]
    made = choose_units(features, owner, grid, seconds, 5).tolist()
    assert {9, 9 + 7 * units} <= set(made)
    assert sum(u % units == 9 for u in made) >= 4
    flat = choose_units(features, owner, grid, seconds, 5, alpha=0.0).tolist()
    assert len({u % units for u in flat}) == 5


@pytest.mark.parametrize("grid", [(8, 8, 12), (6, 4, 6), (16, 8, 8), (5, 9, 13), (1, 16, 24)])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.25, 0.5])
def test_equal_features_are_spread_over_time_and_space(grid, budget):
    t, h, w = grid
    keep = max(1, round(budget * t * h * w))
    made = choose_units(
        torch.ones(1, 8), torch.zeros(t * h * w, dtype=torch.int64), grid, [float(i) for i in range(t)], keep
    )
    per_grid = torch.bincount(made // (h * w), minlength=t)
    assert per_grid.max() - per_grid.min() <= 1
    # Over all grids, each quarter of the frame has about its share, and no place is taken over and over again.
    y, x = made // w % h, made % w
    quarters = torch.bincount((y * 2 // h) * 2 + x * 2 // w, minlength=4)
    tall, broad = torch.bincount(torch.arange(h) * 2 // h), torch.bincount(torch.arange(w) * 2 // w)
    share = (tall[:, None] * broad).flatten() / (h * w) * keep
    assert ((quarters - share).abs() <= 0.1 * share + 2).all()
    assert torch.bincount(made % (h * w)).max() <= budget * t + 2


def test_duplicates_are_chosen_last():
    """Two kinds of units only: one of each first, then the rest evenly."""
    features = torch.eye(2, 8)
    owner = torch.zeros(6 * 24, dtype=torch.int64)
    owner[50] = 1
    made = choose_units(features, owner, (6, 4, 6), [float(i) for i in range(6)], 14)
    assert 50 in made
    assert torch.bincount(made // 24, minlength=6).min() >= 1


def test_features_may_be_zero():
    made = choose_units(torch.zeros(24, 8), torch.arange(24), (1, 4, 6), [0.0], 6)
    assert len(made) == 6


def test_a_projection_keeps_duplicates_and_is_always_the_same():
    features, owner = video(5, (20, 6, 8), share=0.7, wide=2048)
    features[3] = features[8]
    assert len(features) > select.FEW
    points, _ = points_and_salience(features, owner, 128)
    assert points.shape[1] == 128
    some = torch.arange(100)
    apart = (points[some][:, None] - points[some]).square().sum(2) / 2
    true = 1 - torch.nn.functional.cosine_similarity(features[some][:, None], features[some], dim=2)
    assert apart[3, 8] < STEP / 2
    other = true > 0.1
    assert ((apart / true)[other] - 1).abs().mean() < 0.12
    select._projection.cache_clear()
    assert torch.equal(points_and_salience(features, owner, 128)[0], points)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 9999),
    st.sampled_from([(1, 4, 6), (4, 3, 2), (6, 2, 2)]),
    st.sampled_from([0.2, 0.7, 1.3]),
    st.sampled_from([1, 4, 10]),
    st.sampled_from([1, 3, 7, 100]),
)
def test_it_stops_where_every_unit_is_near_a_chosen_one(seed, grid, within, least, pool):
    features, owner = video(seed, grid, 0.5, signs=True)
    seconds = [float(t) for t in range(grid[0])]
    how = {"alpha": 2.0, "tau": 2.0}
    made = choose_units(features, owner, grid, seconds, 20, pool=pool, within=within, least=least, **how).tolist()
    hand = by_hand(features, owner, grid, seconds, 20, within=within, least=least, **how)
    assert made == hand if len(hand) >= least else set(hand) < set(made) and len(made) == least
    exact = choose_units(features, owner, grid, seconds, len(made), pool=pool, **how).tolist()
    assert made == exact  # what is chosen is what a budget of that many would have chosen


def test_where_nothing_differs_it_stops_at_the_least():
    flat = choose_units(
        torch.ones(1, 8), torch.zeros(48, dtype=torch.int64), (2, 4, 6), [0.0, 1.0], 24, within=0.1, least=5
    )
    assert len(flat) == 5
    features, owner = video(1, (2, 4, 6), 1.0)
    assert len(choose_units(features, owner, (2, 4, 6), [0.0, 1.0], 48, within=100.0, least=3)) == 3
    assert len(choose_units(features, owner, (2, 4, 6), [0.0, 1.0], 48, within=1e-6)) == 48
