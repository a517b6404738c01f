"""Rows selected between two layers of the tower, for all layers after them."""

from copy import deepcopy
from dataclasses import dataclass, field, replace
from math import prod
from typing import ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evoprune.backend import devices
from evoprune.errors import ModelError
from evoprune.methods.base import EncoderMethod, Selector
from evoprune.methods.baselines import Nothing
from evoprune.methods.evoprune import STILL, EvoPrune, FarthestPoints
from evoprune.methods.plans import Stage
from evoprune.methods.types import Selection
from tests.vision.clips import changes, clip
from tests.vision.devices import assert_same_on_a_gpu
from tests.vision.reference import encode_slowly
from tests.vision.results import assert_same, check_result, encode_clip, encode_patches
from tests.vision.tower import random_patches, tiny_tower


@dataclass(frozen=True)
class Several(EncoderMethod):
    """Rows are left behind before the first layer, and before the second and the last of four."""

    tokens: ClassVar[Selector] = FarthestPoints()
    reuse: ClassVar[float] = 8.0

    def stages(self, tower, grid, keep):
        after = {0: 60, 1: 50, 3: 45}
        return [Stage(layer, max(keep, rows), FarthestPoints(average=layer == 1)) for layer, rows in after.items()]


# --- against the slow encoder ------------------------------------------------------------------------------------------


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("keep", [40, 10, 1])
@pytest.mark.parametrize("full_layers", [(1, 3), ()])
def test_selected_rows_against_loops(share, keep, full_layers):
    grid, changed = (5, 3, 5), changes((5, 3, 5), share)
    patches, visual = clip(grid, changed), tiny_tower(full_layers)
    for method in (
        EvoPrune(), EvoPrune(depth=0.75, alpha=1.0), EvoPrune(average=False, reuse=0.0, count=0.0),
        EvoPrune(rows=1.0), EvoPrune(rows=0.0), EvoPrune(first=0.0), Several(),
    ):  # fmt: skip
        units, owner, tokens = encode_slowly(visual, patches, grid, method, keep, changed if method.reuse else None)
        for size in (1, 30, 10**6):
            made = encode_patches(patches, grid, method, keep, visual, chunk_units=size)
            assert made.owner.tolist() == owner and len(made.kept) == keep
            torch.testing.assert_close(made.rows.double(), tokens, atol=1e-4, rtol=1e-4)
            if len(units) == keep < made.layers[0][1] and getattr(method, "rows", 0) == 1:
                assert made.kept.tolist() == units and torch.equal(made.features, made.rows)


# --- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@settings(deadline=None, max_examples=25)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    share_kept=st.floats(0, 1),
    depth=st.sampled_from([0.1, 0.5, 0.75]),
    power=st.sampled_from([1.0, 0.5, 0.1]),
    chunk_units=st.integers(1, 200),
)
def test_counts_are_exact_and_do_not_depend_on_the_chunk_size(grid, share, seed, share_kept, depth, power, chunk_units):
    method, n = EvoPrune(depth=depth, first=0.0, rows=power), prod(grid)
    keep = max(1, round(n * share_kept))
    changed = changes(grid, share, seed)
    whole = encode_clip(grid, changed, method, keep, seed, chunk_units=10**6)
    assert_same(encode_clip(grid, changed, method, keep, seed, chunk_units=chunk_units), whole)
    assert len(whole.kept) == len(whole.features) == keep
    check_result(whole, grid, whole_clip=True)
    if keep == n:
        assert whole.live_share == 1
        return
    after = max(1, round(depth * 4))
    rows = [count for _, count in whole.layers]
    assert {*rows[:after]} == {int(changed.sum())} and {*rows[after:]} == {len(whole.rows)}
    power *= 1 if grid[0] > 1 else STILL
    assert len(whole.rows) <= min(max(keep, round(n * (keep / n) ** power)), rows[0])


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_the_selected_rows_are_the_tokens(share):
    grid, keep = (6, 3, 5), 12
    made = encode_clip(grid, changes(grid, share), EvoPrune(rows=1.0), keep)
    assert torch.equal(made.features, made.rows) and torch.equal(made.owner[made.kept], torch.arange(keep))
    sizes = torch.bincount(made.owner)
    assert sizes.sum() == prod(grid)
    torch.testing.assert_close(made.size, sizes.float().sqrt())


@pytest.mark.parametrize("pairs", [2, 9])
def test_a_still_clip_goes_on_as_its_first_frame_pair_where_that_is_kept(pairs):
    grid = (pairs, 3, 5)
    patches = clip(grid, changes(grid, 0.0))
    alone = encode_patches(patches[: 4 * 15], (1, 3, 5), Nothing(), 15)
    method = EvoPrune(first=0.0, rows=1.0)
    made = encode_patches(patches, grid, method, 15)
    torch.testing.assert_close(made.rows, alone.rows, atol=2e-5, rtol=1e-5)
    assert made.layers == [(layer, 15) for layer in range(4)] and made.owner.tolist() == list(range(15)) * pairs
    assert {rows for _, rows in encode_patches(patches, grid, method, 4).layers} == {15, 4}


