"""`-b auto:inflection`: the curve of a method's sorted scores says how many tokens are kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.chain import inflection, tokens_before_inflection
from evoprune.methods.plans import Inflection, TowerShape
from evoprune.methods.types import Tokens
from tests.methods.tokens import encoded, ranked, snapped, tokens_of
from tests.vision.clips import changes, clip

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
        tokens, method = tokens_of(kind, (5, 4, 5)), methods.parse(name).by_inflection()
        keep = min(50, max(5, inflection(method.selector.scores(tokens))))
        assert tokens_before_inflection(method.selector, tokens, 50) == keep
        assert not method.exact and (method.name, method.args) == (methods.get(name).name, methods.get(name).args)
        assert method.plan(TowerShape(8, (7,)), (5, 4, 5), 50).token_stage.reduce == Inflection(methods.get(name))


def test_few_attended_tokens_are_few_tokens():
    attention = torch.ones(100)
    attention[[3, 40, 41, 42, 77, 78, 79, 80, 90, 91]] = 50.0
    tokens = Tokens(torch.eye(100), torch.arange(100), (1, 10, 10), given={"attention": attention})
    assert tokens_before_inflection(methods.get("mmr"), tokens, 50) == 10


def test_it_works_behind_reuse():
    method = methods.parse("reuse+visionzip").by_inflection()
    assert not method.exact and method.args == methods.parse("reuse+visionzip").args
    made = encoded(method, clip((5, 4, 5), changes((5, 4, 5), 0.4)), (5, 4, 5), 50)
    assert 5 <= len(made.kept) < 50


@pytest.mark.parametrize("name", ["evoprune", "divprune", "pool", "reuse+divprune", "tome", "none", "downscale"])
def test_methods_without_scores_are_refused(name):
    with pytest.raises(UsageError, match="has no scores") as caught:
        methods.parse(name).by_inflection()
    assert "visionzip" in caught.value.hint
