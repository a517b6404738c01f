"""Test methods inside the language model through `VideoQA`: consecutive questions, teacher forcing, reports and the cache."""

import json

import numpy as np
import pytest
from PIL import Image

from evoprune import Cache, VideoQA, methods
from evoprune.bench import Reference
from evoprune.contrib.operations import ALL, REST, Recipe
from evoprune.errors import UsageError
from evoprune.methods import Budget
from evoprune.statistics import stats_block
from tests.recipes import TINY, document, write_recipe

CLIP = "samples/square.mp4"
QUESTIONS = ("What colour is the square?", "How many shapes are there?", "Does anything move?")
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
NAMES = (
    "fastv", "evoprune+pyramiddrop", "reuse+visionzip+visipruner", "cdpruner+holitom-inner", "divprune+sparsevlm", "operations",
    "evoprune+operations:share=0.3", "reuse+divprune+operations", "cdpruner+operations",
)  # fmt: skip


@pytest.fixture
def load(tmp_path):
    """Return a function that loads the demo model with a method. The `operations` method gets a recipe file."""
    operations = write_recipe(tmp_path, DEMO)
    return lambda name, budget=0.5: VideoQA.load("demo", method=name.replace("operations", operations), budget=budget)


def left_by(answer):
    """Return the columns that were left in each layer, and how much work the layer did."""
    return answer.report.pruning.language_layers, answer.report.pruning.language_work


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_question_is_answered_the_same_whatever_was_asked_before(load, name):
    qa, fresh = load(name), {}
    for question in QUESTIONS:
        answer = qa.encode(CLIP, frames=8).ask(question)
        fresh[question] = answer.text, answer.ids, left_by(answer)
    video = qa.encode(CLIP, frames=8)
    for question in (*QUESTIONS, *reversed(QUESTIONS)):
        answer = video.ask(question)
        assert (answer.text, answer.ids, left_by(answer)) == fresh[question]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_reading_along_its_own_answer_it_agrees_with_itself(load, name):
    video = load(name).encode(CLIP, frames=8)
    answer = video.ask(QUESTIONS[0], max_new_tokens=8)
    text = answer.text
    own = Reference.of(video, QUESTIONS[0], answer.ids, ended=True)
    assert text and bool(own.agreement(video).agrees.all()) and float(own.agreement(video).kl.max()) < 1e-5


def test_the_report_says_what_left_and_what_was_computed(load):
    answer = load("fastv").encode(CLIP, frames=8).ask(QUESTIONS[0])
    _, report = answer.text, answer.report
    assert report.pruning.language_layers == [[0, 96], [1, 48], [2, 48], [3, 48]]
    assert report.tokens.visual == report.pruning.visual_tokens_kept == 96 and report.pruning.kept_ratio == 1
    assert 0.01 < report.time_ms.prefill_prune < report.time_ms.prefill
    plain = load("divprune").encode(CLIP, frames=8).ask(QUESTIONS[0])
    assert plain.text and plain.report.pruning.language_layers is None and plain.report.time_ms.prefill_prune is None
    answer = load("operations", 0.25).encode(CLIP, frames=8).ask(QUESTIONS[0])
    _, pruning = answer.text, answer.report.pruning
    assert pruning.language_work == [[0, 96, 96, 96], [1, 96, 24, 0], [2, 24, 24, 24], [3, 24, 24, 24]]
    assert pruning.language_layers == [[0, 96], [1, 96], [2, 24], [3, 24]]
    assert pruning.args == {"share": None, "recipe": DEMO.digest} and pruning.kept_ratio == 1
    lines = "\n".join(stats_block(answer.report, verbose=True))
    assert "work       0:96/96/96 1:96/24/0 2:24/24/24 3:24/24/24" in lines and ", then 24 visual" in lines


