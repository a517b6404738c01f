"""Methods inside the language model through `VideoQA`: questions one after the other, teacher forcing, reports, the cache."""

import numpy as np
import pytest
from PIL import Image

from evoprune import Cache, VideoQA
from evoprune.bench.tuning.agreement import agreement, reference
from evoprune.methods.plans import PRESETS
from evoprune.report.stats import stats_block

CLIP, QUESTIONS = (
    "samples/square.mp4",
    ("What colour is the square?", "How many shapes are there?", "Does anything move?"),
)
NAMES = ("fastv", "evoprune+pyramiddrop", "reuse+visionzip+visipruner", "cdpruner+holitom-inner", "divprune+sparsevlm")


def load(name, budget=0.5, **how):
    return VideoQA.load("demo", method=name, budget=budget, **how)


@pytest.mark.few(1)
@pytest.mark.parametrize("name", NAMES)
def test_a_question_is_answered_the_same_whatever_was_asked_before(name):
    qa = load(name)
    fresh = {}
    for question in QUESTIONS:
        answer = qa.encode(CLIP, frames=8).ask(question)
        fresh[question] = answer.text, answer.ids, answer.report.pruning.language_layers
    video = qa.encode(CLIP, frames=8)
    for question in (*QUESTIONS, *reversed(QUESTIONS)):
        answer = video.ask(question)
        assert (answer.text, answer.ids, answer.report.pruning.language_layers) == fresh[question]


@pytest.mark.few(2)
@pytest.mark.parametrize("name", NAMES)
def test_reading_along_its_own_answer_it_agrees_with_itself(name):
    video = load(name).encode(CLIP, frames=8)
    answer = video.ask(QUESTIONS[0], max_new_tokens=8)
    text = answer.text
    own = reference(video, QUESTIONS[0], answer.ids, ended=True)
    assert text and bool(agreement(own, video).agrees.all()) and float(agreement(own, video).kl.max()) < 1e-5


def test_the_report_says_what_left():
    answer = load("fastv").encode(CLIP, frames=8).ask(QUESTIONS[0])
    _, report = answer.text, answer.report
    assert report.pruning.language_layers == [[0, 96], [1, 48], [2, 48], [3, 48]]
    assert report.tokens.visual == report.pruning.visual_tokens_kept == 96 and report.pruning.kept_ratio == 1
    assert 0 < report.time_ms.prefill_prune < report.time_ms.prefill
    lines = "\n".join(stats_block(report, verbose=True))
    told = " ".join(lines.split())
    assert "-b 0.5: 100.0% enter the language model; 50.0% left after 1 of its 4 layers" in told
    assert "96 visual + " in lines and ", then 48 visual" in lines
    assert "read       0:96 1:48 2:48 3:48" in lines
    plain = load("divprune").encode(CLIP, frames=8).ask(QUESTIONS[0])
    assert plain.text and plain.report.pruning.language_layers is None and plain.report.time_ms.prefill_prune is None


def test_encoded_videos_in_the_cache_serve_every_method_behind_them(tmp_path):
    cache = Cache(tmp_path)
    first = load("divprune").encode(CLIP, frames=8, cache=cache)
    combined = load("divprune+fastv").encode(CLIP, frames=8, cache=cache)
    assert (first.report.cache, combined.report.cache) == ("miss", "hit")
    assert combined.ask(QUESTIONS[0]).text == load("divprune+fastv").encode(CLIP, frames=8).ask(QUESTIONS[0]).text
    alone = load("fastv").encode(CLIP, frames=8, cache=cache)
    assert alone.report.cache == load("pyramiddrop").encode(CLIP, frames=8, cache=cache).report.cache.replace(
        "hit", "miss"
    )


def test_the_content_may_decide_what_reaches_it():
    video = VideoQA.load("demo", method="evoprune+fastv", budget="auto").encode(CLIP, frames=8)
    answer = video.ask(QUESTIONS[0])
    read = [tokens for _, tokens in (answer.text and answer.report.pruning.language_layers)]
    assert read[0] == len(video.encoded.kept) and read[1:] == [int(read[0] * 0.5 + 0.5)] * 3


def test_a_preset_keeps_its_larger_share_of_a_picture(tmp_path):
    """Inside the language model too, where no plan of an input says how many tokens that is."""
    preset, picture = PRESETS["fast"], tmp_path / "noise.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (224, 280, 3), dtype=np.uint8)).save(picture)
    for path, most in ((picture, preset.still), (CLIP, float(preset))):
        answer = load("fastv", preset).encode(path).ask(QUESTIONS[0])
        assert answer.text
        report = answer.report.pruning
        shares = [read / report.visual_tokens_in for _, read in report.language_layers]
        assert shares[0] == 1 and shares[-1] == pytest.approx(most, abs=0.02)
