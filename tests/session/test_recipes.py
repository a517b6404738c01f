"""Recipes of operations in files, and what a method that follows one does in `VideoQA`."""

import json

import pytest

from evoprune import Cache, VideoQA, methods
from evoprune.bench.agreement import agreement, reference
from evoprune.contrib.operations import ALL, REST, Recipe
from evoprune.errors import UsageError
from evoprune.report import stats_block
from tests.recipes import TINY, document, write_recipe

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
def load(tmp_path):
    """A demo model with a method, of whose name the recipe becomes a part."""
    operations = write_recipe(tmp_path, DEMO)
    return lambda name, budget=0.5: VideoQA.load("demo", method=name.replace("operations", operations), budget=budget)


WRONG = [
    ({"recipe": None}, "NoneType"),
    ({"recipe": {"depth": 2, "after": 3, "key": 0.25, "weights": [1, 1, 1]}}, "after must be"),
    ({"recipe": {"depth": 2}}, "weights"),
    ({"steps": [{"operations": [[0, "all", "mlp"]]}]}, "no operation"),
    ({"steps": [1]}, "not subscriptable"),
    ({"complete": False}, "no complete result"),
    ({"schema": "evoprune/tune@1"}, "no complete result"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_damaged_file_is_refused_and_named(tmp_path, changed, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(document() | changed))
    with pytest.raises(UsageError, match=f"recipe.json holds no recipe of operations: .*{message}") as caught:
        methods.parse(f"operations:recipe={path}")
    assert "evoprune tune VIDEO... --operations -o" in caught.value.hint
    for content in ("", "[]", "{"):
        path.write_text(content)
        with pytest.raises(UsageError, match="holds no recipe"):
            methods.parse(f"evoprune+operations:recipe={path}")


def test_a_file_is_read_as_it_was_written(tmp_path):
    for recipe in (TINY, DEMO):
        assert methods.parse(write_recipe(tmp_path, recipe)).language.recipe == recipe
    with pytest.raises(UsageError, match=r"cannot read the recipe .*gone.json: No such file"):
        methods.parse(f"operations:recipe={tmp_path}/gone.json")


@pytest.mark.parametrize("name", NAMES[:2])
def test_a_model_without_one_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="method operations has no recipe") as caught:
        VideoQA.load("demo", method=name)
    assert "evoprune tune VIDEO... --operations" in caught.value.hint
    with pytest.raises(UsageError, match="for 2 layers, and this model has 4"):  # the tiny model's
        VideoQA.load("demo", method=name.replace("operations", write_recipe(tmp_path)))


@pytest.mark.full
@pytest.mark.parametrize("name", NAMES)
def test_a_question_is_answered_the_same_whatever_was_asked_before(load, name):
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
def test_at_the_full_budget_nothing_changes(load):
    """What remains is the way of a method that does nothing inside the language model."""
    for name, plain in (("operations", "none"), ("evoprune+operations:share=1", "evoprune")):
        made, expected = (
            load(method, budget=1.0).encode(CLIP, frames=8).ask(QUESTIONS[0], max_new_tokens=8)
            for method in (name, plain)
        )
        assert made.text == expected.text and made.ids == expected.ids
        assert made.report.pruning.language_work is None and made.report.pruning.language_layers is None


def test_the_report_says_what_was_computed(load):
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
def test_pieces_of_the_encoder_do_not_matter(load, monkeypatch):
    from evoprune.backend import devices

    answers = []
    for units in (24, 1000):
        monkeypatch.setattr(devices, "largest_chunk", lambda device, units=units: units)
        answers.append(load("evoprune+operations").encode(CLIP, frames=12).ask(QUESTIONS[0]))
    assert len({answer.text for answer in answers}) == 1


@pytest.mark.full
def test_an_encoded_video_from_the_cache_serves_it(load, tmp_path):
    cache = Cache(tmp_path / "cache")
    assert load("divprune").encode(CLIP, frames=8, cache=cache).report.cache == "miss"
    video = load("divprune+operations").encode(CLIP, frames=8, cache=cache)
    assert video.report.cache == "hit"
    assert video.ask(QUESTIONS[0]).text == load("divprune+operations").encode(CLIP, frames=8).ask(QUESTIONS[0]).text


@pytest.mark.full
def test_two_videos_in_one_prompt(load):
    video = load("operations", 0.3).encode([CLIP, "samples/arrivals.webm"], frames=4)
    answer = video.ask(QUESTIONS[0])
    assert answer.text is not None
    count = answer.report.tokens.visual
    assert answer.report.pruning.language_work[0] == [0, count, count, count]
    assert answer.report.pruning.language_work[-1][1] == round(count / 4)
