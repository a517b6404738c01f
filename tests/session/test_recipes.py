"""Recipes of operations on disk, and what a method that follows one does in `VideoQA`."""

import json
import stat
from dataclasses import replace

import pytest

from evoprune import Cache, VideoQA, methods
from evoprune.bench.tuning.agreement import agreement, reference
from evoprune.errors import UsageError
from evoprune.methods.operation_plans import ALL, REST, Recipe
from evoprune.report.stats import stats_block
from evoprune.session.saved import recipes
from tests.recipes import keep_recipe, kept

A, B = "a" * 64, "b" * 64
CLIP, QUESTIONS = "samples/square.mp4", ("What colour is the square?", "How many shapes are there?")
DEMO = Recipe(
    4, 1, 0.25, (0.1, 0.2, 0.7),
    (
        ((2, REST, "mlp"), (2, REST, "queries"), (3, REST, "keys")),
        ((1, ALL, "mlp"),),
        ((2, REST, "keys"), (1, REST, "queries")),
        ((1, ALL, "keys"), (1, REST, "keys")),
        ((2, ALL, "mlp"), (2, ALL, "queries")),
        ((2, ALL, "keys"), (3, ALL, "keys"), (1, ALL, "queries")),
    ),
)  # fmt: skip
NAMES = ("operations", "evoprune+operations:share=0.3", "reuse+divprune+operations", "cdpruner+operations")


@pytest.fixture
def demo(config):
    keep_recipe("demo", DEMO)


def load(name, budget=0.5, **how):
    return VideoQA.load("demo", method=name, budget=budget, **how)


def test_saved_found_listed_and_removed(config):
    assert recipes.find(A) is None and recipes.every() == []
    assert recipes.save(A, kept()) == config / "operations" / f"{A}.json"
    assert recipes.find(A).made() == kept().made() and recipes.find(A).kl == [None, None]
    assert stat.S_IMODE((config / "operations").stat().st_mode) == 0o700
    later = replace(kept(DEMO), created_utc="2026-04-01T12:00:00+00:00")
    recipes.save(B, later)
    assert [(fingerprint, each.created_utc[:7]) for fingerprint, each in recipes.every()] == [
        (B, "2026-04"),
        (A, "2026-03"),
    ]
    assert recipes.find(B).made() == DEMO
    recipes.remove(A)
    assert recipes.find(A) is None


WRONG = [
    ("recipe", {}, "no recipe"),
    ("recipe", [], "not a dict"),
    ("recipe", {"depth": 2, "after": 3, "key": 0.25, "weights": [1, 1, 1], "steps": []}, "after must be"),
    ("recipe", {"depth": 2, "after": 1, "key": 0.25, "weights": [1, 1, 1], "steps": [[[0, "all", "mlp"]]]}, "no operation"),
    ("kl", [0.1], "for each step"),
    ("kl", None, "for each step"),
    ("agree", [0.1, "1"], "for each step"),
    ("agree", [0.1, -1], "for each step"),
    ("created_utc", "yesterday", "Invalid isoformat"),
    ("videos", 0, "above 0"),
    ("tokens", "9", "not a whole number"),
    ("schema", "evoprune/operations@2", "its schema is not"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_a_damaged_file_is_named_and_never_ignored(config, name, value, message):
    path = recipes.save(A, kept())
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UsageError, match=f"{A}.json is damaged: .*{message}") as caught:
        recipes.find(A)
    assert "--forget-tuned aaaaaaaaaaaa" in caught.value.hint and "--operations" in caught.value.hint
    ((_, problem),) = recipes.every()
    assert isinstance(problem, UsageError)


@pytest.mark.parametrize("name", NAMES[:2])
def test_another_model_is_refused_before_its_weights_are_read(config, saved, monkeypatch, name):
    keep_recipe(saved)  # the tiny model's, not the demo's
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="follows a recipe, and there is none for demo") as caught:
        load(name)
    assert "evoprune tune VIDEO... --operations -m demo" in caught.value.hint
    with pytest.raises(UsageError, match="are random"):
        VideoQA.load(str(saved), method=name, load_format="dummy")


