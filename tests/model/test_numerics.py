"""Test extreme inputs. NaN and infinity are reported with their stage, and unusual inputs either work or are rejected."""

import math

import pytest
import torch

from evoprune import methods
from evoprune.errors import ModelError
from evoprune.model.numerics import all_finite
from evoprune.session import load_model
from evoprune.video_qa import VideoQA
from tests.methods.kinds import one_of_each
from tests.threads import one_thread  # noqa: F401
from tests.vision.devices import take_gpu_route

CLIP = "samples/square.mp4"
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)  # packed layers have no hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_is_enough(dtype):
    x = torch.linspace(-6e4, 6e4, 1000).to(dtype).view(10, 100)
    assert bool(all_finite(x))
    for bad in BAD:
        y = x.clone()
        y[7, 31] = bad
        assert not bool(all_finite(y))


def spoil(loaded, where: str, bad: float) -> None:
    """Put NaN or infinity into a feature of a patch, into a weight, or into the language model's output."""
    visual, language = loaded.model.model.visual, loaded.model.model.language_model

    def one(module, args):
        x = args[0].clone()
        x.view(-1, x.shape[-1])[5, 3] = bad
        return (x,)

    def second_pass(module, args):
        return (args[0] * (bad if args[0].shape[-2] == 1 else 1.0),)

    with torch.inference_mode():
        match where:
            case "inside":
                visual.blocks[0].attn.proj.register_forward_pre_hook(one)
            case "weight":
                visual.merger.ln_q.weight[2] = bad
            case "prompt":
                language.norm.weight[2] = bad
            case "answer":
                language.layers[0].mlp.down_proj.register_forward_pre_hook(second_pass)


@pytest.mark.few(3)
@pytest.mark.parametrize("method", one_of_each(methods.available(plugins=False)))
def test_a_tower_that_computes_nonsense_is_not_answered_over(loaded, method):
    qa = VideoQA(loaded, budget=0.25, method=method)
    assert qa.encode(CLIP).encoded.features.isfinite().all()
    spoil(loaded, "inside", math.nan)
    with pytest.raises(ModelError, match=r"^NaN or infinity in the output of encode") as caught:
        list(qa.encode(CLIP).ask("What?"))
    assert caught.value.stage == "encode" and "fp16" in caught.value.hint and "weights" in caught.value.hint


@pytest.mark.parametrize("method", ["evoprune", "evoprune-paper", "none"])
def test_on_a_gpu_it_is_looked_at_in_the_end(loaded, monkeypatch, method):
    spoil(loaded, "inside", math.nan)
    with take_gpu_route(monkeypatch, kernel=False), pytest.raises(ModelError, match="the output of encode"):
        VideoQA(loaded, budget=0.25, method=method).encode(CLIP)


@pytest.mark.few(5)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("where", "stage"), [("weight", "encode"), ("prompt", "prefill"), ("answer", "generate")])
def test_the_stage_is_named(loaded, where, stage, bad, temperature):
    spoil(loaded, where, bad)
    said = []
    with pytest.raises(ModelError, match=f"in the output of {stage}") as caught:
        for piece in VideoQA(loaded).encode(CLIP).ask("What?", max_new_tokens=9, temperature=temperature):
            said.append(piece)
    assert caught.value.stage == stage and (not said or stage == "generate")
