"""The peers' methods, each against its specification followed line by line in loops, on random and on adversarial input."""

from math import prod

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.mmr import most_relevant
from tests.methods.tokens import KINDS, chosen, cosine, features_of, first_of, scaled, settled, tokens_of

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def examples(count: int = 120):
    """The same examples every time: at the edge of rounding the last bits of two ways to compute a score decide."""

    def decorate(test):
        test = given(grids, st.sampled_from(KINDS), st.integers(0, 1000), st.data())(test)
        return settings(max_examples=count, deadline=None, derandomize=True)(test)

    return decorate


# --- mmr ---------------------------------------------------------------------------------------------------------------


def mmr_line_by_line(x: torch.Tensor, importance: list[float], keep: int, lam: float) -> list[int]:
    n = len(x)
    importance = [settled(value) for value in scaled(importance)]
    cos = [[cosine(a, b) for b in x] for a in x]
    picked = [first_of([settled(lam * value) for value in importance], max)]
    while len(picked) < keep:
        score = [settled(lam * importance[i] - (1 - lam) * max(cos[i][j] for j in picked)) for i in range(n)]
        picked.append(first_of([-9.0 if i in picked else score[i] for i in range(n)], max))
    return sorted(picked)


@examples()
def test_mmr(grid, kind, seed, data):
    keep, lam = data.draw(st.integers(1, prod(grid))), data.draw(st.sampled_from([0.0, 0.3, 0.5, 1.0]))
    tokens = tokens_of(kind, grid, seed)
    for name, importance in (("attention", tokens.attention), ("keynorm", tokens.keys.norm(dim=1))):
        expected = mmr_line_by_line(tokens.features, importance.tolist(), keep, lam)
        assert chosen(f"mmr:importance={name}:lam={lam}", tokens, keep) == expected


def test_mmr_with_any_importance():
    x, importance = features_of("random", 30), torch.arange(30.0) * 1000 - 7
    assert most_relevant(x, importance, 5, lam=1.0).tolist() == [25, 26, 27, 28, 29]
    assert most_relevant(x, importance.half(), 9).tolist() == mmr_line_by_line(x, importance.half().tolist(), 9, 0.5)
    assert most_relevant(torch.eye(4).repeat(2, 1), torch.ones(8), 4, lam=0.2).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(("argument", "text"), [("lam", "1.1"), ("lam", "nan"), ("importance", "queries")])
def test_mmr_refuses_what_makes_no_sense(argument, text):
    with pytest.raises(UsageError, match=argument):
        methods.get("mmr", {argument: text})
