import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning.indices import runs, tally, true_indices
from evoprune.pruning.schedule import share_by_size
from evoprune.pruning.shares import share_rows


@st.composite
def sizes_and_totals(draw):
    groups, most = draw(st.integers(1, 12)), draw(st.sampled_from([1, 2, 16, 100]))
    sizes = draw(
        st.lists(st.lists(st.integers(0, most), min_size=groups, max_size=groups).filter(any), min_size=1, max_size=4)
    )
    return sizes, [draw(st.integers(sum(map(bool, row)), sum(row))) for row in sizes], most


@settings(max_examples=100, deadline=None)
@given(sizes_and_totals(), st.integers(0, 3))
def test_many_shares_at_once_are_the_shares_one_by_one(case, slack):
    sizes, totals, most = case
    made = share_rows(torch.tensor(sizes), torch.tensor(totals), most + slack)
    assert made.tolist() == [share_by_size(row, total) for row, total in zip(sizes, totals, strict=True)]


def test_where_floors_take_several_turns():
    for sizes, total in (
        ([1, 1, 1, 97], 4),
        ([1] * 9 + [5, 6, 7], 13),
        ([1] * 30 + [16, 16], 33),
        ([0, 1, 2, 0, 15], 3),
    ):
        made = share_rows(torch.tensor([sizes]), torch.tensor([total]), max(sizes))
        assert made[0].tolist() == share_by_size(sizes, total)


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
