"""Methods inside the encoder, against their specifications line by line."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.contrib.encoder import EvoPruneMerge
from evoprune.errors import UsageError
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.plans import TowerShape, spread
from evoprune.methods.types import Candidates
from evoprune.vision.layout import geometry
from tests.methods.tokens import KINDS, cosine, encoded, features_of
from tests.vision.reference import Row, embedded, largest_remainder, linear, owners, rms_norm, run_layer
from tests.vision.tower import group_key, place_key, random_patches, tiny_tower

# --- ToMe --------------------------------------------------------------------------------------------------------------


def tome_line_by_line(keys: list[torch.Tensor], r: int) -> list[int]:
    """Section 3 of the paper: where each of some tokens goes, itself if it stays; r at most half of them."""
    n = len(keys)
    a, b = list(range(0, n, 2)) if n > 1 else [], list(range(1, n, 2))  # partition them into two sets, by turns
    edge = {i: max(b, key=lambda j: (cosine(keys[i], keys[j]), -j)) for i in a}  # one edge from each in A
    strongest = sorted(a, key=lambda i: (-cosine(keys[i], keys[edge[i]]), i))[:r]  # keep the r most similar
    return [edge[i] if i in strongest else i for i in range(n)]


def group_of(kind: str, sizes: list[int], seed: int) -> Candidates:
    """Groups of these sizes side by side, with nonsense as padding."""
    longest = max(sizes)
    features = torch.stack([features_of(kind, longest, seed + i) for i in range(len(sizes))])
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    features[~valid] = features[:, :1].expand_as(features)[~valid]  # the likeness of the first of all
    place = torch.arange(longest).expand(len(sizes), -1)
    return Candidates(features, None, place, place * 0 + 1, valid, 3)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(st.integers(0, 17), min_size=1, max_size=4), st.sampled_from(KINDS), st.integers(0, 500), st.data())
def test_tome_merges_the_most_similar_pairs(sizes, kind, seed, data):
    sizes = [max(1, sizes[0]), *sizes[1:]]
    group = group_of(kind, sizes, seed)
    remove = [data.draw(st.integers(0, max(0, n - 1))) for n in sizes]
    into = methods.get("tome").match(group, torch.tensor(remove))
    for i, (n, r) in enumerate(zip(sizes, remove, strict=True)):
        assert into[i, :n].tolist() == tome_line_by_line(list(group.features[i, :n]), min(r, n // 2))
        assert (into[i, :n] < max(n, 1)).all() and into[i, n:].tolist() == list(range(n, max(sizes)))


@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_among_equals_the_first_pairs_merge_into_the_second_row(kind):
    into = methods.get("tome").match(group_of(kind, [7], 0), torch.tensor([2]))
    assert into.tolist() == [[1, 1, 1, 3, 4, 5, 6]]


@torch.no_grad()
def tome_slowly(visual, patches, grid, keep, proportional=True) -> tuple[list[int], list[int], torch.Tensor]:
    """The whole encoder with ToMe in it: units of the rows that are left, the row of each unit, and tokens `[R, D]`.

    The rows of every frame pair become fewer by the same number in each layer, inside windows or pairs as the layer attends.
    """
    geo, depth = geometry(*grid[1:]), len(visual.blocks)
    rows = embedded(visual, patches, geo, math.prod(grid))
    for layer, block in enumerate(visual.blocks):
        scope = "pair" if layer in visual.fullatt_block_indexes else "window"
        run_layer(block, rows, geo, scope, proportional)
        left = []
        for pair, due in enumerate(spread(keep, grid[0])):
            mine = [row for row in rows if row.unit // geo.units == pair]
            wish = geo.units - math.floor((geo.units - max(due, 1)) * (layer + 1) / depth + 0.5)
            wish = min(len(mine), wish if scope == "pair" else max(wish, geo.windows))
            groups: dict[tuple, list[Row]] = {}
            for row in mine:
                groups.setdefault(group_key(geo, row.unit, scope), []).append(row)
            counts = largest_remainder([len(group) for group in groups.values()], wish)
            for group, count in zip(groups.values(), counts, strict=True):
                for row in group:
                    row.feature = row.plain.mean(1).flatten()
                while len(group) > count:  # more than one round only where more than half must go
                    r = min(len(group) - count, len(group) // 2)
                    into = tome_line_by_line([row.feature for row in group], r)
                    group = [merged(group, [i for i, j in enumerate(into) if j == at], at) for at in sorted(set(into))]
                left += group
        rows = sorted(left, key=lambda row: place_key(geo, row.unit))
    rows.sort(key=lambda row: row.unit)
    first, second = visual.merger.mlp[0], visual.merger.mlp[2]
    hidden = [linear(first, rms_norm(visual.merger.ln_q, row.x).flatten()) for row in rows]
    tokens = [linear(second, torch.nn.functional.gelu(h)) for h in hidden]
    return [row.unit for row in rows], owners(rows, math.prod(grid)), torch.stack(tokens)


def merged(rows: list[Row], members: list[int], at: int) -> Row:
    """The mean of some rows, weighted with how many units each represents, in place of one of them."""
    size = [len(rows[i].units) for i in members]

    def mean(of: list[torch.Tensor]) -> torch.Tensor:
        return sum(s * each for s, each in zip(size, of, strict=True)) / sum(size)

    units = [unit for i in members for unit in rows[i].units]
    x, feature = mean([rows[i].x for i in members]), mean([rows[i].feature for i in members])
    return replace(rows[at], units=units, x=x, feature=feature)


def patches_of(scene: str, grid: tuple[int, int, int]) -> torch.Tensor:
    if scene == "one colour":
        return torch.full((math.prod(grid) * 4, 1176), 0.3)
    patches = random_patches(grid)
    if scene == "duplicates":  # every unit is one of three
        units = patches.view(-1, 4, 1176)
        return units[torch.arange(len(units)) * 7 % 3].reshape(-1, 1176)
    return patches


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("grid", "keep", "proportional", "scene"),
    [
        ((2, 5, 7), 48, True, "noise"), ((2, 5, 7), 17, True, "noise"), ((2, 5, 7), 17, False, "noise"),
        ((2, 5, 7), 2, True, "noise"), ((2, 4, 8), 30, True, "duplicates"), ((2, 4, 8), 9, False, "duplicates"),
        ((2, 4, 5), 8, True, "one colour"), ((1, 1, 1), 1, True, "noise"), ((1, 3, 2), 1, True, "duplicates"),
    ],
)  # fmt: skip
def test_tome_inside_the_encoder(grid, keep, proportional, scene):
    patches, method = patches_of(scene, grid), methods.get("tome", {"size_bias": str(proportional)})
    made = encoded(method, patches, grid, keep)
    units, owner, tokens = tome_slowly(tiny_tower(), patches, grid, keep, proportional)
    assert len(units) == keep and made.kept.tolist() == units
    assert made.owner.tolist() == owner
    torch.testing.assert_close(made.features.double(), tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.full
@pytest.mark.parametrize(
    ("keep", "scene"),
    [(1, "noise"), (3, "duplicates"), (7, "one colour"), (24, "duplicates"), (99, "one colour"), (100, "noise")],
)
def test_tome_counts_owners_and_determinism(keep, scene):
    grid, method = (5, 4, 5), methods.get("tome")
    patches = patches_of(scene, grid)
    made, again, in_pieces = (encoded(method, patches, grid, keep, chunk_units=size) for size in (10**6, 10**6, 1))
    assert len(made.kept) == keep and (made.kept.diff() > 0).all() and made.features.isfinite().all()
    # Every unit has an owner, which is a row of the same frame pair and represents the unit at whose place it sits.
    unit = made.kept if len(made.rows) == keep else torch.stack([(made.owner == r).nonzero()[0, 0] for r in range(5)])
    assert made.owner.unique().tolist() == list(range(len(made.rows)))
    assert torch.equal(unit[made.owner] // 20, torch.arange(100) // 20)
    assert torch.equal(made.owner[made.kept].unique(), made.owner[made.kept])
    assert torch.equal(made.kept, again.kept) and torch.equal(made.features, again.features)
    assert torch.equal(made.kept, in_pieces.kept) and torch.equal(made.owner, in_pieces.owner)
    torch.testing.assert_close(made.features, in_pieces.features, atol=2e-5, rtol=1e-5)


def test_tome_takes_as_many_from_every_layer():
    tower, method = TowerShape(8, (1, 3, 5, 7)), methods.get("tome")
    assert method.rows(tower, 96, 6, 16) == [86, 76, 66, 56, 46, 36, 26, 16]
    assert method.rows(tower, 96, 6, 2) == [84, 72, 61, 49, 37, 25, 14, 2]
    # A window keeps a row; the next layer over whole pairs makes up for it.
    assert method.rows(TowerShape(4, (3,)), 40, 9, 1) == [30, 20, 11, 1]
    assert method.rows(TowerShape(4, (3,)), 40, 20, 1) == [30, 20, 20, 1]
    early = methods.get("tome:allocation=decreasing").rows(tower, 96, 6, 24)
    assert [a - b for a, b in zip([96, *early], early, strict=False)] == [16, 14, 12, 10, 8, 6, 4, 2]
    made = encoded(method, random_patches((1, 8, 12)), (1, 8, 12), 48, full_layers=(3,))
    assert made.layers == [(0, 96), (1, 84), (2, 72), (3, 60)] and len(made.rows) == 48


class FirstAbsorbed(EvoPrunePaper):
    absorbed = 0


def test_tome_is_the_papers_method_without_its_penalties():
    """And with the other row of each two absorbed."""
    grid, patches = (2, 5, 7), random_patches((2, 5, 7))
    plain = {"diversity": 0.0, "attention": 0.0, "critical": 0.0}
    for schedule in ({}, {"allocation": "skip", "first": "0.2", "last": "0.5"}):
        tome = methods.get("tome", schedule)
        whole = {"allocation": tome.allocation, "first": tome.first, "last": tome.last}
        one, other = (encoded(method, patches, grid, 17) for method in (tome, FirstAbsorbed(**plain, **whole)))
        assert torch.equal(one.kept, other.kept) and torch.equal(one.features, other.features)


@pytest.mark.parametrize("argument", ["diversity", "attention", "critical", "features"])
def test_what_is_fixed_in_tome_is_no_setting(argument):
    with pytest.raises(UsageError, match="no argument"):
        methods.get("tome", {argument: "1"})


# --- EvoPrune's paper ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({}, {"keys"}),
        ({"features": "hidden"}, {"hidden"}),
        ({"features": "hidden", "attention": 0.1}, {"hidden", "attention"}),
        ({"critical": 0.1}, {"keys", "attention"}),
    ],
)
def test_merging_asks_for_no_more_than_it_uses(settings, needs):
    assert EvoPruneMerge(**settings).needs == needs


def test_the_papers_settings():
    paper, other = methods.get("evoprune-paper"), methods.get("evoprune-merge")
    assert (paper.allocation, paper.attention, paper.critical) == ("skip", 0.1, 0.1)
    assert (other.allocation, other.attention, other.critical) == ("decreasing", 0.0, 0.0)
    assert (paper.first, paper.last, paper.diversity) == (other.first, other.last, other.diversity)


def attended(n, attention, seed=0):
    """One group of n random rows."""
    features = torch.randn(1, n, 6, generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(1, n, dtype=torch.int64)
    return Candidates(features, torch.tensor([attention]), torch.arange(n)[None], ones, ones.bool(), n)


def test_critical_rows_are_the_most_attended_and_the_last_to_be_absorbed():
    group = attended(8, [0.1, 0.9, 0.1, 0.2, 0.1, 0.8, 0.1, 0.1])  # of the sources, 1 and 5 are critical
    method = EvoPruneMerge(critical=0.25, diversity=0.0)
    assert [i for i, at in enumerate(method.match(group, torch.tensor([2]))[0].tolist()) if at != i] == [3, 7]
    assert [i for i, at in enumerate(method.match(group, torch.tensor([4]))[0].tolist()) if at != i] == [1, 3, 5, 7]


@pytest.mark.parametrize(
    ("share", "n", "critical"), [(0.1, 1, 1), (0.1, 10, 1), (0.1, 11, 2), (0.5, 5, 3), (0.55, 100, 55), (1.0, 4, 4)]
)
def test_the_critical_share_is_rounded_up(share, n, critical):
    group = attended(n, [1.0 - i / 1000 for i in range(n)])  # so the critical rows are the first ones
    group.features[0, :critical] = group.features[0, 0]  # and go first, if nothing holds them back
    free = [i for i in range(critical, n) if i % 2]  # sources that may go
    into = EvoPruneMerge(critical=share, diversity=0.0).match(group, torch.tensor([len(free)]))[0].tolist()
    assert [i for i in range(n) if into[i] != i] == free


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 99))
def test_no_group_takes_more_rounds_than_the_method_says(n, left, seed):
    random, left, taken, rows = torch.Generator().manual_seed(seed), min(left, n), 0, n
    while rows > left:
        group = attended(rows, torch.rand(rows, generator=random).tolist(), seed + taken)
        into = EvoPrunePaper().match(group, torch.tensor([rows - left]))[0]
        rows, taken = int((into == torch.arange(rows)).sum()), taken + 1
    assert rows == left
    assert taken == EvoPrunePaper().rounds(n, left) == math.ceil(math.log2(math.ceil(n / left))) <= n - left
