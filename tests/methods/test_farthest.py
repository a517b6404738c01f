import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.backend import operators
from evoprune.methods import farthest
from evoprune.methods.farthest import STEPS, UNPROJECTED, assign_clusters, farthest_points, grid_tables, points_of
from evoprune.methods.plans import spread
from tests.threads import one_thread  # noqa: F401

CASES = {
    "seed": st.integers(0, 9999),
    "grid": st.sampled_from([(1, 4, 6), (4, 3, 2), (6, 2, 2)]),
    "share": st.sampled_from([0.0, 0.3, 1.0]),
    "alpha": st.sampled_from([0.0, 1.0, 4.0]),
    "dropped": st.sampled_from([0.0, 0.3]),
}


def video(seed, grid, share=0.4, wide=16, dropped=0.0, signs=False):
    """Return rows of a video in which `share` of the units change per frame pair, and every unit's row index.

    If `signs` is True, features are plus or minus 1, so cosines are exact and many of them are equal.
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


@contextmanager
def tubes_of(units: int):
    """Patch tubes to have about `units` units and at most two frame pairs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farthest, "TUBE_UNITS", units)
        patch.setattr(farthest, "TUBE_PAIRS", 2)
        grid_tables.cache_clear()
        yield
    grid_tables.cache_clear()


def points(features, owner, grid, alpha=1.5):
    return points_of(features, owner, grid, alpha)


def exact(features, owner, grid, alpha=1.5):
    """Return points of length 1 whose 16 features have equal magnitude, so that products are exact and many of them are equal."""
    made, salience = points(features, owner, grid, alpha), (features[:, :4].sum(1) + 4) / 8
    return replace(
        made,
        place=features / 4 * STEPS**0.5,
        half=torch.full_like(made.half, STEPS / 2),
        salience=salience,
        weight=STEPS * alpha / 2 * salience**2,
    )


def same(grid):
    """Return points for a video whose units all have the same features."""
    return points(torch.ones(1, 8), torch.zeros(grid[0] * grid[1] * grid[2], dtype=torch.int64), grid)


def distance(every, i, j):
    """Return the distance between a selected unit i and another unit j, in whole steps."""
    a, b = every.row[i], every.row[j]
    space = (every.place[a] - every.place[b]).square().sum() / 2
    return (space + every.weight[b] * (every.time[i] - every.time[j]).abs()).round().item()


def greedy(every, units) -> dict[int, float]:
    """Compute the units' radii one distance at a time, and return them in the order of selection."""
    first = {u: round(every.salience[every.row[u]].item() * STEPS / 2) for u in units}
    left, found, latest = dict.fromkeys(units, math.inf), {}, max(units, key=lambda u: (first[u], -u))
    while True:
        found[latest] = left.pop(latest)
        if not left:
            break
        left = {u: min(far, distance(every, latest, u)) for u, far in left.items()}
        latest = max(left, key=lambda u: (left[u], -u))
    start, *others = found
    second = max((found[u] for u in others), default=0)
    found[start] = max(first[start], second + 1 if second else 0)
    return found


