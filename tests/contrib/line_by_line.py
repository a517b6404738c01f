"""Helpers for tests that follow a method's specification line by line."""

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune.methods import Selection, Tokens
from tests.methods.tokens import KINDS

grids = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def examples(count: int = 30):
    """Draw the same examples every time, because two ways to compute a score may round differently."""

    def decorate(test):
        test = given(grids, st.sampled_from(KINDS), st.integers(0, 1000), st.data())(test)
        return settings(max_examples=count, deadline=None, derandomize=True)(test)

    return decorate


def shares(keep: int, count: int) -> list[int]:
    """Distribute `keep` over `count` grids, as differences of the rounded running total."""
    due = [grid * keep // count for grid in range(count + 1)]
    return [later - before for before, later in pairwise(due)]


def assert_means(made: Selection, tokens: Tokens, keep: int, members_of: dict[int, list[tuple[int, float]]]) -> None:
    """Check a selection whose tokens are means. `members_of`: kept unit -> weighted members of its mean."""
    assert made.kept.tolist() == sorted(members_of) and len(members_of) == keep
    owner = [-1] * len(tokens.unit_to_row)
    for number, unit in enumerate(sorted(members_of)):
        for member, _ in members_of[unit]:
            owner[member] = number
    assert made.unit_to_token.tolist() == owner
    x = tokens.features
    for unit, token in zip(sorted(members_of), made.features(x), strict=True):
        total = sum(weight for _, weight in members_of[unit])
        mean = sum(weight * x[member].double() for member, weight in members_of[unit]) / total
        torch.testing.assert_close(token.double(), mean, atol=1e-5, rtol=1e-5)


def mean_of(vectors: list[torch.Tensor]) -> torch.Tensor:
    return sum(vectors) / len(vectors)
