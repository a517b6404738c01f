import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.pruning.types import Candidates
from tests.methods.published import published


def rounds_taken(method, places, width, left, seed) -> int:
    """How often a group must be matched until `left` of its rows are there."""
    random = torch.Generator().manual_seed(seed)
    count, place = 0, torch.tensor(places)
    while (n := len(place)) > left:
        features, ones = torch.randn(1, n, 4, generator=random), torch.ones(1, n, dtype=torch.int64)
        attention = torch.rand(1, n, generator=random)
        into = method.match(
            Candidates(features, attention, place[None], ones * 0, ones, ones.bool(), width), torch.tensor([n - left])
        )
        place = place[into[0] == torch.arange(n)]
        count += 1
    return count


@settings(deadline=None, max_examples=150)
@given(
    st.sets(st.integers(0, 59), min_size=1, max_size=20),
    st.integers(1, 9),
    st.integers(1, 20),
    st.sampled_from(["alternate", "checkerboard"]),
    st.sampled_from(["destination", "attended"]),
    st.integers(0, 99),
)
def test_no_group_takes_more_rounds_than_the_method_says(places, width, left, split, survivor, seed):
    method, left = published(split=split, survivor=survivor), min(left, len(places))
    taken = rounds_taken(method, sorted(places), width, left, seed)
    said = method.rounds(len(places), left)
    assert taken <= said <= len(places) - left
    if split == "alternate":
        assert taken == said == math.ceil(math.log2(math.ceil(len(places) / left)))


@pytest.mark.parametrize(("split", "said"), [("alternate", 4), ("checkerboard", 5)])
def test_a_window_takes_few_rounds_down_to_one_row(split, said):
    assert published(split=split).rounds(16, 1) == said
    # One dark place among light ones is the worst case.
    places = [0, 1, *range(2, 30, 2)]
    assert rounds_taken(published(split=split), places, 60, 1, 0) == said
