"""Rows that are not computed: unchanged units, and rows dropped by a selection between two layers."""

from copy import deepcopy
from dataclasses import dataclass, replace
from math import prod
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.backend import Packing, devices
from evoprune.errors import ModelError
from evoprune.methods import DivPrune, EncoderMethod, FarthestPoints, Selection, Selector, Stage
from evoprune.methods.evoprune import THRESHOLD, EvoPruneMethod
from evoprune.methods.farthest import assign_clusters, farthest_points, points_of
from evoprune.vision.patches import patch_means, scan
from tests.vision.clips import changes, clip
from tests.vision.reference import encode_slowly
from tests.vision.results import assert_same, check_result, encode_clip, encode_patches
from tests.vision.tower import random_patches, tiny_tower

AFTER = EvoPruneMethod(depth=1.0)  # the selection comes after the tower


def encoded_units(patches, grid, threshold=THRESHOLD) -> torch.Tensor:
    """Return bool `[T, H*W]`: the units that are encoded."""
    source, _ = scan(patch_means(patches, grid[1] * grid[2]), threshold=threshold)
    return source == torch.arange(grid[0])[:, None]


# --- properties --------------------------------------------------------------------------------------------------------


@pytest.mark.full
@settings(deadline=None, max_examples=50)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 5), st.integers(1, 6)),
    share=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    seed=st.integers(0, 99),
    share_kept=st.floats(0, 1),
    name=st.sampled_from(
        ["evoprune", "evoprune:depth=1", "evoprune:depth=0.5:first=0:rows=1", "reuse+divprune", "reuse+visionzip"]
    ),
    piece_units=st.integers(1, 200),
)
def test_the_result_does_not_depend_on_the_size_of_pieces(grid, share, seed, share_kept, name, piece_units):
    method, changed = methods.MethodChain.parse(name), changes(grid, share, seed)
    keep = max(1, round(prod(grid) * share_kept))
    whole = encode_clip(grid, changed, method, keep, seed, piece_units=10**6)
    assert_same(encode_clip(grid, changed, method, keep, seed, piece_units=piece_units), whole)
    assert len(whole.kept) == len(whole.features) == keep
    if name != "reuse+visionzip":  # its tokens are means although they count once
        check_result(whole, grid, whole_clip=True)


@pytest.mark.few(6)
@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("count", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_farthest_points_are_selected_a_token_is_the_mean_of_its_cluster_and_counts_by_its_size(
    average, count, share
):
    grid, keep = (6, 3, 5), 20
    made = encode_clip(grid, changes(grid, share), replace(AFTER, average=average, count=count), keep)
    every = points_of(made.rows, made.unit_to_row, grid, EvoPruneMethod.alpha)
    assert torch.equal(made.kept, farthest_points(every, keep))
    owner = assign_clusters(every, made.kept)
    clusters = [made.rows[made.unit_to_row[owner == k]] for k in range(keep)]
    assert sum(map(len, clusters)) == 90 and torch.equal(owner[made.kept], torch.arange(keep))
    tokens = torch.stack([rows.mean(0) for rows in clusters]) if average else made.rows[made.unit_to_row[made.kept]]
    torch.testing.assert_close(made.features, tokens, atol=1e-5, rtol=1e-5)
    if count:
        torch.testing.assert_close(made.size, torch.tensor([float(len(rows)) for rows in clusters]) ** count)
    else:
        assert made.size is None


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_piece_may_have_nothing_new(dtype, packed):
    visual, grid = deepcopy(tiny_tower()).to(dtype), (6, 5, 6)
    if packed:
        Packing.now(visual)
    changed = torch.zeros(6, 30, dtype=torch.bool)
    # The others have no rows at all; in the fourth pair, new rows attend to old ones.
    changed[0] = changed[3, :4] = True
    patches = clip(grid, changed, drift=0).to(dtype)
    whole, cut = (encode_patches(patches, grid, AFTER, 9, visual, piece_units=size) for size in (10**6, 1))
    assert cut.layers == whole.layers and cut.layers[0][1] == 34
    assert torch.equal(cut.unit_to_row, whole.unit_to_row) and len(cut.kept) == 9
    assert cut.rows.dtype == dtype
    error = (cut.rows.float() - whole.rows.float()).norm() / whole.rows.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 2e-2)


# Selections between two layers of the tower, which apply to all later layers.


