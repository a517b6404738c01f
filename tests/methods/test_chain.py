"""Budgets and methods are parsed once, into objects that all later code uses. Also tests `-b auto:inflection`."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods import MethodText
from evoprune.methods.budget import Budget
from evoprune.methods.plans import TowerShape
from evoprune.methods.selecting import inflection_point, tokens_before_inflection
from evoprune.session import PruneOptions
from evoprune.video_qa import VideoQA
from evoprune.vision import encode_rows
from tests.methods.tokens import AFTER, ranked, snapped, tokens_of
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

CLIP, STILL = (5, 4, 5), (1, 4, 5)


@pytest.mark.parametrize(
    ("text", "clip", "still"), [("0.1", 10, 2), ("10%", 10, 2), ("fast", 10, 6), ("full", 100, 20), ("auto", 50, 10)]
)
def test_a_budget_keeps_a_share_of_a_clip_and_of_a_still(text, clip, still):
    config = PruneOptions(text, "evoprune").config()
    assert (config.budget.keep(CLIP), config.budget.keep(STILL)) == (clip, still)
    tower = TowerShape(8, (7,))
    assert [config.plan(tower, grid).keep for grid in (CLIP, STILL)] == [clip, still]
    assert config.budget.share_of_all([CLIP, STILL]) == pytest.approx((clip + still) / 120)


@pytest.mark.parametrize("text", ["25%", "0.1", "fast", "auto", 0.5])
def test_a_budget_is_parsed_once(monkeypatch, text):
    wanted = Budget.parse(text, auto=True)
    parsed, parse = [], Budget.parse
    monkeypatch.setattr(Budget, "parse", lambda *given, **how: parsed.append(given) or parse(*given, **how))
    assert PruneOptions(text).config().budget == wanted and len(parsed) == 1


@pytest.mark.parametrize(
    ("budget", "name", "acts", "reported"),
    [(0.25, "evoprune", True, 0.25), (1.0, "evoprune", False, 1.0), (0.25, "none", False, 1.0),
     (1.0, "evoprune+fastv", True, 1.0), (1.0, "divprune+fastv:share=1", False, 1.0), (1.0, "fastv", False, 1.0),
     (0.25, "fastv", True, 0.25), ("fast", "divprune", True, "fast"), ("auto", "evoprune", True, "auto"),
     ("auto:inflection", "visionzip", True, "auto:inflection")],
)  # fmt: skip
def test_what_acts_and_what_reports_say(budget, name, acts, reported):
    config = PruneOptions(budget, name).config()
    assert (config.prunes, config.budget.recorded, config.name) == (acts, reported, name)
    assert config.budget == (Budget.FULL if name == "none" else Budget.parse(budget, auto=True))


@pytest.mark.parametrize(
    ("budget", "name"),
    [(0.5, "magic"), (0.5, "evoprune:speed=1"), ("auto", "random"), ("auto:inflection", "evoprune")],
)
def test_what_cannot_be_is_refused(budget, name):
    with pytest.raises(UsageError):
        PruneOptions(budget, name).config()


def test_a_method_is_looked_up_once_for_a_whole_answer(monkeypatch):
    asked, real = [], MethodText.members
    monkeypatch.setattr(MethodText, "members", lambda text: asked.append(text.text) or real(text))
    str(VideoQA.load("demo", method="divprune").encode("samples/square.mp4", frames=4).ask("What?", max_new_tokens=1))
    assert asked == ["divprune"]


# `-b auto:inflection`: the curve of a method's sorted scores determines the number of kept tokens.


RANKING = [name for name in AFTER if methods.get(name).scores is not None]


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
    assert inflection_point(torch.tensor(scores, dtype=torch.float32)) == inflection_line_by_line(
        [float(s) for s in scores]
    )


def test_the_methods_that_rank_tokens():
    assert {"visionzip", "vispruner", "mmr", "cdpruner", "evs-nofloor", "adjacent", "par", "nuwa"} <= set(RANKING)
    for name in RANKING:
        tokens = tokens_of("random", (5, 4, 5))
        assert methods.get(name).scores(tokens).shape == (100,)


@pytest.mark.parametrize("name", RANKING)
def test_the_count_is_the_contents_inside_the_bounds(name):
    for kind in ("random", "duplicates", "constant", "drift"):
        tokens, config = tokens_of(kind, (5, 4, 5)), PruneOptions("auto:inflection", name).config()
        method = config.method
        keep = min(50, max(5, inflection_point(method.selector.scores(tokens))))
        assert tokens_before_inflection(method.selector, tokens, 50) == keep
        assert method == methods.MethodChain.parse(name)
        stage = config.plan(TowerShape(8, (7,)), (5, 4, 5)).token_stage
        assert stage.reduce == methods.get(name) and stage.inflection


def test_it_works_behind_reuse():
    config = PruneOptions("auto:inflection", "reuse+visionzip").config()
    visual = tiny_tower()
    plan = config.plan(TowerShape.of_tower(visual), (5, 4, 5))
    made = encode_rows(visual, [clip((5, 4, 5), changes((5, 4, 5), 0.4))], plan).select_tokens()
    assert plan.reuse and 5 <= len(made.kept) < 50


@pytest.mark.parametrize("name", ["evoprune", "divprune", "pool", "reuse+divprune", "tome", "none", "downscale"])
def test_methods_without_scores_are_refused(name):
    with pytest.raises(UsageError, match="has no scores") as caught:
        PruneOptions("auto:inflection", name).config()
    assert "visionzip" in caught.value.hint
