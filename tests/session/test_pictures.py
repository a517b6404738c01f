"""Questions about images, or about multiple inputs, agree with transformers at full budget and have exact counts below it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from evoprune.errors import UsageError
from evoprune.session.cache import Cache
from evoprune.session.loading.model import load_model
from evoprune.session.memory import TEXT
from evoprune.session.session import Session
from evoprune.video_qa import VideoQA
from tests.loading import described
from tests.threads import one_thread  # noqa: F401

CLIP, OTHER = "samples/square.mp4", "samples/arrivals.webm"
QUESTION = "Which one is larger?"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


def save(path, width, height, seed=0):
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


@pytest.mark.parametrize(
    ("method", "whole"), [("subsample", True), ("evs", True), ("downscale", False), ("none", False)]
)
def test_a_picture_that_a_method_cannot_prune_stays_whole_and_says_so(loaded, method, whole, tmp_path):
    picture = VideoQA(loaded, budget=0.25, method=method).encode(save(tmp_path / "a.png", 300, 200))
    assert ("whole_picture" in picture.report.warnings) == whole
    assert (len(picture.encoded.kept) == picture.plan.units) == (whole or method == "none")


def test_a_picture_has_the_limits_of_pictures(loaded, tmp_path):
    """This includes its normalization. Videos have other limits."""
    picture, limits = save(tmp_path / "a.png", 300, 200), loaded.limits
    other = described(loaded, limits=limits | {"video": replace(limits["video"], image_std=(5.0, 5.0, 5.0))})
    alike = [VideoQA(model, budget=1.0).encode(picture).encoded.features for model in (loaded, other)]
    assert torch.equal(*alike)


def test_several_inputs_take_the_time_of_all_and_are_told_one_by_one(loaded, tmp_path):
    picture, done = save(tmp_path / "a.png", 300, 200), []
    qa = VideoQA(loaded, budget=1.0)
    both = qa.encode([picture, CLIP], progress=lambda *now: done.append(now))
    apart = [qa.encode(path) for path in (picture, CLIP)]
    answer = qa.ask(apart, QUESTION, max_new_tokens=1)
    assert answer.text is not None
    assert answer.report.time_ms.ttft_wall > sum(encoded.report.time_ms.total for encoded in apart)
    assert [told for told in done if told[0] == "input"] == [("input", 1, 2), ("input", 2, 2)]
    assert "an image of 7x11 units, 77 of 77 visual tokens kept, 'samples/square.mp4': 12 frames" in repr(both)


def test_each_input_is_cached_by_itself(tmp_path):
    qa, cache = VideoQA.load("demo"), Cache(tmp_path / "cache")
    picture = save(tmp_path / "a.png", 300, 200)
    states = [
        [each.cache for each in qa.encode(paths, cache=cache).report.inputs]
        for paths in ([picture], [CLIP, picture], [picture, CLIP])
    ]
    assert states == [["miss"], ["miss", "hit"], ["hit", "hit"]]
    again = qa.encode([picture, CLIP], cache=cache).ask(QUESTION, max_new_tokens=6)
    assert again.text == qa.encode([picture, CLIP]).ask(QUESTION, max_new_tokens=6).text and again.report.cache == "hit"


def test_all_inputs_must_fit_into_the_context_before_any_frame_is_read(loaded, monkeypatch):
    text = replace(loaded.model.config.text_config, max_position_embeddings=300)
    monkeypatch.setattr(loaded.model, "config", replace(loaded.model.config, text_config=text))
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded"))
    qa = VideoQA(loaded, budget=1.0)
    with pytest.raises(UsageError, match=r"288 visual tokens and .* do not fit into the 300 tokens"):
        qa.ask([CLIP, CLIP], QUESTION)


@pytest.mark.parametrize("budget", [0.5, 0.05])
def test_the_memory_of_all_inputs_is_checked_before_any_frame_is_read(loaded, monkeypatch, budget):
    qa, asked = VideoQA(loaded, budget=budget), []
    held = qa.encode(OTHER)
    tokens = [len(held.encoded.kept), len(qa.encode(CLIP).encoded.kept)]
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded"))
    noting = lambda _, __, around: asked.append(around) or [1024]  # noqa: E731
    monkeypatch.setattr(Session, "fitting_pieces", noting)
    for ask, others in (
        (lambda: qa.encode([CLIP, OTHER]), tokens),
        (lambda: qa.ask([CLIP, OTHER], "Why?"), tokens),
        (lambda: qa.ask([CLIP, held], "Why?"), tokens[:1]),
    ):
        asked.clear()
        with pytest.raises(pytest.fail.Exception):
            ask()
        assert [around for around in asked if around != TEXT] == [TEXT + other for other in others]
    asked.clear()
    assert qa.ask([held, held], "Why? " * 100, max_new_tokens=1).text is not None and not asked


def test_times_are_those_of_the_videos_among_the_inputs(loaded, tmp_path):
    qa, picture = VideoQA(loaded), save(tmp_path / "a.png", 60, 60)
    first, second = qa.encode([CLIP, picture], start_s=1.0, end_s=3.0).report.inputs
    assert (first.sampling.start_s, first.sampling.end_s) == (1.0, 3.0)
    assert (second.sampling.start_s, second.sampling.timestamps_s, second.sampling.frames) == (None, None, 1)
    for inputs in (picture, [picture, picture]):
        with pytest.raises(UsageError, match="is an image, which has no start"):
            qa.encode(inputs, start_s=1.0)


def test_a_limit_on_tokens_makes_a_picture_smaller_and_inputs_of_others_are_refused(loaded, tmp_path):
    report = VideoQA(loaded, budget=1.0).encode(save(tmp_path / "a.png", 560, 560), max_visual_tokens=100).report
    assert report.pruning.visual_tokens_in == 100 and report.sampling.resized_hw == [280, 280]
    with pytest.raises(UsageError, match="by another VideoQA"):
        VideoQA(loaded, budget=0.25).ask([VideoQA(loaded, budget=0.5).encode(CLIP)] * 2, QUESTION)
