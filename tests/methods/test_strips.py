"""Scores of large groups are never held all at once."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.contrib.encoder import EvoPruneMerge
from evoprune.methods import ranking
from evoprune.methods.evoprune_paper import EvoPrunePaper
from evoprune.methods.ranking import strips
from evoprune.methods.types import Candidates
from tests.methods.tokens import Largest

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
