"""Families with timestamps per frame pair: Qwen3-VL and Qwen3.5, dense and mixtures of experts, with random weights."""

import json

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from evoprune import VideoQA
from tests import tiny
from tests.plugins.vllm.serving import NEW, SAMPLES, VIDEO, Asked, clip_of, farthest, pruning
from tests.plugins.vllm.test_chunks import PARALLEL
from tests.tiny import save_tiny
from tests.video.files import write_video

pytestmark = pytest.mark.vllm

NAMES = {"qwen3_vl": "Qwen3VL", "qwen3_vl_moe": "Qwen3VLMoe", "qwen3_5": "Qwen3_5", "qwen3_5_moe": "Qwen3_5Moe"}
# vLLM's CPU kernels need certain head sizes. For Qwen3.5, these are the published ones.
SIZES = {"head_dim": 256, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
QUESTIONS = ("What colour is the square?", "Describe the video.")


class Here(Asked):
    """A question about a video at 2 frames per second, in the form that `VideoQA` reads.

    There are no markers around the whole video, and each frame's timestamp is the middle of its half second.
    """

    def request(self, budget=None):
        made = super().request(budget)
        ((frames, known),) = made["multi_modal_data"]["video"]
        places = list(range(1, 2 * len(frames), 2))
        known |= {"fps": 4, "frames_indices": places, "total_num_frames": 2 * len(frames)}
        data = {
            "prompt": made["prompt"].replace(VIDEO, "<|video_pad|>"),
            "multi_modal_data": {"video": [(frames, known)]},
        }
        return made | data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A function that returns the folder of a family's model."""

    def folder(family):
        made = tmp_path_factory.mktemp(family)
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(tiny.QWEN3_TEXT, "head_dim", 32)
            for name, size in SIZES.items():
                patch.setitem(tiny.QWEN3_5_TEXT, name, size)
            patch.setitem(tiny.EXPERTS, "norm_topk_prob", True)
            patch.setitem(tiny.EXPERTS, "moe_intermediate_size", 96)
            save_tiny(made, family=family, heads=2)
        if family == "qwen3_vl_moe":  # as published; transformers reads it either way
            (stored,) = made.glob("*.safetensors")
            tensors = {name: t.mT.contiguous() if ".experts." in name else t for name, t in load_file(stored).items()}
            save_file(tensors, stored, {"format": "pt"})
        settings = made / "preprocessor_config.json"
        known = json.loads(settings.read_text())
        settings.write_text(json.dumps(known | {"image_processor_type": "Qwen2VLImageProcessor"}))
        return made

    return folder


def options(family, rate=None):
    """Return a server's options. CPU kernels of linear attention need bfloat16, and Qwen3.5's heads have no room for a bias."""
    new = "3_5" in family
    how = {"family": NAMES[family], "dtype": "bfloat16" if new else "float32"}
    return how if rate is None else how | pruning(rate, "evoprune:count=0" if new else None)


def said(llm, requests):
    """Return the tokens of each answer, and their log probabilities."""
    from vllm import SamplingParams

    found = llm.generate(requests, SamplingParams(temperature=0, max_tokens=NEW, logprobs=0), use_tqdm=False)
    answers = [output.outputs[0] for output in found]
    logprobs = [[row[token].logprob for token, row in zip(a.token_ids, a.logprobs, strict=True)] for a in answers]
    return [list(a.token_ids) for a in answers], logprobs


def requests():
    """Return requests about one video, two videos, images, both, and neither."""
    qa = VideoQA.load("demo", budget=1.0)
    clips = [clip_of(qa, SAMPLES / name, fps)[1] for name, fps in (("square.mp4", 2), ("pan.mp4", 3))]
    pictures = [Image.fromarray(clip.frames[0]) for clip in clips]
    first, second = clips
    media = [(first,), (first, second), (pictures[1], second), (second, *pictures), tuple(pictures), ()]
    return [Asked(each, question).request() for each in media for question in QUESTIONS]


def assert_same(made, expected, exact):
    """Check for equal tokens; in bfloat16, up to the first near-tie of two probabilities."""
    for tokens, logprobs, right, theirs in zip(*made, *expected, strict=True):
        same = (
            len(right)
            if exact
            else next((i for i, (a, b) in enumerate(zip(tokens, right, strict=True)) if a != b), NEW)
        )
        assert tokens[:same] == right[:same] and same > 0
        assert logprobs[: same + 1] == pytest.approx(theirs[: same + 1], abs=1e-3 if exact else 0.1)


@pytest.mark.parametrize("family", list(NAMES))
def test_unpruned_it_answers_as_vllm_does(start, family, folder):
    """Holds on a server without pruning, and on one with it, whose prompts have placeholders for timestamps and markers."""
    model, asked = folder(family), requests()
    exact = "3_5" not in family
    stock = said(start(model=model, ours=False, **options(family)), asked)
    assert_same(said(start(model=model, **options(family)), asked), stock, exact)
    llm = start(model=model, **options(family, 1e-9), max_num_batched_tokens=64)
    assert_same(said(llm, asked), stock, exact)
    assert_same(said(llm, asked), stock, exact)  # with prefixes in the cache


def test_another_method_of_vllm_is_refused(start, folder):
    """Only the stock class has VidCom2."""
    with pytest.raises(Exception, match="vidcom2"):
        start(model=folder("qwen3_vl"), **options("qwen3_vl", 0.5), video_pruning_method="vidcom2")


def moving(path, seed, frames=12, size=(128, 192)):
    """Write a video at a size of the model, so that nothing resizes it. Some blocks change in each frame."""
    random = np.random.default_rng(seed)
    blocks = random.integers(0, 256, (size[0] // 32, size[1] // 32, 3), dtype=np.uint8)
    shown = []
    for _ in range(frames):
        changed = random.random(blocks.shape[:2]) < 0.4
        blocks = np.where(changed[..., None], random.integers(0, 256, blocks.shape, dtype=np.uint8), blocks)
        shown.append(blocks.repeat(32, 0).repeat(32, 1))
    return write_video(path, shown, fps=2)


@pytest.mark.parametrize("family", list(NAMES))
def test_pruned_it_answers_as_here(start, family, folder, tmp_path):
    """Only if every frame pair keeps a token, because `VideoQA` leaves out the timestamps of the others."""
    model, new = str(folder(family)), "3_5" in family
    how = {"model": model, "dtype": "bf16" if new else "fp32", "method": "evoprune:count=0" if new else "evoprune"}
    paths = [moving(tmp_path / f"{seed}.mp4", seed) for seed in range(3)]
    llm = start(model=model, **options(family, 0.5))
    for budget in (1.0, 0.5, 0.25):
        qa, asked = VideoQA.load(**how, budget=budget), []
        for path in paths:
            encoded, clip = clip_of(qa, path, 2)
            assert all(encoded.ask("Describe it.", max_new_tokens=1).report.pruning.kept_per_pair)
            asked += [Here((clip,), question, "", encoded) for question in QUESTIONS]
        assert farthest(llm, asked, budget) < (0.3 if new else 1e-3)


@pytest.mark.parametrize("how", [PARALLEL, pytest.param({"enforce_eager": False}, marks=pytest.mark.slow)], ids=str)
def test_tensor_parallel_and_compiled(start, how, folder):
    model, asked = folder("qwen3_vl"), requests()
    expected = said(start(model=model, **options("qwen3_vl", 0.5)), asked)
    assert_same(said(start(model=model, **options("qwen3_vl", 0.5), **how), asked), expected, exact=True)


def test_heads_without_room_for_a_bias_are_refused_with_a_hint(start, folder):
    with pytest.raises(Exception, match="cluster sizes cannot weigh"):
        start(model=folder("qwen3_5"), family="Qwen3_5", dtype="bfloat16", **pruning(0.5))