def by_hand(every, keep, floor=0.0) -> list[int]:
    """Return the `keep` units with the largest radii in their tubes. With `floor`, the units due to each frame pair come first."""
    _, turn, tubes = grid_tables(every.grid, "cpu")
    radius, count = {}, len(every.row)
    for tube in tubes.tolist():
        units = [u for u in tube if u < count and every.row[u] >= 0]
        radius |= greedy(every, units) if units else {}
    order = sorted(radius, key=lambda u: (radius[u], int(turn[u])), reverse=True)
    due, places = [], every.grid[1] * every.grid[2]
    for pair, share in enumerate(spread(keep, every.grid[0])):
        due += [u for u in order if u // places == pair][: int(floor * share)]
    return sorted([*due, *(u for u in order if u not in due)][:keep])


def test_points_are_standardised_features():
    features, owner = video(3, (4, 3, 2), 0.5)
    features = features * torch.linspace(0.1, 30, 16) + 5
    of_units = features[owner].double()
    off = features.double() - of_units.mean(0)
    variance = of_units.var(0, unbiased=False)
    off /= (variance + 1e-3 * variance.mean() + (of_units.mean(0) / 256) ** 2).sqrt()
    length = off.norm(dim=1) * torch.isin(torch.arange(len(off)), owner)
    made = points(features, owner, (4, 3, 2), 1.5)
    torch.testing.assert_close(made.place, (off / length.max()).float() * STEPS**0.5, atol=2e-3, rtol=1e-5)
    torch.testing.assert_close(made.salience, (length / length.max()).float() ** 2, atol=1 / STEPS, rtol=0)
    torch.testing.assert_close(made.weight, 0.75 * STEPS * made.salience**2)
    torch.testing.assert_close(made.half, made.place.square().sum(1) / 2)
    assert made.time.view(4, 6)[:, 0].tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("wide", [16, 2048])
def test_what_carries_no_information_changes_no_point(wide):
    """A common offset, channels that are large in all rows, gains per channel, and the overall scale carry no information."""
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
        assert (made.place - expected.place).norm(dim=1).max() < 0.03 * STEPS**0.5
        assert (made.salience - expected.salience).abs().max() < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equal_features_have_no_distance(dtype):
    row = torch.randn(1, 300, generator=torch.Generator().manual_seed(0)).to(dtype)
    for rows in (row.expand(2000, -1), row * 0, row * 1e-20):
        made = points(rows, torch.zeros(24, dtype=torch.int64), (1, 4, 6))
        assert not made.place.any() and not made.salience.any()


@pytest.mark.parametrize(
    "grid", [(1, 1, 1), (1, 30, 40), (17, 5, 9), (40, 3, 3), (6, 13, 23), (64, 13, 23), (3, 1, 700)]
)
def test_tubes_are_about_equal_and_have_every_unit_once(grid):
    count, places = grid[0] * grid[1] * grid[2], grid[1] * grid[2]
    tubes = grid_tables(grid, "cpu")[2]
    inside = tubes[tubes < count]
    assert torch.equal(inside.sort().values, torch.arange(count)) and tubes.max() <= count
    sizes = (tubes < count).sum(1)
    assert (tubes.diff(dim=1) >= 0).all() and tubes.shape[1] == sizes.max() <= farthest.TUBE_UNITS
    for tube, size in zip(tubes, sizes, strict=True):
        unit = tube[:size]
        sides = [x.unique() for x in (unit // places, unit % places // grid[2], unit % grid[2])]
        assert size == math.prod(map(len, sides)) and all((side.diff() == 1).all() for side in sides)
        assert len(sides[0]) <= farthest.TUBE_PAIRS
    if count <= farthest.TUBE_UNITS and max(grid[1:]) ** 2 <= farthest.TUBE_UNITS // grid[0] and grid[0] <= 16:
        assert len(tubes) == 1
    _, turn, _ = grid_tables(grid, "cpu")
    assert torch.equal(turn.sort().values, torch.arange(count))


@settings(deadline=None, max_examples=25)
@given(**CASES, units=st.sampled_from([1, 4, 9, 512]))
def test_the_largest_radii_of_all_tubes_are_selected(seed, grid, share, alpha, dropped, units):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    keep = max(1, int((owner >= 0).sum()) // 3)
    every = exact(features, owner, grid, alpha)
    with tubes_of(units):
        assert (len(grid_tables(grid, "cpu")[2]) > 1) == (units < 24 or grid[0] > 2)
        assert farthest_points(every, keep).tolist() == by_hand(every, keep)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(st.integers(0, 9999), CASES["grid"], st.floats(0, 1), CASES["alpha"], st.sampled_from([0.25, 1.0]))
def test_each_pair_may_have_a_share_of_its_own(seed, grid, kept, alpha, floor):
    features, owner = video(seed, grid, 1.0, signs=True)
    keep, places = max(1, round(kept * len(owner) / 2)), grid[1] * grid[2]
    every = exact(features, owner, grid, alpha)
    made = farthest_points(every, keep, floor=floor)
    assert made.tolist() == by_hand(every, keep, floor)
    counts = torch.bincount(made // places, minlength=grid[0]).tolist()
    assert all(count >= int(floor * share) for count, share in zip(counts, spread(keep, grid[0]), strict=True))


@settings(deadline=None, max_examples=20)
@given(**CASES, held=st.sampled_from([8, 1 << 8, 1 << 23]))
def test_every_unit_belongs_to_the_nearest(seed, grid, share, alpha, held, dropped):
    features, owner = video(seed, grid, share, dropped=dropped, signs=True)
    every = exact(features, owner, grid, alpha)
    kept = farthest_points(every, max(1, int((owner >= 0).sum()) // 3))
    kept = kept[owner[kept] >= 0]
    if not len(kept):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "MAX_DISTANCES", held)
        clusters = assign_clusters(every, kept).tolist()
    selected = kept.tolist()
    for unit, cluster in enumerate(clusters):
        if owner[unit] < 0 or unit in selected:
            assert cluster == (selected.index(unit) if unit in selected else -1)
            continue
        far = [distance(every, i, unit) for i in selected]
        assert cluster == far.index(min(far))


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
        made = farthest_points(every, keep)
        assert made.dtype == torch.int64 and len(made) == keep
        assert (made.diff() > 0).all() and (owner[made] >= 0).all()
    assert torch.equal(farthest_points(every, len(can)), can)


@pytest.mark.parametrize("keep", [0, -1, 25])
def test_a_count_out_of_range_is_refused(keep):
    with pytest.raises(ValueError, match="cannot select"):
        farthest_points(points(*video(0, (1, 4, 6)), (1, 4, 6)), keep)


@pytest.mark.parametrize("grid", [(8, 8, 12), (6, 4, 6), (5, 9, 13), (1, 16, 24)])
@pytest.mark.parametrize("budget", [0.05, 0.1, 0.5])
def test_equal_features_are_spread_over_time_and_space(grid, budget):
    t, h, w = grid
    keep = max(1, round(budget * t * h * w))
    assert len(farthest_points(same(grid), t * h * w, within=0.1, least=min(5, keep))) == min(5, keep)
    for floor in (0.0, 1.0):
        made = farthest_points(same(grid), keep, floor=floor)
        per_pair = torch.bincount(made // (h * w), minlength=t)
        assert per_pair.max() - per_pair.min() <= 1
    # Over all pairs, each quarter of the frame gets about its share, and no place is chosen over and over.
    made = farthest_points(same(grid), keep)
    y, x = made // w % h, made % w
    quarters = torch.bincount((y * 2 // h) * 2 + x * 2 // w, minlength=4)
    tall, broad = torch.bincount(torch.arange(h) * 2 // h), torch.bincount(torch.arange(w) * 2 // w)
    share = (tall[:, None] * broad).flatten() / (h * w) * keep
    assert ((quarters - share).abs() <= 0.1 * share + 2.5).all()
    assert torch.bincount(made % (h * w)).max() <= budget * t + 2


def test_a_projection_keeps_distances_and_duplicates_and_is_always_the_same():
    grid = (20, 6, 8)
    features, owner = video(5, grid, share=0.7, wide=2048)
    features[3] = features[8]
    assert len(features) > UNPROJECTED
    made = points(features, owner, grid)
    assert made.place.shape[1] == 128
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farthest, "UNPROJECTED", len(features))
        true = points(features, owner, grid)
    apart, true = (torch.cdist(x.place[:100], x.place[:100]).square() / 2 for x in (made, true))
    assert apart[3, 8] < 0.5
    other = true > 0.1 * STEPS
    assert ((apart / true)[other] - 1).abs().mean() < 0.12
    farthest._projection.cache_clear()
    assert torch.equal(points(features, owner, grid).place, made.place)


@settings(deadline=None, max_examples=20)
@given(
    CASES["seed"],
    CASES["grid"],
    st.sampled_from([0.2, 0.7, 1.3]),
    st.sampled_from([1, 4, 10]),
    st.sampled_from([1, 512]),
)
def test_it_stops_where_every_unit_is_near_a_selected_one(seed, grid, within, least, units):
    features, owner = video(seed, grid, 0.5, signs=True)
    every = exact(features, owner, grid, 2.0)
    with tubes_of(units) if units == 1 else nullcontext():
        made = farthest_points(every, 12, within=within, least=least).tolist()
        of_each = [greedy(every, [u for u in tube if u < len(owner)]) for tube in grid_tables(grid, "cpu")[2].tolist()]
        far = sum(radius > within * STEPS for radii in of_each for radius in radii.values())
        assert len(made) == min(12, max(least, far))
        # A budget of this size selects the same units.
        assert made == farthest_points(every, len(made)).tolist()
