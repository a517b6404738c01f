import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods.types import runs, share_rows, tally, true_indices


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
