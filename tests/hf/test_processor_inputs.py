"""Inputs of a Hugging Face model, made without its processor."""

import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

import evoprune
from evoprune.bundled import DEMOS
from evoprune.errors import EvopruneWarning, UsageError, VideoError
from tests.video.files import spoil

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(DEMOS["demo"].folder)


def answer_of(model, inputs, budget: float) -> list[int]:
    with torch.no_grad(), evoprune.EvoPrune(budget=budget, positions="qwen")(model):
        out = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.few(1)
@pytest.mark.parametrize("budget", [1.0, 0.25])
@pytest.mark.parametrize(
    ("clip", "how"),
    [
        (CLIP, {}),
        (CLIP, {"fps": 4, "start_s": 1.0, "end_s": 4.0}),
        (CLIP, {"system": "Answer in a word."}),
        ("samples/arrivals.webm", {}),
    ],
)
def test_a_model_answers_as_the_whole_pipeline_does(model, budget, clip, how):
    ask = {name: value for name, value in how.items() if name == "system"}
    video = evoprune.VideoQA.load("demo", budget=budget).encode(clip, **{k: v for k, v in how.items() if k not in ask})
    expected = video.ask(QUESTION, max_new_tokens=8, **ask)
    made = answer_of(model, evoprune.processor_inputs("demo", clip, QUESTION, **how), budget)
    assert expected.text and AutoTokenizer.from_pretrained(DEMOS["demo"].folder).decode(made, True) == expected.text


def test_shapes_and_dtypes_are_those_of_a_processor(tmp_path):
    Image.effect_mandelbrot((300, 200), (-2, -1.5, 1, 1.5), 90).convert("RGB").save(tmp_path / "a.png")
    made = evoprune.processor_inputs("demo", [CLIP, tmp_path / "a.png", CLIP], QUESTION, frames=5, end_s=3)
    processor = Qwen2VLImageProcessorPil.from_pretrained(DEMOS["demo"].folder)
    picture = processor(images=Image.open(tmp_path / "a.png"), return_tensors="pt")
    assert torch.equal(made["image_grid_thw"], picture["image_grid_thw"])
    assert torch.allclose(made["pixel_values"], picture["pixel_values"], atol=0.02)
    assert made["video_grid_thw"].tolist() == [[3, 8, 12]] * 2 and made["second_per_grid_ts"].dtype == torch.float32
    assert made["pixel_values_videos"].shape == (2 * 3 * 8 * 12, 1176)
    types, ids = made["mm_token_type_ids"], made["input_ids"]
    assert ids.shape == types.shape == made["attention_mask"].shape
    assert [int((types == kind).sum()) for kind in (2, 1)] == [2 * 3 * 4 * 6, len(picture["pixel_values"]) // 4]
    assert len(ids[types == 2].unique()) == len(ids[types == 1].unique()) == 1


def test_the_recipe_of_the_guide_prunes_and_answers(monkeypatch, capsys):
    page = Path("docs/guide.md").read_text(encoding="utf-8")
    (recipe,) = (code for code in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M) if "processor_inputs" in code)
    for written, here in (
        ("Qwen/Qwen2.5-VL-3B-Instruct", str(DEMOS["demo"].folder)),
        ("clip.mp4", CLIP),
        ("What happens?", QUESTION),
    ):
        assert written in recipe
        recipe = recipe.replace(written, here)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # importing it fails
    exec(recipe, {})
    assert capsys.readouterr().out.strip() == "green"


def test_what_makes_no_sense_is_refused():
    with pytest.raises(VideoError):
        evoprune.processor_inputs("demo", "no-such.mp4", QUESTION)
    with pytest.raises(UsageError, match="fps and frames"):
        evoprune.processor_inputs("demo", CLIP, QUESTION, fps=1, frames=2)
    with pytest.raises(TypeError, match="set budget in VideoQA"):
        evoprune.processor_inputs("demo", CLIP, QUESTION, budget=0.1)
    with pytest.raises(UsageError, match="no input given"):
        evoprune.processor_inputs("demo", [], QUESTION)


def test_an_empty_question_is_refused():
    with pytest.raises(UsageError, match="the question is empty"):
        evoprune.processor_inputs("demo", CLIP, " ")


def test_a_damaged_video_is_a_warning(tmp_path):
    damaged = spoil(Path("samples/three.mp4"), tmp_path / "damaged.mp4", {40, 50})
    with pytest.warns(EvopruneWarning, match=r"damaged\.mp4 is damaged \(2 of its packets"):
        evoprune.processor_inputs("demo", damaged, QUESTION)
    with pytest.warns(EvopruneWarning, match="fewer or smaller frames were read"):
        evoprune.processor_inputs("demo", CLIP, QUESTION, fps=8, max_visual_tokens=100)


@pytest.mark.parametrize(("how", "says"), [({"method": None}, "method is None"), ({"seed": "1"}, "seed is '1'")])
def test_arguments_of_encode_have_types(model, how, says):
    inputs = evoprune.processor_inputs("demo", CLIP, QUESTION)
    with pytest.raises(UsageError, match=says):
        evoprune.encode(model, inputs["pixel_values_videos"], inputs["video_grid_thw"], **how)