def test_encoded_videos_in_the_cache_serve_every_method_behind_them(load, tmp_path):
    cache = Cache(tmp_path / "cache")
    first = load("divprune").encode(CLIP, frames=8, cache=cache)
    combined = load("divprune+fastv").encode(CLIP, frames=8, cache=cache)
    assert (first.report.cache, combined.report.cache) == ("miss", "hit")
    assert combined.ask(QUESTIONS[0]).text == load("divprune+fastv").encode(CLIP, frames=8).ask(QUESTIONS[0]).text
    alone = [load(name).encode(CLIP, frames=8, cache=cache).report.cache for name in ("fastv", "pyramiddrop")]
    assert alone == ["miss", "hit"]


def test_the_content_may_decide_what_reaches_it():
    video = VideoQA.load("demo", method="evoprune+fastv", budget="auto").encode(CLIP, frames=8)
    answer = video.ask(QUESTIONS[0])
    read = [tokens for _, tokens in (answer.text and answer.report.pruning.language_layers)]
    assert read[0] == len(video.encoded.kept) and read[1:] == [int(read[0] * 0.5 + 0.5)] * 3


def test_a_preset_keeps_its_larger_share_of_a_picture(load, tmp_path):
    """This also applies inside the language model, although no input's plan contains the number of tokens there."""
    preset, picture = Budget.PRESETS["fast"], tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 280, 3), dtype=np.uint8)).save(picture)
    for path, most in ((picture, preset.still), (CLIP, preset.video)):
        answer = load("fastv", "fast").encode(path).ask(QUESTIONS[0])
        assert answer.text
        report = answer.report.pruning
        shares = [read / report.visual_tokens_in for _, read in report.language_layers]
        assert shares[0] == 1 and shares[-1] == pytest.approx(most, abs=0.02)


@pytest.mark.full
@pytest.mark.parametrize(("name", "plain"), [("operations", "none"), ("evoprune+operations:share=1", "evoprune")])
def test_at_the_full_budget_nothing_changes(load, name, plain):
    """The answer is the same as without a method inside the language model."""
    made, expected = (load(each, 1.0).encode(CLIP, frames=8).ask(QUESTIONS[0]) for each in (name, plain))
    assert made.text == expected.text and made.ids == expected.ids
    assert made.report.pruning.language_work is None and made.report.pruning.language_layers is None


WRONG = [
    ({"recipe": None}, "NoneType"),
    ({"recipe": {"depth": 2, "after": 3, "key": 0.25, "weights": [1, 1, 1]}}, "after must be"),
    ({"recipe": {"depth": 2}}, "weights"),
    ({"steps": [{"operations": [[0, "all", "mlp"]]}]}, "unknown operation"),
    ({"steps": [1]}, "not subscriptable"),
    ({"complete": False}, "not a complete"),
    ({"schema": "evoprune/tune@1"}, "not a complete"),
]


@pytest.mark.parametrize(("changed", "message"), WRONG)
def test_a_damaged_file_is_refused_and_named(tmp_path, changed, message):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(document() | changed))
    with pytest.raises(UsageError, match=f"recipe.json is not a recipe of operations: .*{message}") as caught:
        methods.MethodChain.parse(f"operations:recipe={path}")
    assert "evoprune tune VIDEO... --operations -o" in caught.value.hint
    for content in ("", "[]", "{"):
        path.write_text(content)
        with pytest.raises(UsageError, match="is not a recipe"):
            methods.MethodChain.parse(f"evoprune+operations:recipe={path}")


def test_a_file_is_read_as_it_was_written(tmp_path):
    assert methods.get("operations").args["recipe"] is None
    for recipe in (TINY, DEMO):
        assert methods.MethodChain.parse(write_recipe(tmp_path, recipe)).language.recipe == recipe
    with pytest.raises(UsageError, match=r"no such file: .*gone.json"):
        methods.MethodChain.parse(f"operations:recipe={tmp_path}/gone.json")


@pytest.mark.parametrize("name", ["operations", "evoprune+operations:share=0.3"])
def test_a_model_without_one_is_refused_before_its_weights_are_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(UsageError, match="method operations needs a recipe") as caught:
        VideoQA.load("demo", method=name)
    assert "evoprune tune VIDEO... --operations" in caught.value.hint
    with pytest.raises(UsageError, match="for 2 layers, but this model has 4"):  # the tiny model's recipe
        VideoQA.load("demo", method=name.replace("operations", write_recipe(tmp_path)))