def test_a_recipe_of_another_depth_is_refused(config):
    keep_recipe("demo")  # as if someone had copied a file of two layers
    with pytest.raises(UsageError, match="for 2 layers, and this model has 4"):
        load("operations").encode(CLIP, frames=4)


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_question_is_answered_the_same_whatever_was_asked_before(demo, name):
    qa, fresh = load(name), {}
    for question in QUESTIONS:
        answer = qa.encode(CLIP, frames=8).ask(question, max_new_tokens=8)
        fresh[question] = answer.text, answer.ids, answer.report.pruning.language_work
    video = qa.encode(CLIP, frames=8)
    for question in (*QUESTIONS, *reversed(QUESTIONS)):
        answer = video.ask(question, max_new_tokens=8)
        assert (answer.text, answer.ids, answer.report.pruning.language_work) == fresh[question]
    own = reference(video, QUESTIONS[0], fresh[QUESTIONS[0]][1], ended=True)
    assert bool(agreement(own, video).agrees.all())


@pytest.mark.full
def test_at_the_full_budget_nothing_changes(demo):
    """What remains is the way of a method that does nothing inside the language model."""
    for name, plain in (("operations", "none"), ("evoprune+operations:share=1", "evoprune")):
        made, expected = (
            load(method, budget=1.0).encode(CLIP, frames=8).ask(QUESTIONS[0], max_new_tokens=8)
            for method in (name, plain)
        )
        assert made.text == expected.text and made.ids == expected.ids
        assert made.report.pruning.language_work is None and made.report.pruning.language_layers is None


def test_the_report_says_what_was_computed(demo):
    answer = load("operations", 0.25).encode(CLIP, frames=8).ask(QUESTIONS[0])
    assert answer.text
    pruning = answer.report.pruning
    assert pruning.language_work == [[0, 96, 96, 96], [1, 96, 24, 0], [2, 24, 24, 24], [3, 24, 24, 24]]
    assert pruning.language_layers == [[0, 96], [1, 96], [2, 24], [3, 24]]
    assert pruning.args == {"share": None, "recipe": DEMO.digest} and pruning.kept_ratio == 1
    lines = "\n".join(stats_block(answer.report, verbose=True))
    assert "work       0:96/96/96 1:96/24/0 2:24/24/24 3:24/24/24" in lines and ", then 24 visual" in lines
    assert methods.get("operations").args["recipe"] is None


@pytest.mark.full
def test_pieces_of_the_encoder_do_not_matter(demo, monkeypatch):
    from evoprune.backend import devices

    answers = []
    for units in (24, 1000):
        monkeypatch.setattr(devices, "largest_chunk", lambda device, units=units: units)
        answers.append(load("evoprune+operations").encode(CLIP, frames=12).ask(QUESTIONS[0]))
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.full
def test_an_encoded_video_from_the_cache_serves_it(demo, tmp_path):
    cache = Cache(tmp_path / "cache")
    assert load("divprune").encode(CLIP, frames=8, cache=cache).report.cache == "miss"
    video = load("divprune+operations").encode(CLIP, frames=8, cache=cache)
    assert video.report.cache == "hit"
    assert video.ask(QUESTIONS[0]).text == load("divprune+operations").encode(CLIP, frames=8).ask(QUESTIONS[0]).text


@pytest.mark.full
def test_two_videos_in_one_prompt(demo):
    video = load("operations", 0.3).encode([CLIP, "samples/arrivals.webm"], frames=4)
    answer = video.ask(QUESTIONS[0])
    assert answer.text is not None
    count = answer.report.tokens.visual
    assert answer.report.pruning.language_work[0] == [0, count, count, count]
    assert answer.report.pruning.language_work[-1][1] == round(count / 4)
