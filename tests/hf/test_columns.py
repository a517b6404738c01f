"""Compare the remaining columns of a batch with a reference implementation that uses lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.errors import UsageError
from evoprune.hf.columns import Columns


@st.composite
def batches(draw):
    """Draw dropped columns and a mask with left padding in some rows."""
    rows, width = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    dropped = torch.tensor(draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width))).view(
        rows, width
    )
    pads = torch.tensor(draw(st.lists(st.integers(0, width), min_size=rows, max_size=rows)))
    mask = (torch.arange(width) >= pads[:, None]).long()
    return dropped & (mask > 0), mask


def columns_of(dropped, mask=None):
    return Columns.of([row.logical_not().nonzero()[:, 0] for row in dropped], dropped, mask)


def by_hand(dropped, mask):
    rows = []
    for gone, used in zip(dropped.tolist(), mask.tolist(), strict=True):
        first = used.index(1) if 1 in used else len(used)
        left = [i for i, x in enumerate(gone) if not x]
        rows.append((left, len([i for i in left if i >= first])))
    places = max(1, *(needed for _, needed in rows))
    return [[-1] * max(0, places - len(left)) + left[max(0, len(left) - places) :] for left, _ in rows]


@settings(deadline=None)
@given(batches())
def test_each_row_loses_its_own_columns_and_all_end_together(batch):
    dropped, mask = batch
    columns = columns_of(dropped, mask)
    assert columns.index.tolist() == by_hand(dropped, mask)
    assert columns.padded == any(-1 in row for row in columns.index.tolist())
    assert columns_of(dropped).index.tolist() == by_hand(dropped, torch.ones_like(mask))


@settings(deadline=None)
@given(batches(), st.integers(0, 3))
def test_take_reads_the_columns_that_are_left(batch, more):
    dropped, mask = batch
    columns = columns_of(dropped, mask).following(dropped.shape[1] + more)
    assert columns.places == columns.index.shape[1] and columns.width == dropped.shape[1] + more
    x = torch.randint(100, (2, len(dropped), columns.width))
    taken = columns.take(x, fill=-5)
    for i, row in enumerate(columns.index.tolist()):
        for r in range(2):
            assert taken[r, i].tolist() == [-5 if column < 0 else int(x[r, i, column]) for column in row]
    assert torch.equal(columns.take(x[0], -5), taken[0])
    assert torch.equal(columns.take(x[:, :1]), columns.take(x[:, :1].expand_as(x)))


def test_columns_can_be_cut_back_unless_padded():
    dropped = torch.tensor([[0, 1, 1, 0, 0, 1, 0, 0]], dtype=torch.bool)
    columns = columns_of(dropped)
    assert columns.index.tolist() == [[0, 3, 4, 6, 7]]
    for places, width in ((1, 3), (2, 4), (3, 6), (4, 7)):
        cut = columns.first(places)
        assert cut.index.tolist() == [[0, 3, 4, 6, 7][:places]] and cut.width == width
    with pytest.raises(UsageError, match="padded batch"):
        columns_of(torch.tensor([[0, 1, 0, 0], [0, 0, 1, 0]], dtype=torch.bool)).first(1)
