"""Pictures, and several inputs in one question: equal to Hugging Face at full budget, exact counts below."""

from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evoprune import methods
from evoprune.bench.hugging_face import hugging_face_model
from evoprune.errors import UsageError, VideoError
from evoprune.language.prompt import VisualSpan, prompt_positions
from evoprune.methods.plans import keep_count
from evoprune.session.cache import Cache
from evoprune.session.encoding import open_inputs
from evoprune.session.loading.model import load_model
from evoprune.session.planning import TEXT
from evoprune.video.frames import read_frames
from evoprune.video_qa import VideoQA
from evoprune.vision.encoder import encode_rows
from evoprune.vision.preprocess import normalised, patchify, resize
from tests.methods.kinds import INNER, one_of_each
from tests.threads import one_thread  # noqa: F401

CLIP, OTHER = "samples/square.mp4", "samples/arrivals.webm"
QUESTION = "Which one is larger?"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


def save(path, width, height, seed=0):
    """A picture of smooth noise."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    small.resize((width, height), Image.Resampling.BICUBIC).save(path)
    return str(path)


def pixels_of(loaded, plan):
    """What Hugging Face's processors make of an input: its patches, and its grid in patches."""
    if plan.kind == "picture":
        limits = loaded.limits["picture"]
        processor = Qwen2VLImageProcessorPil(min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
        made = processor(images=Image.open(plan.info.path), return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]
    chunks = read_frames(plan.info, plan.sampling.times_s)
    frames = torch.from_numpy(np.concatenate([chunk.frames for chunk in chunks]))
    t, h, w = plan.grid
    return patchify(resize(frames, plan.height, plan.width)), torch.tensor([[t, 2 * h, 2 * w]])


def hugging_face(loaded, inputs, question, tokens):
    """The tokens that transformers' `generate` makes of the same inputs, at positions by Qwen's rule; and their logits."""
    model, specials = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    pads = {"video": specials["<|video_pad|>"], "picture": specials["<|image_pad|>"]}
    model.config.video_token_id, model.config.image_token_id = pads["video"], pads["picture"]
    content = [{"type": {"video": "video", "picture": "image"}[each.plan.kind]} for each in inputs]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    spans, given, end = [], {}, 0
    loaded.tokenizer.backend.encode_special_tokens = False
    ids = loaded.tokenizer.backend.encode(loaded.tokenizer.render(messages)).ids
    loaded.tokenizer.backend.encode_special_tokens = True
    for each in inputs:
        pixels, grid = pixels_of(loaded, each.plan)
        t, h, w = grid[0].tolist()
        at = next(i for i, token in enumerate(ids) if token in pads.values() and i >= end)
        assert ids[at] == pads[each.plan.kind]
        ids[at : at + 1] = [ids[at]] * (t * h * w // 4)
        end = at + t * h * w // 4
        spans.append(VisualSpan(at, (t, h // 2, w // 2), each.plan.sampling.seconds_per_pair()))
        for name, value in (("", pixels), ("_grid_thw", grid)):
            key = {"video": ("pixel_values_videos", "video_grid_thw"), "picture": ("pixel_values", "image_grid_thw")}
            given.setdefault(key[each.plan.kind][name != ""], []).append(value)
    rope = prompt_positions(len(ids), spans, getattr(model.config.vision_config, "tokens_per_second", None))
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(len(ids))[None], rope])[:, None],
        **{name: torch.cat(values) for name, values in given.items()},
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(loaded.eos_ids),
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = made.sequences[0, len(ids) :].tolist()
    return [token for token in tokens if token not in loaded.eos_ids], torch.cat(made.logits)


SIZES = [(1, 1), (3, 400), (27, 29), (101, 67), (140, 112), (997, 13)]


@pytest.mark.few(3)
@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_at_full_budget_is_hugging_faces_generate(loaded, model, size, tmp_path):
    loaded = load_model("demo", pack=False) if model == "demo" else loaded
    picture = VideoQA(loaded, budget=1.0).encode(save(tmp_path / "a.png", *size))
    ours = picture.ask(QUESTION, max_new_tokens=12)
    assert ours.text is not None
    ids, logits = hugging_face(loaded, [picture], QUESTION, 12)
    assert ours.ids == ids
    if ids:
        along, _ = picture.read_along(QUESTION, ids)
        torch.testing.assert_close(along, logits[: len(ids)].float(), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("size", [*SIZES, (700, 500)], ids=str)
def test_patches_are_those_of_the_image_processor(loaded, size, tmp_path, monkeypatch):
    found = []

    def kept(visual, patches, *plan, **how):
        found.extend(patches)
        return encode_rows(visual, found, *plan, **how)

    monkeypatch.setattr("evoprune.session.encoding.encode_rows", kept)
    path = save(tmp_path / "a.png", *size)
    with closing(open_inputs(VideoQA(loaded, budget=1.0).engine, [path])) as opened:
        theirs, grid = pixels_of(loaded, opened.plans[0])
        opened.encode()
    torch.testing.assert_close(normalised(torch.cat(found)), theirs, atol=1e-5, rtol=0)
    assert grid[0].tolist() == [1, *(2 * side for side in opened.plans[0].grid[1:])]


@pytest.mark.parametrize("size", [(3, 4000), (4000, 3)], ids=str)
def test_a_shape_that_hugging_face_refuses_is_refused(loaded, size, tmp_path):
    with pytest.raises(VideoError, match="within a ratio of 200"):
        VideoQA(loaded).encode(save(tmp_path / "a.png", *size))


@pytest.mark.few(1)
@pytest.mark.parametrize("kinds", ["pp", "vp", "pvv", "vv"])
def test_several_inputs_at_full_budget_are_hugging_faces_generate(loaded, kinds, tmp_path):
    paths = [
        save(tmp_path / f"{i}.png", 60 + 50 * i, 90, i) if kind == "p" else (CLIP, OTHER)[i % 2]
        for i, kind in enumerate(kinds)
    ]
    qa = VideoQA(loaded, budget=1.0)
    encoded = [qa.encode(path) for path in paths]
    expected, _ = hugging_face(loaded, encoded, QUESTION, 12)
    for answer in (qa.encode(paths).ask(QUESTION, max_new_tokens=12), qa.ask(encoded, QUESTION, max_new_tokens=12)):
        assert answer.text is not None and answer.ids == expected
        assert [each.kind for each in answer.report.inputs] == [{"p": "picture", "v": "video"}[kind] for kind in kinds]


EXACT = [name for name in methods.built_in() if methods.parse(name).exact]


@pytest.mark.few(3)
@pytest.mark.parametrize("method", one_of_each(EXACT))
def test_exactly_k_tokens_are_kept_of_each_input(loaded, method, tmp_path):
    qa = VideoQA(loaded, budget=0.25, method=method)
    inputs = qa.encode([save(tmp_path / "a.png", 300, 200), CLIP, save(tmp_path / "b.png", 97, 130)])
    report = inputs.ask(QUESTION, max_new_tokens=2)
    assert report.text is not None
    report = report.report
    share = 1.0 if method == "none" or method in INNER else 0.25
    units = [each.pruning.visual_tokens_in for each in report.inputs]
    kept = [keep_count(share, count) for count in units]
    assert [each.pruning.visual_tokens_kept for each in report.inputs] == kept
    assert report.pruning.visual_tokens_in == sum(units) and report.pruning.visual_tokens_kept == sum(kept)
    assert report.tokens.visual == sum(kept) == sum(report.pruning.kept_per_pair)
    if method in INNER:  # which drop among the tokens of all inputs together
        assert report.pruning.language_layers == [[0, sum(units)], [1, keep_count(0.25, sum(units))]]


@pytest.mark.parametrize(
    ("method", "whole"), [("subsample", True), ("evs", True), ("downscale", False), ("none", False)]
)
def test_a_picture_that_a_method_cannot_prune_stays_whole_and_says_so(loaded, method, whole, tmp_path):
    picture = VideoQA(loaded, budget=0.25, method=method).encode(save(tmp_path / "a.png", 300, 200))
    assert ("whole_picture" in picture.report.warnings) == whole
    assert (len(picture.encoded.kept) == picture.plan.units) == (whole or method == "none")


@pytest.mark.full
@pytest.mark.parametrize("method", ["evoprune", "cdpruner"])
def test_an_answer_about_several_does_not_depend_on_what_was_asked_before(loaded, method, tmp_path):
    qa = VideoQA(loaded, budget=0.25, method=method)
    paths = [CLIP, save(tmp_path / "a.png", 300, 200)]
    questions = ["What happens?", "Is the red square in the picture?", "What happens?"]
    fresh = [qa.encode(paths).ask(question, max_new_tokens=12).text for question in questions]
    inputs = qa.encode(paths)
    assert [inputs.ask(question, max_new_tokens=12).text for question in questions] == fresh
    parts = [qa.encode(path) for path in paths]
    assert qa.ask(parts, questions[1], max_new_tokens=12).text == fresh[1]
    assert parts[0].ask(questions[0], max_new_tokens=12).text == qa.ask(CLIP, questions[0], max_new_tokens=12).text


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


def test_the_memory_of_all_inputs_is_checked_before_any_frame_is_read(loaded, monkeypatch):
    qa, asked = VideoQA(loaded, budget=0.5), []
    tokens = [len(qa.encode(path).encoded.kept) for path in (OTHER, CLIP)]
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded"))
    monkeypatch.setattr(
        "evoprune.session.encoding.fitting_chunks", lambda _, __, around: asked.append(around) or [1024]
    )
    with pytest.raises(pytest.fail.Exception):
        qa.encode([CLIP, OTHER])
    assert asked == [TEXT + others for others in tokens]


@pytest.mark.parametrize("budget", [0.5, 0.05])
def test_asking_checks_the_memory_of_all_that_is_to_be_encoded(loaded, monkeypatch, budget):
    qa, asked = VideoQA(loaded, budget=budget), []
    held = qa.encode(OTHER)
    tokens = [len(held.encoded.kept), len(qa.encode(CLIP).encoded.kept)]
    monkeypatch.setattr("evoprune.session.encoding.encode_rows", lambda *_, **__: pytest.fail("encoded"))
    monkeypatch.setattr("evoprune.session.prompting.fitting_chunks", lambda _, __, around: asked.append(around))
    for inputs, others in (([CLIP, OTHER], tokens), ([CLIP, held], tokens[:1])):
        asked.clear()
        with pytest.raises(pytest.fail.Exception):
            qa.ask(inputs, "Why?")
        assert asked == [TEXT + other for other in others]
    asked.clear()
    assert qa.ask([held, held], "Why? " * 100, max_new_tokens=1).text is not None and not asked


def test_times_are_those_of_the_videos_among_the_inputs(loaded, tmp_path):
    qa, picture = VideoQA(loaded), save(tmp_path / "a.png", 60, 60)
    first, second = qa.encode([CLIP, picture], start_s=1.0, end_s=3.0).report.inputs
    assert (first.sampling.start_s, first.sampling.end_s) == (1.0, 3.0)
    assert (second.sampling.start_s, second.sampling.timestamps_s, second.sampling.frames) == (None, None, 1)
    for inputs in (picture, [picture, picture]):
        with pytest.raises(UsageError, match="is a picture, which has no start"):
            qa.encode(inputs, start_s=1.0)


def test_an_input_of_another_model_is_refused(loaded):
    video = VideoQA(loaded, budget=0.5).encode(CLIP)
    with pytest.raises(UsageError, match="by another VideoQA"):
        VideoQA(loaded, budget=0.25).ask([video, video], QUESTION)


def test_a_limit_on_tokens_makes_a_picture_smaller(loaded, tmp_path):
    report = VideoQA(loaded, budget=1.0).encode(save(tmp_path / "a.png", 560, 560), max_visual_tokens=100).report
    assert report.pruning.visual_tokens_in == 100 and report.sampling.resized_hw == [280, 280]
