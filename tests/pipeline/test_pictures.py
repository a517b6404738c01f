"""Pictures, and several inputs in one question: equal to Hugging Face at full budget, exact counts below."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from evoprune.language.positions import VideoSpan, prompt_positions
from evoprune.pipeline.loading.model import load_model
from evoprune.pipeline.video_qa import VideoQA
from evoprune.profiling.hugging_face import hugging_face_model
from evoprune.video.frames import read_frames
from evoprune.vision.preprocess import patchify, resize
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


def pixels_of(loaded, view):
    """What Hugging Face's processors make of an input: its patches, and its grid in patches."""
    if view.kind == "picture":
        limits = loaded.limits["picture"]
        processor = Qwen2VLImageProcessorPil(min_pixels=limits.min_pixels, max_pixels=limits.max_pixels)
        made = processor(images=Image.open(view.info.path), return_tensors="pt")
        return made["pixel_values"], made["image_grid_thw"]
    chunks = read_frames(view.info, view.plan.sampling.times_s)
    frames = torch.from_numpy(np.concatenate([chunk.frames for chunk in chunks]))
    t, h, w = view.plan.grid
    return patchify(resize(frames, view.plan.height, view.plan.width)), torch.tensor([[t, 2 * h, 2 * w]])


def hugging_face(loaded, inputs, question, tokens):
    """The tokens that transformers' `generate` makes of the same inputs, at positions by Qwen's rule."""
    model, specials = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    pads = {"video": specials["<|video_pad|>"], "picture": specials["<|image_pad|>"]}
    model.config.video_token_id, model.config.image_token_id = pads["video"], pads["picture"]
    content = [{"type": {"video": "video", "picture": "image"}[each.view.kind]} for each in inputs]
    messages = [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]
    ids, spans, given = loaded.tokenizer.backend.encode(loaded.tokenizer.render(messages)).ids, [], {}
    loaded.tokenizer.backend.encode_special_tokens = False
    ids = loaded.tokenizer.backend.encode(loaded.tokenizer.render(messages)).ids
    loaded.tokenizer.backend.encode_special_tokens = True
    for each in inputs:
        pixels, grid = pixels_of(loaded, each.view)
        t, h, w = grid[0].tolist()
        at = next(i for i, token in enumerate(ids) if token in pads.values() and (not spans or i >= end))  # noqa: F821
        assert ids[at] == pads[each.view.kind]
        ids[at : at + 1] = [ids[at]] * (t * h * w // 4)
        end = at + t * h * w // 4
        spans.append(VideoSpan(at, (t, h // 2, w // 2), each.view.plan.sampling.seconds_per_pair()))
        for name, value in (("", pixels), ("_grid_thw", grid)):
            key = {"video": ("pixel_values_videos", "video_grid_thw"), "picture": ("pixel_values", "image_grid_thw")}
            given.setdefault(key[each.view.kind][name != ""], []).append(value)
    rope = prompt_positions(len(ids), spans, getattr(model.config.vision_config, "tokens_per_second", None))
    made = model.generate(
        torch.tensor([ids]),
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        position_ids=torch.cat([torch.arange(len(ids))[None], rope])[:, None],
        **{name: torch.cat(values) for name, values in given.items()},
        max_new_tokens=tokens,
        do_sample=False,
        eos_token_id=list(loaded.eos_ids),
    )[0, len(ids) :].tolist()
    return [token for token in made if token not in loaded.eos_ids]


SIZES = [(1, 1), (3, 400), (27, 29), (101, 67), (140, 112), (997, 13)]


@pytest.mark.parametrize("model", ["tiny", "demo"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_picture_at_full_budget_is_hugging_faces_generate(loaded, model, size, tmp_path):
    loaded = load_model("demo", pack=False) if model == "demo" else loaded
    picture = VideoQA(loaded, budget=1.0).encode(save(tmp_path / "a.png", *size))
    ours = picture.ask(QUESTION, max_new_tokens=12)
    assert ours.text is not None
    assert ours.ids == hugging_face(loaded, [picture], QUESTION, 12)
