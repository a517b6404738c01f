"""Qwen3-VL from a file to logits: transformers' own at full budget; below it, a prompt written by hand and read by its layers."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import evoprune
from evoprune.bench.hugging_face import hugging_face_model
from evoprune.model.weights import empty
from evoprune.session.cache import Cache
from evoprune.session.loading.find import BUNDLED_CONFIGS, read_config
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.hf.reference import TAKES_ENCODED
from tests.tiny import save_tiny

CLIP, LONG, QUESTION = "samples/square.mp4", "samples/arrivals.webm", "What happens?"
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3"), family="qwen3_vl")


@pytest.fixture(scope="module")
def loaded(folder):
    return load_model(str(folder), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def host(loaded):
    """The same weights in transformers' class."""
    model, special = hugging_face_model(loaded.model), loaded.tokenizer.specials()
    for name in ("video", "image"):
        setattr(model.config, f"{name}_token_id", special[f"<|{name}_pad|>"])
    model.config.vision_end_token_id = special["<|vision_end|>"]
    model.generation_config.eos_token_id = list(loaded.eos_ids)
    return model


def generated(host, inputs, n=12) -> list[int]:
    out = host.generate(**inputs, max_new_tokens=n, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_a_frame_pair_without_tokens_is_left_out_of_the_text(loaded):
    full = VideoQA(loaded, budget=1.0).encode(LONG, max_visual_tokens=60).ask(QUESTION, max_new_tokens=1)
    few = VideoQA(loaded, budget=0.06, method="random").encode(LONG, max_visual_tokens=60)
    asked = few.ask(QUESTION, max_new_tokens=1)
    assert full.text is not None and asked.text is not None
    empty = sum(count == 0 for count in few.encoded.kept_per_pair)
    stamp = len(loaded.tokenizer.encode("<0.3 seconds>")) + 2
    assert empty and full.report.tokens.text - asked.report.tokens.text == empty * stamp
    again = few.ask("Which one?", max_new_tokens=3).text  # on the keys and values of the first prompt
    assert again == VideoQA(loaded, budget=0.06, method="random").encode(LONG, max_visual_tokens=60).ask(
        "Which one?", max_new_tokens=3
    )


def test_the_cache_keeps_deepstack(loaded, tmp_path):
    cache, qa = Cache(tmp_path), VideoQA(loaded, budget=0.3)
    first = qa.encode(CLIP, cache=cache)
    again = qa.encode(CLIP, cache=cache)
    assert again.encoded.rows.is_meta  # it was read
    assert torch.equal(first.encoded.deepstack, again.encoded.deepstack)
    assert first.ask(QUESTION, max_new_tokens=5).text == again.ask(QUESTION, max_new_tokens=5).text


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "name", ["fastv", "int8", "evoprune+fastv", "sparsevlm", "visionzip", "cdpruner", "ipcv", "subsample", "int4"]
)
def test_every_kind_of_method_runs_and_fewer_bits_do(folder, loaded, name):
    made, how = loaded, {"method": name}
    if name.startswith("int"):
        made, how = load_model(str(folder), dtype="fp32", quantize=name), {}
    answer = VideoQA(made, budget=0.3, **how).encode(LONG).ask(QUESTION, max_new_tokens=4)
    assert answer.text is not None and answer.report.tokens.new <= 4
    assert answer.report.model.quantize == (name if name.startswith("int") else "none")


@pytest.mark.few(2)
@pytest.mark.parametrize("name", BUNDLED_CONFIGS)
def test_the_bundled_dimensions_are_those_of_transformers(name):
    config = read_config(BUNDLED_CONFIGS[name])
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(BUNDLED_CONFIGS[name]))
    ours = {key: value.shape for key, value in empty(config).state_dict().items()}
    assert ours == {key: value.shape for key, value in theirs.state_dict().items()}


@pytest.mark.skipif(not TAKES_ENCODED, reason="this transformers takes no encoded videos of Qwen3-VL")
@pytest.mark.few(2)
@pytest.mark.parametrize("name", ["evoprune", "divprune", "tome", "evs"])
@pytest.mark.parametrize("budget", [0.3, 0.05])
@pytest.mark.parametrize("path", [LONG, [CLIP, LONG]])
def test_a_model_in_hand_is_pruned_alike(folder, loaded, host, name, budget, path):
    inputs = evoprune.processor_inputs(folder, path, QUESTION, max_visual_tokens=4096)
    with evoprune.EvoPrune(budget=budget, method=name)(host) as run:
        theirs = [i for i in generated(host, inputs) if i not in loaded.eos_ids]
    ours = VideoQA(replace(loaded), budget=budget, method=name).encode(path).ask(QUESTION, max_new_tokens=12)
    assert ours.text is not None and ours.ids == theirs
    assert run.report.tokens == replace(ours.report.tokens, new=None)
