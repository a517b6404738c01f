"""A budget and a method, parsed once into what everything downstream carries."""

import pytest

from evoprune.errors import UsageError
from evoprune.methods import registry
from evoprune.methods.config import PruneConfig
from evoprune.methods.plans import AUTO_MOST, PRESETS, TowerShape, parse_budget_or_name
from evoprune.video_qa import VideoQA

CLIP, STILL = (5, 4, 5), (1, 4, 5)


@pytest.mark.parametrize(
    ("text", "clip", "still"), [("0.1", 10, 2), ("10%", 10, 2), ("fast", 10, 6), ("full", 100, 20), ("auto", 50, 10)]
)
def test_a_budget_keeps_a_share_of_a_clip_and_of_a_still(text, clip, still):
    config = PruneConfig.of(parse_budget_or_name(text), "evoprune")
    assert (config.keep(CLIP), config.keep(STILL)) == (clip, still)
    tower = TowerShape(8, (7,))
    assert [config.plan(tower, grid).keep for grid in (CLIP, STILL)] == [clip, still]
    assert config.share_of_all([CLIP, STILL]) == pytest.approx((clip + still) / 120)


@pytest.mark.parametrize(
    ("budget", "name", "acts", "reported"),
    [(0.25, "evoprune", True, 0.25), (1.0, "evoprune", False, 1.0), (0.25, "none", False, 1.0),
     (1.0, "evoprune+fastv", True, 1.0), (PRESETS["fast"], "divprune", True, "fast"), ("auto", "evoprune", True, "auto"),
     ("auto:inflection", "visionzip", True, "auto:inflection")],
)  # fmt: skip
def test_what_acts_and_what_reports_say(budget, name, acts, reported):
    config = PruneConfig.of(budget, name)
    assert (config.acts, config.budget, config.name) == (acts, reported, name)
    assert config.method.inflection == (budget == "auto:inflection") and config.share in (budget, AUTO_MOST)


@pytest.mark.parametrize(
    ("budget", "name", "args"),
    [
        (0.5, "magic", None),
        (0.5, "evoprune", {"speed": "1"}),
        ("auto", "random", None),
        ("auto:inflection", "evoprune", None),
    ],
)
def test_what_cannot_be_is_refused(budget, name, args):
    with pytest.raises(UsageError):
        PruneConfig.of(budget, name, args)


def test_a_method_is_looked_up_once_for_a_whole_answer(monkeypatch):
    asked, real = [], registry.parse
    monkeypatch.setattr(registry, "parse", lambda *args: asked.append(args[0]) or real(*args))
    str(VideoQA.load("demo", method="divprune").encode("samples/square.mp4", frames=4).ask("What?", max_new_tokens=1))
    assert asked == ["divprune"]
