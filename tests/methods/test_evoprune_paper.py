"""Test merging: pairs are scored and matched in strips of rows, and the shapes of row indices are known from the plan."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.methods import evoprune_paper
from evoprune.methods.evoprune_paper import EvoPruneMerge, EvoPrunePaper, best_partners
from evoprune.methods.plans import TowerShape
from evoprune.methods.ranking import match
from evoprune.methods.types import Candidates
from evoprune.vision.merging import share_rows
from evoprune.vision.rows import merge_rows
from tests.methods.tokens import KINDS, Largest, cosine, features_of


def padded(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def matched(score, source, valid, last, remove):
    return match(*best_partners(score, source, valid & ~source), source, last, remove)


def match_by_hand(score, source, valid, last, remove):
    into = []
    for b in range(len(score)):
        n = score.shape[1]
        sources = [i for i in range(n) if source[b, i]]
        targets = [j for j in range(n) if valid[b, j] and not source[b, j]]
        best = {i: max(targets, key=lambda j: (float(score[b, i, j]), -j)) for i in sources}
        order = sorted(sources, key=lambda i: (bool(last[b, i]), -float(score[b, i, best[i]]), i))
        going = order[: int(remove[b])]
        into.append([best[i] if i in going else i for i in range(n)])
    return into


@st.composite
def matchings(draw):
    lengths = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    valid = padded(lengths)
    b, n = valid.shape
    levels = draw(st.sampled_from([1, 2, 3, 1000]))  # few levels: many ties; one: all scores are equal
    score = torch.randint(levels, (b, n, n), generator=random) / levels - 0.5
    source = (torch.rand(b, n, generator=random) < 0.5) & valid
    source[:, 0] = False  # one possible destination
    last = torch.rand(b, n, generator=random) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    remove = torch.randint(0, n + 2, (b,), generator=random)
    return score, source, valid, last, remove


@settings(deadline=None, max_examples=40)
@given(matchings())
def test_match_against_loops(case):
    assert matched(*case).tolist() == match_by_hand(*case)


def test_equal_scores_go_by_index_in_large_groups_too():
    n = 500
    source = (torch.arange(n) % 2 == 1)[None]
    valid, last = torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.bool)
    into = matched(torch.full((1, n, n), 0.25), source, valid, last, torch.tensor([100]))[0]
    assert into.tolist() == [0 if i % 2 and i < 200 else i for i in range(n)]


@st.composite
def merges(draw):
    n = draw(st.integers(1, 12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    stays = torch.rand(n, generator=random) < draw(st.sampled_from([0.2, 0.6, 1.0]))
    stays[int(torch.randint(n, (1,), generator=random))] = True
    targets = stays.nonzero().flatten()
    into = torch.where(stays, torch.arange(n), targets[torch.randint(len(targets), (n,), generator=random)])
    size = torch.randint(1, 20, (n,), generator=random)
    x = torch.randn(n, *draw(st.sampled_from([(3,), (4, 2)])), generator=random)
    return x, size, into


@settings(deadline=None, max_examples=40)
@given(merges(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_merge_rows_against_loops(case, dtype):
    x, size, into = case
    x = x.to(dtype)
    copies = x.clone(), size.clone(), into.clone()
    rows = int((into == torch.arange(len(x))).sum())
    made = merge_rows(x, size, into, rows, len(x) - rows)
    assert made.dtype == dtype and all(map(torch.equal, (x, size, into), copies))
    staying = [r for r in range(len(x)) if into[r] == r]
    assert len(made) == len(staying)
    for out, row in zip(made, staying, strict=True):
        members = [r for r in range(len(x)) if into[r] == row]
        mean = sum(float(size[r]) * x[r].double() for r in members) / float(size[members].sum())
        if len(members) == 1:
            assert torch.equal(out, x[row])  # to the last bit
        else:
            near = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-6, "rtol": 2**-8}
            torch.testing.assert_close(out.double(), mean, **near)


# Scores of large groups are never held all at once.

WIDTH = 9


def candidates(lengths, seed=0, dimensions=6):
    random = torch.Generator().manual_seed(seed)
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    shape = valid.shape
    return Candidates(
        torch.randn(*shape, dimensions, generator=random),
        torch.rand(shape, generator=random),
        torch.randint(WIDTH * WIDTH, shape, generator=random).sort(1).values,
        torch.ones(shape, dtype=torch.int64),
        valid,
        WIDTH,
    )


@settings(deadline=None, max_examples=30)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    seed=st.integers(0, 99),
    held=st.sampled_from([1, 60, 300, 2000]),
    method=st.sampled_from([EvoPrunePaper(), EvoPrunePaper(diversity=0.0, critical=0.3), EvoPruneMerge()]),
    share=st.floats(0, 1),
)
def test_matches_do_not_depend_on_the_strips(lengths, seed, held, method, share):
    groups, remove = candidates(lengths, seed), torch.tensor([round(n * share / 2) for n in lengths])
    whole = method.match(groups, remove)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evoprune_paper, "MAX_SCORES", held)
        assert torch.equal(method.match(groups, remove), whole)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "rows"),
    [(EvoPruneMerge(diversity=0.0), 900), (EvoPrunePaper(), 900), (EvoPrunePaper(), 2700)],
    ids=["plain", "density and attention", "three times as many"],
)
def test_memory_for_scores_is_bounded(method, rows, monkeypatch):
    monkeypatch.setattr(evoprune_paper, "MAX_SCORES", 1 << 14)
    groups = candidates([rows])
    if "attention" not in method.needs:
        groups = replace(groups, attention=None)
    with Largest() as largest:
        method.match(groups, torch.tensor([rows // 4]))
    assert rows * 6 <= largest.numbers <= 1 << 14 < rows * rows / 40


# Indices.


@st.composite
def sizes_and_totals(draw):
    groups, most = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 16, 100]))
    sizes = draw(
        st.lists(st.lists(st.integers(0, most), min_size=groups, max_size=groups).filter(any), min_size=1, max_size=4)
    )
    return sizes, [draw(st.integers(sum(map(bool, row)), sum(row))) for row in sizes], most


def one_by_one(sizes: list[int], total: int) -> list[int]:
    """Return the groups' shares of a frame pair, adjusted one row at a time."""
    whole = sum(sizes)
    counts = [max(1, total * size // whole) if size else 0 for size in sizes]
    excess = [count * whole - total * size for count, size in zip(counts, sizes, strict=True)]  # in whole numbers
    while missing := total - sum(counts):
        step = 1 if missing > 0 else -1
        for i in sorted(range(len(sizes)), key=lambda i: step * excess[i]):  # ties by index
            if sum(counts) != total and 0 < counts[i] + step <= sizes[i]:
                counts[i] += step
    return counts


@settings(max_examples=100, deadline=None)
@given(sizes_and_totals(), st.integers(0, 3))
def test_shares_are_those_by_turns_within_their_bounds_and_larger_groups_never_get_less(case, slack):
    sizes, totals, most = case
    made = share_rows(torch.tensor(sizes), torch.tensor(totals), most + slack).tolist()
    assert made == [one_by_one(row, total) for row, total in zip(sizes, totals, strict=True)]
    for row, total, counts in zip(sizes, totals, made, strict=True):
        assert sum(counts) == total
        assert all((size > 0) <= count <= size for count, size in zip(counts, row, strict=True))
        exact = [Fraction(total * size, sum(row)) for size in row]
        if all(share >= 1 or share == 0 for share in exact):  # no floor binds
            assert all(abs(count - share) < 1 for count, share in zip(counts, exact, strict=True))
        else:  # a group below its share lost to a floor
            assert all(count <= math.ceil(share) or count == 1 for count, share in zip(counts, exact, strict=True))
        shared = list(zip(row, counts, strict=True))
        for size, count in shared:
            for other, others_count in shared:
                assert size < other or count >= others_count - (size == other)


# Methods inside the encoder, against their specifications line by line.


def tome_line_by_line(keys: list[torch.Tensor], r: int) -> list[int]:
    """Follow section 3 of the paper and return where each token is merged (r of them at most), or the token itself."""
    n = len(keys)
    a, b = list(range(0, n, 2)) if n > 1 else [], list(range(1, n, 2))  # partition them into two sets, by turns
    edge = {i: max(b, key=lambda j: (cosine(keys[i], keys[j]), -j)) for i in a}  # one edge from each in A
    strongest = sorted(a, key=lambda i: (-cosine(keys[i], keys[edge[i]]), i))[:r]  # keep the r most similar
    return [edge[i] if i in strongest else i for i in range(n)]


def group_of(kind: str, sizes: list[int], seed: int) -> Candidates:
    """Return groups of these sizes side by side, with meaningless values as padding."""
    longest = max(sizes)
    features = torch.stack([features_of(kind, longest, seed + i) for i in range(len(sizes))])
    valid = torch.arange(longest) < torch.tensor(sizes)[:, None]
    features[~valid] = features[:, :1].expand_as(features)[~valid]  # as similar as the first one
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


def test_tome_takes_as_many_from_every_layer():
    tower, method = TowerShape(8, (1, 3, 5, 7)), methods.get("tome")
    assert method.rows(tower, 96, 6, 16) == [86, 76, 66, 56, 46, 36, 26, 16]
    assert method.rows(tower, 96, 6, 2) == [84, 72, 61, 49, 37, 25, 14, 2]
    # A window keeps a row; the next layer over whole pairs makes up for it.
    assert method.rows(TowerShape(4, (3,)), 40, 9, 1) == [30, 20, 11, 1]
    assert method.rows(TowerShape(4, (3,)), 40, 20, 1) == [30, 20, 20, 1]
    early = methods.get("tome:allocation=decreasing").rows(tower, 96, 6, 24)
    assert [a - b for a, b in zip([96, *early], early, strict=False)] == [16, 14, 12, 10, 8, 6, 4, 2]


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
