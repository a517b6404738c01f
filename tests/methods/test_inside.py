"""Methods inside the encoder, against their specifications line by line."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.pruning.budget import spread
from evoprune.pruning.schedule import TowerShape
from evoprune.pruning.types import Candidates
from evoprune.vision.encoder import encode
from evoprune.vision.layout import geometry
from tests.methods.tokens import KINDS, cosine, features_of
from tests.vision.reference import Row, largest_remainder, linear, rms_norm, run_layer
from tests.vision.tower import group_key, place_key, random_patches, tiny_tower

# --- ToMe --------------------------------------------------------------------------------------------------------------


def tome_line_by_line(keys: list[torch.Tensor], r: int) -> list[int]:
    """Section 3 of the paper: where each of some tokens goes, itself if it stays; r at most half of them."""
    n = len(keys)
    a, b = list(range(1, n, 2)), list(range(0, n, 2))  # partition them into two sets, by turns
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
    return Candidates(features, None, place, place * 0, place * 0 + 1, valid, 3)


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
def test_among_equals_the_first_pairs_merge_into_the_first_row(kind):
    into = methods.get("tome").match(group_of(kind, [7], 0), torch.tensor([2]))
    assert into.tolist() == [[0, 0, 2, 0, 4, 5, 6]]


@torch.no_grad()
def tome_slowly(visual, patches, grid, keep, proportional=True) -> tuple[list[int], list[int], torch.Tensor]:
    """The whole encoder with ToMe in it: homes of the rows that are left, which stands for each unit, and tokens `[R, D]`.

    The rows of every grid become fewer by the same number in each layer, inside windows or grids as the layer attends.
    """
    count, height, width = grid
    geo, depth = geometry(height, width, 4), len(visual.blocks)
    embedding = visual.patch_embed.proj.weight.double().flatten(1)
    pixels = patches.double().view(count * geo.units, 4, -1)
    rows = [Row(unit, [unit], pixels[unit] @ embedding.T) for unit in range(count * geo.units)]
    rows.sort(key=lambda row: place_key(geo, row.home))
    method = methods.get("tome", {"size_bias": str(proportional)})  # for its bias and block alone
    for layer, block in enumerate(visual.blocks):
        whole = layer in visual.fullatt_block_indexes
        run_layer(block, rows, geo, "grid" if whole else "window", method)
        left = []
        for g, due in enumerate(spread(keep, count)):
            mine = [row for row in rows if row.home // geo.units == g]
            wish = geo.units - math.floor((geo.units - max(due, 1)) * (layer + 1) / depth + 0.5)
            wish = min(len(mine), wish if whole else max(wish, geo.windows))
            windows: dict[tuple, list[Row]] = {}
            for row in mine:
                windows.setdefault(() if whole else group_key(geo, row.home, "window"), []).append(row)
            shares = largest_remainder([len(window) for window in windows.values()], wish)
            for window, share in zip(windows.values(), shares, strict=True):
                for row in window:
                    row.feature = row.plain.mean(1).flatten()
                while len(window) > share:  # more than one round only where more than half must go
                    r = min(len(window) - share, len(window) // 2)
                    into = tome_line_by_line([row.feature for row in window], r)
                    window = [
                        merged(window, [i for i, j in enumerate(into) if j == at], at) for at in sorted(set(into))
                    ]
                left += window
        rows = sorted(left, key=lambda row: place_key(geo, row.home))
    rows.sort(key=lambda row: row.home)
    owner = [next(i for i, row in enumerate(rows) if unit in row.units) for unit in range(count * geo.units)]
    first, second = visual.merger.mlp[0], visual.merger.mlp[2]
    hidden = [linear(first, rms_norm(visual.merger.ln_q, row.x).flatten()) for row in rows]
    tokens = [linear(second, torch.nn.functional.gelu(h)) for h in hidden]
    return [row.home for row in rows], owner, torch.stack(tokens)


def merged(rows: list[Row], party: list[int], at: int) -> Row:
    """The mean of some rows, weighted with how many units each stands for, in place of one of them."""
    size = [len(rows[i].units) for i in party]
    mean = [sum(s * each for s, each in zip(size, what, strict=True)) / sum(size) for what in (
        [rows[i].x for i in party], [rows[i].feature for i in party],
    )]  # fmt: skip
    return replace(rows[at], units=[unit for i in party for unit in rows[i].units], x=mean[0], feature=mean[1])


def patches_of(scene: str, grid: tuple[int, int, int]) -> torch.Tensor:
    if scene == "one colour":
        return torch.full((math.prod(grid) * 4, 1176), 0.3)
    patches = random_patches(grid)
    if scene == "duplicates":  # every unit is one of three
        units = patches.view(-1, 4, 1176)
        return units[torch.arange(len(units)) * 7 % 3].reshape(-1, 1176)
    return patches


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
    made = encode(tiny_tower(), [patches], grid, method, keep)
    home, owner, tokens = tome_slowly(tiny_tower(), patches, grid, keep, proportional)
    assert len(home) == len(made.kept) == keep
    assert made.kept.tolist() == home
    assert made.owner.tolist() == owner
    torch.testing.assert_close(made.features.double(), tokens, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("keep", "scene"),
    [(1, "noise"), (3, "duplicates"), (7, "one colour"), (24, "duplicates"), (99, "one colour"), (100, "noise")],
)
def test_tome_counts_owners_and_determinism(keep, scene):
    grid, method = (5, 4, 5), methods.get("tome")
    patches = patches_of(scene, grid)
    made, again, in_pieces = (
        encode(tiny_tower(), [patches], grid, method, keep, chunk_units=size) for size in (10**6, 10**6, 1)
    )
    assert len(made.kept) == keep and (made.kept.diff() > 0).all() and made.features.isfinite().all()
    # Every unit has an owner, which is a row of the same grid and owns the unit at whose place it sits.
    home = made.kept if len(made.rows) == keep else torch.stack([(made.owner == r).nonzero()[0, 0] for r in range(5)])
    assert made.owner.unique().tolist() == list(range(len(made.rows)))
    assert torch.equal(home[made.owner] // 20, torch.arange(100) // 20)
    assert torch.equal(made.owner[made.kept].unique(), made.owner[made.kept])
    assert torch.equal(made.kept, again.kept) and torch.equal(made.features, again.features)
    assert torch.equal(made.kept, in_pieces.kept) and torch.equal(made.owner, in_pieces.owner)
    torch.testing.assert_close(made.features, in_pieces.features, atol=2e-5, rtol=1e-5)


def test_tome_takes_the_same_from_every_layer_and_window():
    tower, method = TowerShape(8, (1, 3, 5, 7)), methods.get("tome")
    assert method.rows(tower, 96, 6, 16) == [86, 76, 66, 56, 46, 36, 26, 16]
    assert method.rows(tower, 96, 6, 2) == [84, 72, 61, 49, 37, 25, 14, 2]
    # A window keeps a row, which grids make up for.
    assert method.rows(TowerShape(4, (3,)), 40, 9, 1) == [30, 20, 11, 1]
    assert method.rows(TowerShape(4, (3,)), 40, 20, 1) == [30, 20, 20, 1]
    early = methods.get("tome:allocation=decreasing").rows(tower, 96, 6, 24)
    assert [a - b for a, b in zip([96, *early], early, strict=False)] == [16, 14, 12, 10, 8, 6, 4, 2]
    made = encode(tiny_tower((3,)), [random_patches((1, 8, 12))], (1, 8, 12), method, 48)
    assert made.layers == [(0, 96), (1, 84), (2, 72), (3, 60)] and len(made.rows) == 48


def test_tome_is_the_papers_method_without_its_penalties():
    grid, patches = (2, 5, 7), random_patches((2, 5, 7))
    plain = {"diversity": "0", "attention": "0", "critical": "0"}
    for schedule in ({}, {"allocation": "skip", "first": "0.2", "last": "0.5"}):
        tome = methods.get("tome", schedule)
        whole = {"allocation": tome.allocation, "first": str(tome.first), "last": str(tome.last)}
        one, other = (
            encode(tiny_tower(), [patches], grid, method, 17)
            for method in (tome, methods.get("evoprune-paper", plain | whole))
        )
        assert torch.equal(one.kept, other.kept) and torch.equal(one.features, other.features)


@pytest.mark.parametrize("argument", ["diversity", "attention", "critical", "block", "split", "windows", "features"])
def test_what_is_fixed_in_tome_is_no_setting(argument):
    with pytest.raises(UsageError, match="no argument"):
        methods.get("tome", {argument: "1"})