@dataclass(frozen=True)
class Several(EncoderMethod):
    """An encoder method that drops rows before the first, the second and the last of four layers.

    Field: last: the selector before the last layer, which may omit the owners of dropped units.
    """

    tokens: ClassVar[Selector] = FarthestPoints()
    reuse: ClassVar[float] = 8.0

    last: Selector | None = None

    def stages(self, tower, grid, keep):
        after, points = {0: 60, 1: 50, 3: 45}, {layer: FarthestPoints(average=layer == 1) for layer in (0, 1, 3)}
        points[3] = self.last or points[3]
        return [Stage(layer, max(keep, rows), points[layer]) for layer, rows in after.items()]


@pytest.mark.few(1)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("keep", [40, 10, 1])
@pytest.mark.parametrize("full_layers", [(1, 3), (0, 2), ()])
def test_selected_rows_against_loops(share, keep, full_layers):
    grid, changed = (5, 3, 5), changes((5, 3, 5), share)
    patches, visual = clip(grid, changed), tiny_tower(full_layers)
    assert torch.equal(encoded_units(patches, grid), changed)  # otherwise the test checks something else
    for method in (
        EvoPruneMethod(), EvoPruneMethod(depth=0.75, alpha=1.0), EvoPruneMethod(average=False, reuse=0.0, count=0.0),
        EvoPruneMethod(rows=1.0), EvoPruneMethod(rows=0.0), EvoPruneMethod(first=0.0), AFTER, Several(), Several(DivPrune()),
    ):  # fmt: skip
        units, owner, tokens = encode_slowly(visual, patches, grid, method, keep, changed if method.reuse else None)
        for size in (1, 30, 10**6):
            made = encode_patches(patches, grid, method, keep, visual, piece_units=size)
            assert made.unit_to_row.tolist() == owner and len(made.kept) == keep
            torch.testing.assert_close(made.rows.double(), tokens, atol=1e-4, rtol=1e-4)
            if len(units) == keep < made.layers[0][1] and getattr(method, "rows", 0) == 1:
                assert made.kept.tolist() == units and torch.equal(made.features, made.rows)


@dataclass(frozen=True, eq=False)
class Given(Selector):
    """Returns a selection that was made earlier."""

    answer: Selection | None = None

    def select(self, tokens, keep):
        return self.answer


@dataclass(frozen=True, eq=False)
class GivenInside(EvoPruneMethod):
    given: Given | None = None

    @property
    def tokens(self):
        return self.given

    def stages(self, tower, grid, keep):
        return [Stage(1, keep, self.given)]


def inside(kept, owner, given=Given) -> GivenInside:
    return GivenInside(given=given(Selection(torch.tensor(kept), owner)))


def test_units_may_be_dropped():
    owner = torch.where(torch.arange(32) < 20, -1, 1).index_fill_(0, torch.tensor(3), 0)
    made = encode_clip((2, 4, 4), changes((2, 4, 4), 1.0), inside([3, 20], owner), 2)
    assert made.kept.tolist() == [3, 20] and torch.bincount(made.unit_to_row[made.unit_to_row >= 0]).tolist() == [1, 12]


@pytest.mark.parametrize("waits", [False, True])
def test_rows_that_are_not_finite_are_found_before_the_selection_or_at_the_end_where_reading_waits(waits, monkeypatch):
    patches, selected = random_patches((2, 3, 5)), []
    patches[7] = float("nan")
    select = FarthestPoints.select
    monkeypatch.setattr(FarthestPoints, "select", lambda *args: selected.append(1) or select(*args))
    monkeypatch.setattr(devices, "is_host", lambda device: not waits)
    with pytest.raises(ModelError, match="encode"):
        encode_patches(patches, (2, 3, 5), EvoPruneMethod(reuse=0.0, first=0.0), 6)
    assert len(selected) == 2 * waits


def test_rows_that_are_not_finite_after_the_selection_are_found_too():
    visual = deepcopy(tiny_tower())
    visual.blocks[3].norm2.weight.data[2] = float("nan")
    with pytest.raises(ModelError, match="encode"):
        encode_patches(random_patches((2, 3, 5)), (2, 3, 5), EvoPruneMethod(reuse=0.0), 6, visual)


@dataclass(frozen=True, eq=False)
class Asks(Given):
    needs = frozenset({"keys"})


def test_a_selector_inside_the_tower_may_not_ask_for_what_there_is_after_it():
    with pytest.raises(TypeError, match="cannot get more than rows"):
        encode_patches(random_patches((2, 3, 5)), (2, 3, 5), inside([0], torch.zeros(30), Asks), 6)
