"""Extreme input: NaN and infinity are reported with their stage; unusual shapes and contents work or are refused."""

import math

import numpy as np
import pytest
import torch

from evoprune import methods
from evoprune.batch.output import Settings
from evoprune.batch.rows import Row, group_by_span, product_rows
from evoprune.batch.run import answers
from evoprune.bench.eval import EvalSettings, Evaluation
from evoprune.bench.questions import VideoQuestions
from evoprune.bench.shared import SharedInput
from evoprune.errors import ModelError, VideoError
from evoprune.model.numerics import all_numbers
from evoprune.session.encoding import OpenInput
from evoprune.session.loading.model import load_model
from evoprune.session.options import GenerationOptions
from evoprune.video_qa import VideoQA
from tests.methods.kinds import one_of_each
from tests.threads import one_thread  # noqa: F401
from tests.video.files import write_image
from tests.vision.devices import take_gpu_route

CLIP = "samples/square.mp4"
BAD = [math.nan, math.inf, -math.inf]


@pytest.fixture
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)  # packed layers have no hooks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_is_enough(dtype):
    x = torch.linspace(-6e4, 6e4, 1000).to(dtype).view(10, 100)
    assert bool(all_numbers(x))
    for bad in BAD:
        y = x.clone()
        y[7, 31] = bad
        assert not bool(all_numbers(y))


def spoil(loaded, where: str, bad: float) -> None:
    """Puts a number that is none into one feature of one patch, into a weight, or into what the language model says."""
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
@pytest.mark.parametrize("method", one_of_each(methods.built_in()))
def test_a_tower_that_computes_nonsense_is_not_answered_over(loaded, method):
    qa = VideoQA(loaded, budget=0.25, method=method)
    assert qa.encode(CLIP).encoded.features.isfinite().all()
    spoil(loaded, "inside", math.nan)
    with pytest.raises(ModelError, match=r"^NaN or infinity among the numbers of encode") as caught:
        list(qa.encode(CLIP).ask("What?"))
    assert caught.value.stage == "encode" and "fp16" in caught.value.hint and "weights" in caught.value.hint


@pytest.mark.parametrize("method", ["evoprune", "evoprune-paper", "none"])
def test_on_a_gpu_it_is_looked_at_in_the_end(loaded, monkeypatch, method):
    spoil(loaded, "inside", math.nan)
    with take_gpu_route(monkeypatch, kernel=False), pytest.raises(ModelError, match="the numbers of encode"):
        VideoQA(loaded, budget=0.25, method=method).encode(CLIP)


@pytest.mark.few(5)
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("where", "stage"), [("weight", "encode"), ("prompt", "prefill"), ("answer", "generate")])
def test_the_stage_is_named(loaded, where, stage, bad, temperature):
    spoil(loaded, where, bad)
    said = []
    with pytest.raises(ModelError, match=f"among the numbers of {stage}") as caught:
        for piece in VideoQA(loaded).encode(CLIP).ask("What?", max_new_tokens=9, temperature=temperature):
            said.append(piece)
    assert caught.value.stage == stage and (not said or stage == "generate")


def test_in_a_batch_and_in_an_evaluation_the_next_one_runs(loaded, monkeypatch):
    calls, frames = [], {kind: kind.frames for kind in (OpenInput, SharedInput)}

    def spoilt_once(opened, chunk_bytes):
        calls.append(1)
        if len(calls) == 1:
            raise ModelError("NaN or infinity among the numbers of encode", stage="encode")
        return frames[type(opened)](opened, chunk_bytes)

    for kind in frames:
        monkeypatch.setattr(kind, "frames", spoilt_once)
    rows = product_rows([CLIP, "samples/three.mp4"], ["What?"])
    made = list(answers(VideoQA(loaded), group_by_span(rows), Settings.of(model="x", max_new_tokens=1)))
    assert [r.error and (r.error["code"], r.error["stage"]) for r in made] == [(4, "encode"), None]
    calls.clear()
    videos = [
        VideoQuestions(name, name, (Row("a", name, name, "What?", answer="x"),)) for name in (CLIP, "samples/three.mp4")
    ]
    run = Evaluation(EvalSettings("d", (0.5,), ("evs",), generation=GenerationOptions(max_new_tokens=1)), videos)
    run.loaded = loaded
    run.run()
    assert run.document()["videos"] == {"wanted": 2, "evaluated": 1, "failed": 1}


SHAPES = {(1, 64): True, (64, 1): True, (1, 1): True, (2, 199): True, (1, 201): False, (300, 1): False}


@pytest.mark.few(5)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", ["evoprune", "evoprune-paper", "none"])
def test_pictures_of_a_row_of_pixels(loaded, tmp_path, shape, method):
    for number in range(4):
        write_image(tmp_path / f"{number}.png", np.full((*shape, 3), 60 * number, np.uint8))
    qa = VideoQA(loaded, budget=0.25, method=method)
    if SHAPES[shape]:
        video = qa.encode(tmp_path)
        "".join(video.ask("What?", max_new_tokens=2))
        assert 1 <= video.report.pruning.visual_tokens_kept <= video.plan.units
    else:
        with pytest.raises(VideoError, match="within a ratio of 200"):
            qa.encode(tmp_path)


@pytest.mark.parametrize("method", one_of_each(methods.built_in()))
@pytest.mark.parametrize("most", [1, pytest.param(2, marks=pytest.mark.full)])
def test_one_grid_and_one_token(loaded, tmp_path, method, most):
    """A video of a constant colour, of which one unit or two are looked at."""
    for number in range(2):
        write_image(tmp_path / f"{number}.png", np.full((40, 40, 3), 90, np.uint8))
    video = VideoQA(loaded, budget=0.01, method=method).encode(tmp_path, frames=2, max_visual_tokens=most)
    answer = video.ask("What?", max_new_tokens=2)
    "".join(answer)
    assert (answer.report.sampling.grid_thw[0], answer.report.pruning.visual_tokens_kept) == (1, 1)
