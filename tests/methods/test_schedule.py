import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.contrib.merging import EvoPruneMerge
from evoprune.methods.plans import ALLOCATIONS, TowerShape, layer_weights, rows_after_layers

DEMO, LARGE = TowerShape(8, (1, 3, 5, 7)), TowerShape(32, (7, 15, 23, 31))
towers = st.integers(1, 32).flatmap(
    lambda depth: st.builds(
        lambda full: TowerShape(depth, tuple(sorted(full))), st.sets(st.integers(0, depth - 1), max_size=8)
    )
)
ranges = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)
allocations = st.sampled_from(ALLOCATIONS)


# --- weights -------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 40), allocations, ranges)
def test_weights_sum_to_one_over_layers_of_the_range(depth, allocation, ends):
    first, last = ends
    weights = layer_weights(depth, allocation, first, last)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights and all(share > 0 for share in weights.values())
    assert list(weights) == sorted(weights) and set(weights) <= set(range(depth))
    # A layer ends at (l + 1) / depth; the range is met to within one layer.
    for layer in weights:
        assert first - 1 / depth <= (layer + 1) / depth <= last + 1 / depth


@pytest.mark.parametrize(
    ("depth", "first", "last"), [(8, 0, 1), (8, 0.1, 0.5), (32, 0.1, 0.5), (32, 0.25, 0.75), (5, 0, 1)]
)
def test_the_shape_of_each_allocation(depth, first, last):
    weights = {name: layer_weights(depth, name, first, last) for name in ALLOCATIONS}
    layers = list(weights["mean"])
    n = len(layers)
    assert layers == list(range(layers[0], layers[0] + n))
    assert layers[0] + 1 == max(1, math.ceil(first * depth)) and layers[-1] + 1 == round(last * depth)
    for name in ("mean", "skip", "first", "last"):
        assert len({round(share, 12) for share in weights[name].values()}) == 1
    assert list(weights["skip"]) == layers[::-1][::2][::-1]
    half = math.ceil(n / 2)
    assert list(weights["first"]) == layers[:half] and list(weights["last"]) == layers[-half:]
    for name, order in (("increasing", 1), ("decreasing", -1)):
        shares = list(weights[name].values())[::order]
        assert list(weights[name]) == layers
        assert shares == pytest.approx([2 * (i + 1) / (n * (n + 1)) for i in range(n)])


@pytest.mark.parametrize("at", [0.0, 0.3, 1.0])
def test_a_range_of_no_width_still_has_a_layer(at):
    for name in ALLOCATIONS:
        assert list(layer_weights(8, name, at, at).values()) == [1]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("even", 0, 1),
        ("skip", 0.6, 0.5),
        ("skip", -0.1, 0.5),
        ("skip", 0, 1.1),
        ("mean", math.nan, 1),
        ("mean", 0, math.nan),
    ],
)
def test_other_schedules_are_refused(name, first, last):
    with pytest.raises(ValueError, match="no schedule"):
        layer_weights(8, name, first, last)


# --- rows ----------------------------------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(towers, st.integers(1, 20), st.integers(1, 20), st.data(), allocations, ranges)
def test_row_counts(tower, height, width, data, allocation, ends):
    units, windows = height * width, math.ceil(height / 4) * math.ceil(width / 4)
    keep = data.draw(st.integers(1, units))
    weights = layer_weights(tower.depth, allocation, *ends)
    counts = rows_after_layers(tower, units, windows, keep, weights)
    assert len(counts) == tower.depth
    before, done = units, 0.0
    for layer, left in enumerate(counts):
        done += weights.get(layer, 0)
        wish = units - (units - keep) * done
        assert keep <= left <= before
        if tower.scope(layer) == "pair":
            assert (
                abs(left - wish) <= 0.5 + 1e-6 or left == before
            )  # a layer over whole pairs makes up for all that is missing
        elif left < before:
            assert layer in weights and left >= windows
            assert left == windows or abs(left - wish) <= 0.5 + 1e-6
        before = left
    if any(layer >= max(weights) for layer in tower.full_layers):
        assert counts[-1] == keep


def test_a_window_keeps_a_row_and_the_next_layer_over_whole_pairs_makes_up_for_it():
    tower = TowerShape(4, (1, 3))
    assert rows_after_layers(tower, 32, 2, 1, {0: 1.0}) == [2, 1, 1, 1]
    assert rows_after_layers(tower, 32, 2, 1, {2: 1.0}) == [32, 32, 2, 1]
    assert rows_after_layers(tower, 32, 2, 16, {0: 0.5, 1: 0.5}) == [24, 16, 16, 16]
    assert rows_after_layers(TowerShape(2, ()), 32, 2, 1, {0: 0.5, 1: 0.5}) == [16, 2]


@pytest.mark.parametrize("keep", [192, 100, 1])
def test_nothing_is_reduced_without_need_or_before_the_range(keep):
    counts = rows_after_layers(LARGE, 192, 12, keep, layer_weights(32, "mean", 0.5, 0.75))
    assert counts[:15] == [192] * 15
    assert counts[23:] == [keep] * 9


@pytest.mark.parametrize("budget", [0.5, 0.25, 0.1])
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_the_same_settings_cost_the_same_share_of_a_small_and_of_a_large_tower(allocation, budget):
    units, windows, defaults = 192, 12, EvoPruneMerge()
    live = []
    for tower in (DEMO, LARGE):
        weights = layer_weights(tower.depth, allocation, defaults.first, defaults.last)
        counts = rows_after_layers(tower, units, windows, round(units * budget), weights)
        live.append((units + sum(counts[:-1])) / tower.depth / units)
    assert live[0] == pytest.approx(live[1], abs=0.03)