@dataclass(frozen=True, eq=False)
class Given(Selector):
    """Answers with a selection that was made before."""

    answer: Selection | None = None
    seen: list = field(default_factory=list)

    def select(self, tokens, keep):
        self.seen.append(tokens)
        return self.answer


@dataclass(frozen=True, eq=False)
class GivenInside(EvoPrune):
    given: Given | None = None

    @property
    def tokens(self):
        return self.given

    def stages(self, tower, grid, keep):
        return [Stage(1, keep, self.given)]


def inside(kept, owner, weight=None, **settings_) -> GivenInside:
    return GivenInside(given=Given(Selection(torch.tensor(kept), owner, weight)), **settings_)


def test_a_reused_unit_sees_what_has_changed_around_it():
    """The same row is selected in two frame pairs, whose other half has changed: only what it sees tells the two apart."""
    grid, unit, kept = (2, 4, 4), torch.arange(32), [0, 15, 16, 31]
    changed = torch.ones(2, 16, dtype=torch.bool)
    changed[1, 8:] = False
    alone = torch.zeros(32).index_fill_(0, torch.tensor(kept), 1.0)
    method = inside(kept, torch.where(unit % 16 < 8, 0, 1) + unit // 16 * 2, alone)
    made = encode_patches(clip(grid, changed, drift=0), grid, method, 4, seed=3)
    (tokens,) = method.given.seen
    before = tokens.features
    assert (tokens.grid, tokens.seed) == (grid, 3)
    assert torch.equal(before[15], before[31]) and not torch.equal(before[0], before[16])
    assert (made.rows[1] - made.rows[3]).norm() > 0.1


def test_a_row_is_seen_by_the_frame_pairs_whose_units_it_represents():
    """What the first frame pair's row becomes depends on whether the second one's row represents half of the first pair."""
    grid, unit = (2, 4, 4), torch.arange(32)
    alone = torch.zeros(32).index_fill_(0, torch.tensor([0, 31]), 1.0)
    across, apart = (
        encode_clip(grid, changes(grid, 1.0), inside([0, 31], owner, alone), 2).rows[0]
        for owner in (torch.where(unit < 8, 0, 1), unit // 16)
    )
    assert (across - apart).norm() > 0.1


def test_units_may_be_dropped():
    owner = torch.where(torch.arange(32) < 20, -1, 1).index_fill_(0, torch.tensor(3), 0)
    made = encode_clip((2, 4, 4), changes((2, 4, 4), 1.0), inside([3, 20], owner), 2)
    assert made.kept.tolist() == [3, 20] and torch.bincount(made.owner[made.owner >= 0]).tolist() == [1, 12]


@pytest.mark.few(6)
@pytest.mark.parametrize("within", [1e-6, 0.02, 0.2, 9.0])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_an_automatic_budget_stays_between_a_twentieth_and_its_limit(share, within, power):
    grid, keep = (10, 4, 6), 120
    made = encode_clip(grid, changes(grid, share), EvoPrune(within=within, rows=power), keep)
    assert 12 <= len(made.kept) == len(made.features) <= keep
    check_result(made, grid, whole_clip=True)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 7), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    keep=st.floats(0, 1),
    method=st.sampled_from([EvoPrune(), EvoPrune(depth=0.5, reuse=0.0), EvoPrune(rows=1.0)]),
    full_layers=st.sampled_from([(1, 3), (), (2,)]),
    chunk_units=st.integers(1, 100),
    kernel=st.booleans(),
)
def test_the_result_is_the_same_on_a_gpu(monkeypatch, grid, share, keep, method, full_layers, chunk_units, kernel):
    patches, count = clip(grid, changes(grid, share)), max(1, round(prod(grid) * keep))
    assert_same_on_a_gpu(monkeypatch, patches, grid, method, count, kernel, full_layers, chunk_units)


# --- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True])
def test_rows_that_are_not_finite_are_found_before_the_selection_or_at_the_end_where_reading_waits(waits, monkeypatch):
    patches, selected = random_patches((2, 3, 5)), []
    patches[7] = float("nan")
    select = FarthestPoints.select
    monkeypatch.setattr(FarthestPoints, "select", lambda *args: selected.append(1) or select(*args))
    monkeypatch.setattr(devices, "exact_shapes", lambda device: not waits)
    with pytest.raises(ModelError, match="encode"):
        encode_patches(patches, (2, 3, 5), EvoPrune(reuse=0.0, first=0.0), 6)
    assert len(selected) == 2 * waits


def test_rows_that_are_not_finite_after_the_selection_are_found_too():
    visual = deepcopy(tiny_tower())
    with torch.no_grad():
        visual.blocks[3].norm2.weight[2] = float("nan")
    with pytest.raises(ModelError, match="encode"):
        encode_patches(random_patches((2, 3, 5)), (2, 3, 5), EvoPrune(reuse=0.0), 6, visual)


def test_a_selector_inside_the_tower_may_not_ask_for_what_there_is_after_it():
    @dataclass(frozen=True, eq=False)
    class Asks(Given):
        needs = frozenset({"keys"})

    with pytest.raises(TypeError, match="nothing but the rows"):
        encode_patches(random_patches((2, 3, 5)), (2, 3, 5), replace(inside([0], torch.zeros(30)), given=Asks()), 6)
