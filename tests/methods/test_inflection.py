"""`-b auto:inflection`: the curve of a method's sorted scores says how many tokens are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.inflection import Inflection, by_inflection, inflection
from evoprune.pruning.types import Tokens
from tests.methods.tokens import ranked, snapped, tokens_of

RANKING = [name for name in methods.built_in() if getattr(methods.get(name), "scores", None) is not None]


def inflection_line_by_line(scores: list[float]) -> int:
    curve = [scores[i] for i in ranked(scores)]
    low, high, last = curve[-1], curve[0], len(curve) - 1
    if low == high:
        return len(curve)
    depth = [snapped((1 - i / last) - (value - low) / (high - low)) for i, value in enumerate(curve)]
    return depth.index(max(depth)) if max(depth) > 0 else len(curve)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.lists(st.integers(-50, 50), min_size=1, max_size=40))
def test_the_inflection_point(scores):
    assert inflection(torch.tensor(scores, dtype=torch.float32)) == inflection_line_by_line([float(s) for s in scores])


def test_a_long_tail_is_cut_off():
    assert inflection(torch.tensor([9.0, 0.1, 8.0, 0.0, 0.2, 10.0, 0.1, 0.0])) == 3
    assert inflection(torch.tensor([1.0, 0.9, 0.8, 0.0])) == 4  # no tail: a cliff at the end
    assert inflection(torch.ones(5)) == 5


def test_the_methods_that_rank_tokens():
    assert {"visionzip", "vispruner", "mmr", "cdpruner", "evs-nofloor", "adjacent", "par", "nuwa"} <= set(RANKING)
    for name in RANKING:
        tokens = tokens_of("random", (5, 4, 5))
        assert methods.get(name).scores(tokens).shape == (100,)


@pytest.mark.parametrize("name", RANKING)
def test_the_count_is_the_contents_inside_the_bounds(name):
    for kind in ("random", "duplicates", "constant", "drift"):
        tokens, method = tokens_of(kind, (5, 4, 5)), by_inflection(methods.get(name))
        keep = min(50, max(5, inflection(methods.get(name).scores(tokens))))
        made, expected = method.select(tokens, 50), methods.get(name).select(tokens, keep)
        assert len(made.kept) == keep and torch.equal(made.kept, expected.kept)
        assert not method.exact and (method.name, method.args) == (name, methods.get(name).args)


def test_few_attended_tokens_are_few_tokens():
    attention = torch.ones(100)
    attention[[3, 40, 41, 42, 77, 78, 79, 80, 90, 91]] = 50.0
    tokens = Tokens(torch.eye(100), torch.arange(100), (1, 10, 10), given={"attention": attention})
    assert (
        by_inflection(methods.get("mmr")).select(tokens, 50).kept.tolist()
        == attention.argsort()[-10:].sort().values.tolist()
    )


def test_it_works_behind_reuse():
    method = by_inflection(methods.get("reuse+visionzip"))
    assert method.then == Inflection(of=methods.get("visionzip")) and not method.exact
    assert method.args == methods.get("reuse+visionzip").args


@pytest.mark.parametrize("name", ["evoprune", "divprune", "pool", "reuse+divprune", "tome", "none", "downscale"])
def test_methods_without_scores_are_refused(name):
    with pytest.raises(UsageError, match="has no scores") as caught:
        by_inflection(methods.get(name))
    assert "visionzip" in caught.value.hint
