"""How pairs of rows are scored and matched, in strips of rows; and indices of rows in shapes known from the plan."""

import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.contrib.encoder import EvoPruneMerge
from evoprune.methods import ranking
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.ranking import (
    alternate,
    best_partners,
    composite_score,
    local_density,
    match,
    merge_rows,
    relative_attention,
    similarity,
    strips,
    unit_features,
)
from evoprune.methods.types import Candidates, runs, share_rows, tally, true_indices
from tests.methods.tokens import Largest


def groups(lengths, width=6, seed=0):
    """Random features of groups of these lengths, padded with garbage, and which rows are valid."""
    features = torch.randn(len(lengths), max(lengths), width, generator=torch.Generator().manual_seed(seed))
    valid = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return features, valid


def cosine(a, b):
    lengths = math.dist(a, [0] * len(a)), math.dist(b, [0] * len(b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / (lengths[0] * lengths[1]) if all(lengths) else 0.0


def density_by_hand(features, valid, neighbours):
    out = torch.ones(valid.shape)
    for b, group in enumerate(features.tolist()):
        n = int(valid[b].sum())
        for i in range(n):
            nearest = sorted((cosine(group[i], group[j]) for j in range(n) if j != i), reverse=True)[:neighbours]
            if nearest:
                out[b, i] = sum(nearest) / len(nearest)
    return out


def test_unit_features_join_patches_and_average_heads():
    x = torch.arange(2 * 4 * 3 * 5, dtype=torch.bfloat16).view(2, 4, 3, 5)
    expected = [[sum(float(x[r, p, h, i]) for h in range(3)) / 3 for p in range(4) for i in range(5)] for r in range(2)]
    made = unit_features(x)
    assert made.dtype == torch.float32
    torch.testing.assert_close(made, torch.tensor(expected))


def test_similarity_is_the_cosine():
    features, _ = groups([5, 3])
    features[0, 2] = 0
    features[0, 3] = -7 * features[0, 1]
    expected = [[[cosine(a, b) for b in group] for a in group] for group in features.tolist()]
    torch.testing.assert_close(similarity(features), torch.tensor(expected), atol=1e-6, rtol=0)
    assert (similarity(features)[0, 2] == 0).all()


@pytest.mark.parametrize("neighbours", [1, 2, 4, 100])
def test_local_density_against_loops(neighbours):
    features, valid = groups([7, 1, 2, 5, 7])
    features[3, 0] = 0
    made = local_density(similarity(features), valid, neighbours)
    torch.testing.assert_close(made[valid], density_by_hand(features, valid, neighbours)[valid], atol=1e-6, rtol=0)


def test_relative_attention_against_loops():
    received = torch.tensor([[0.2, 0.5, 0.1, 9.0], [0.0, 0.0, 0.0, 1.0], [0.3, 0.3, 0.3, 0.3]])
    valid = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    expected = torch.tensor([[0.4, 1.0, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    torch.testing.assert_close(relative_attention(received, valid), expected)


@pytest.mark.parametrize(("diversity", "attention"), [(0.1, 0.2), (-0.5, 1.0), (0.3, 0.0), (0.0, 0.4), (0.0, 0.0)])
def test_composite_score_against_loops(diversity, attention):
    features, valid = groups([5, 4])
    cos = similarity(features)
    density = local_density(cos, valid, 2)
    attended = torch.rand(2, 5, generator=torch.Generator().manual_seed(1))
    made = composite_score(cos, density if diversity else None, attended if attention else None, diversity, attention)
    for b in range(2):
        for i in range(5):
            for j in range(5):
                lone = max(1 - float(density[b, i]), 1 - float(density[b, j]))
                expected = float(cos[b, i, j]) - diversity * lone - attention * max(attended[b, [i, j]].tolist())
                assert float(made[b, i, j]) == pytest.approx(expected, abs=1e-6)


# Matching.


def padded(lengths):
    """Which rows are valid in groups of these lengths."""
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def test_every_second_row_of_a_group_may_merge():
    assert alternate(padded([5, 2, 1])).tolist() == [
        [False, True, False, True, False],
        [False, True, False, False, False],
        [False] * 5,
    ]


# --- match ---------------------------------------------------------------------------------------------------------------


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
    source[:, 0] = False  # somewhere to go
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


# --- mean ----------------------------------------------------------------------------------------------------------------


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
    assert made.dtype == dtype and all(torch.equal(a, b) for a, b in zip((x, size, into), copies, strict=True))
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


@given(st.integers(0, 40), st.integers(0, 60), st.integers(1, 500))
def test_strips_are_all_rows_in_order_and_few_enough(groups, rows, held):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "HELD", held)
        made = strips(groups, rows)
    assert [row for part in made for row in range(rows)[part]] == list(range(rows))
    for part in made:
        count = part.stop - part.start
        assert count == 1 or groups * count * rows <= held


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
        patch.setattr(ranking, "HELD", held)
        assert torch.equal(method.match(groups, remove), whole)


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "rows"),
    [(EvoPruneMerge(diversity=0.0), 900), (EvoPrunePaper(), 900), (EvoPrunePaper(), 2700)],
    ids=["plain", "density and attention", "three times as many"],
)
def test_memory_for_scores_is_bounded(method, rows, monkeypatch):
    monkeypatch.setattr(ranking, "HELD", 1 << 14)
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
    """The shares of one frame pair, by turns."""
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


@pytest.mark.parametrize(
    ("sizes", "total", "counts"),
    [
        ([16, 16, 16, 16], 6, [2, 2, 1, 1]),
        ([4, 4, 4], 12, [4, 4, 4]),
        ([0, 5, 0, 5], 3, [0, 2, 0, 1]),
        ([1, 1, 1, 97], 4, [1, 1, 1, 1]),
        ([1, 1, 1, 97], 50, [1, 1, 1, 47]),
        ([16, 8, 4], 7, [4, 2, 1]),
        ([7], 3, [3]),
        ([2, 8, 0, 6, 8], 20, [2, 7, 0, 5, 6]),  # remainders of 2/3 are equal: the lower indices get the rest
        ([1, 3, 3, 3, 2, 16], 20, [1, 2, 2, 2, 2, 11]),
        ([1] * 9 + [5, 6, 7], 13, [1] * 10 + [1, 2]),  # floors take several turns
        ([0, 1, 2, 0, 15], 3, [0, 1, 1, 0, 1]),
    ],
)
def test_shares_by_largest_remainder_with_ties_by_index(sizes, total, counts):
    assert share_rows(torch.tensor([sizes]), torch.tensor([total]), max(sizes)).tolist() == [counts]


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=9), st.integers(0, 12))
def test_true_indices(mask, count):
    found = [i for i, yes in enumerate(mask) if yes]
    assert true_indices(torch.tensor(mask, dtype=torch.bool), count).tolist() == (found + [0] * count)[:count]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), max_size=20))
def test_tally(index):
    assert tally(torch.tensor(index, dtype=torch.int64), 6).tolist() == [index.count(i) for i in range(6)]


@settings(deadline=None)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any), st.integers(0, 2))
def test_runs(lengths, slack):
    length = torch.tensor(lengths)
    table, valid = runs(length.cumsum(0) - length, length, max(lengths) + slack, sum(lengths))
    assert table.shape == valid.shape == (len(lengths), max(lengths) + slack)
    assert valid.sum(1).tolist() == lengths and table[valid].tolist() == list(range(sum(lengths)))
    for row, n in zip(table.tolist(), lengths, strict=True):
        assert min(row) >= 0 and max(row) < sum(lengths) and set(row[n:]) <= {row[max(n - 1, 0)]}
