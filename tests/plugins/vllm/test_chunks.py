"""Prompts that vLLM reads in chunks, some of which end inside a video; other methods; several videos and images."""

import pytest
import torch
from PIL import Image

from evoprune import EvoPrune
from tests.plugins.vllm.serving import DEMO, NEW, Asked, Clip, answers, farthest, pruning, same, samples
from tests.tiny import save_tiny

pytestmark = pytest.mark.vllm


def whole_model_answers(asked: list[Asked], budget: float) -> list[str]:
    """Return the answers of the transformers model, pruned by evoprune, with Qwen's positions."""
    from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration

    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMO, dtype=torch.float32).eval()
    processor, said = AutoProcessor.from_pretrained(DEMO), []
    for each in asked:
        clips = [media for media in each.media if isinstance(media, Clip)]
        pictures = [media for media in each.media if not isinstance(media, Clip)]
        inputs = processor(
            text=[each.request()["prompt"]],
            images=pictures or None,
            videos=[torch.from_numpy(clip.frames).permute(0, 3, 1, 2) for clip in clips] or None,
            do_sample_frames=False,
            return_tensors="pt",
        )
        inputs["second_per_grid_ts"] = [clip.seconds for clip in clips]
        with EvoPrune(budget=budget, positions="qwen")(model):
            out = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        said.append(processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0])
    return said


@pytest.fixture(scope="module")
def mixed():
    """Return questions about two videos with different frame rates, and about images with a video."""
    clips = {name: samples(fps, (name,), budget=1.0)[0].media[0] for name, fps in (("square.mp4", 2), ("pan.mp4", 3))}
    first, second = clips.values()
    pictures = [Image.fromarray(clip.frames[0]) for clip in clips.values()]
    media = [
        (first, second),
        (second, first),
        (pictures[1], first),
        (first, *pictures),
        (pictures[0], second, pictures[1]),
    ]
    asked = [Asked(each, question) for each in media for question in ("Describe it.", "How many shapes are there?")]
    right = whole_model_answers(asked, 0.25)
    return [Asked(each.media, each.question, answer) for each, answer in zip(asked, right, strict=True)]


@pytest.mark.parametrize("chunk", [None, 48])
def test_several_videos_and_pictures(start, mixed, chunk):
    more = {} if chunk is None else {"max_num_batched_tokens": chunk}
    llm = start(**pruning(0.75), **more)
    assert same(answers(llm, [asked.request() for asked in mixed]), mixed)
    assert same(answers(llm, [asked.request() for asked in mixed], together=False), mixed)


def test_chunks(start):
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), max_num_batched_tokens=48)
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3


OWN = ("evoprune:count=0", "evoprune:count=1", "evoprune:reuse=0", "evoprune:rows=1")


@pytest.mark.parametrize("method", ["divprune", "reuse+visionzip", "tome", *OWN])
def test_methods(start, method):
    asked = samples(budget=0.25, method=method)
    llm = start(**pruning(0.75, method))
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3


def test_prompts_that_do_not_fit_together_are_interrupted_and_resumed(start):
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), num_gpu_blocks_override=16, max_model_len=480)
    assert same(answers(llm, [each.request() for each in asked]), asked)


@pytest.mark.parametrize(("family", "name"), [("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL")])
def test_random_weights_of_both_families(start, tmp_path, family, name):
    folder = save_tiny(tmp_path / family, family=family, heads=2)
    llm = start(model=folder, family=name, **pruning(0.75))
    for budget in (0.25, 1.0):
        asked = samples(names=("square.mp4", "pan.mp4"), model=str(folder), budget=budget)
        # This model's answers are not text, so log probabilities are compared.
        assert farthest(llm, asked, budget) < 1e-3


PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}  # two processes; the first one encodes


@pytest.mark.parametrize("options", [PARALLEL, pytest.param({"enforce_eager": False}, marks=pytest.mark.slow)], ids=str)
def test_tensor_parallel_and_compiled(start, options):
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), **options)
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3


@pytest.mark.slow
def test_bfloat16(start):
    """Unpruned tokens equal those of stock vLLM. Most pruned answers equal those of `VideoQA`, which rounds sums differently."""
    how = {"dtype": "bf16"}
    full = [each.request() for each in samples(budget=1.0, **how)]
    stock = answers(start(ours=False, dtype="bfloat16"), full)
    assert answers(start(dtype="bfloat16"), full) == stock
    llm = start(dtype="bfloat16", **pruning(0.75))
    for budget in (0.25, 0.1):
        asked = samples(budget=budget, **how)
        found = answers(llm, [each.request(budget) for each in asked])
        assert sum(a.strip() == b.answer.strip() for a, b in zip(found, asked, strict=True)) >= 12
        assert farthest(llm, asked, budget) < 0.2
