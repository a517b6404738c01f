"""Test mixtures of experts on evoprune's own layers: with all bits and with fewer, stored or not, and in every kind of run."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune import VideoQA
from evoprune.backend import Quantization
from evoprune.language import LanguageModel
from evoprune.session import ModelOptions, describe, weights_of
from tests import tiny
from tests.quantized import parameters
from tests.tiny import save_tiny

CLIP, QUESTION = "samples/square.mp4", "What happens?"
GIVEN = list(range(5, 17))


@pytest.fixture(scope="module", params=["qwen3_5_moe", "qwen3_vl_moe"])
def folder(request, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        for text in (tiny.QWEN3_TEXT, tiny.QWEN3_5_TEXT):
            patch.setitem(text, "head_dim", 32)  # row-major weights need multiples of 32
        patch.setitem(
            tiny.EXPERTS, "moe_intermediate_size", 96
        )  # square matrices would not show whether they are transposed
        yield save_tiny(tmp_path_factory.mktemp(request.param), family=request.param)


def load(folder, **options):
    return VideoQA.load(str(folder), **{"dtype": "fp32", "budget": 1.0} | options)


def logits(qa):
    return qa.encode(CLIP, frames=4).read_along(QUESTION, GIVEN)[0]


def other_layout(folder, target):
    """Write the same weights as in published checkpoints: with the experts of each layer joined, and of Qwen3-VL transposed."""
    weights = load_file(folder / "model.safetensors")
    made = {}
    for name, weight in weights.items():
        prefix, _, last = name.rpartition(".experts.")
        if not prefix:
            made[name] = weight
        elif last in ("gate_up_proj", "down_proj"):
            made[name] = weight.transpose(1, 2).contiguous()
        elif last == "0.down_proj.weight":
            parts = [[f"{prefix}.experts.{i}.{kind}_proj.weight" for i in range(4)] for kind in ("gate", "up", "down")]
            gate, up, down = (torch.stack([weights[each] for each in part]) for part in parts)
            made |= {f"{prefix}.experts.gate_up_proj": torch.cat([gate, up], 1), f"{prefix}.experts.down_proj": down}
    for file in folder.iterdir():
        if file.name != "model.safetensors":
            (target / file.name).symlink_to(file)
    save_file(made, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.few(4)
@pytest.mark.parametrize("kind", parameters("none", "int8", "int4"))
def test_both_layouts_of_files_are_read(folder, tmp_path, kind):
    both = [logits(load(each, quantize=kind)) for each in (folder, other_layout(folder, tmp_path))]
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_logits_are_those_of_transformers(folder):
    ours, theirs = (load(folder, engine=engine) for engine in ("auto", "transformers"))
    assert ours.loaded.facts().engine == "native" and theirs.loaded.facts().engine == "transformers"
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", parameters("int8", "int4"))
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_second_start_reads_the_stored_weights(folder, tmp_path, monkeypatch, kind, dtype):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    first, second = (load(folder, quantize=kind, dtype=dtype, store_quantized=True) for _ in range(2))
    assert first.loaded.quantized_file is not None and second.loaded.quantized_file is None
    assert torch.equal(logits(first), logits(second))
    assert first.loaded.weights_bytes == second.loaded.weights_bytes < 0.7 * load(folder).loaded.weights_bytes


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", parameters("int8", "int4"))
def test_answers_are_the_same_with_drafts(folder, monkeypatch, kind):
    qa = load(folder, quantize=kind)
    answers = []
    for drafts in (True, False):
        monkeypatch.setattr(LanguageModel, "can_draft", drafts)
        answer = qa.encode(CLIP, frames=4).ask(QUESTION, max_new_tokens=40)
        assert answer.text is not None
        answers.append(list(answer.ids))
    assert answers[0] == answers[1]


@pytest.mark.few(2)
@pytest.mark.parametrize("kind", parameters("none", "int8"))
def test_streams_and_methods_inside_the_language_model(folder, kind):
    qa = load(folder, quantize=kind, budget=0.5)
    with qa.stream() as stream:
        assert stream is not None
    config = json.loads((folder / "config.json").read_text())
    method = "fastv" if "layer_types" not in config["text_config"] else "pyramiddrop"
    inside = (
        load(folder, quantize=kind, budget=0.5, method=method).encode(CLIP, frames=4).ask(QUESTION, max_new_tokens=4)
    )
    assert (
        inside.text is not None
        and inside.report.pruning.language_layers[-1][1] < inside.report.pruning.visual_tokens_kept
    )


def test_large_models_run_in_8_bits_by_default():
    large = describe(ModelOptions("Qwen/Qwen3.5-35B-A3B", device="cpu"), local=True)
    kinds = Quantization.kinds(torch.device("cpu"))
    assert large.native and large.can_be_quantized and large.quantize == (kinds[0] if kinds else "none")


@pytest.mark.skipif("int4" not in Quantization.kinds(torch.device("cpu")), reason="this CPU has no 4 bits")
@pytest.mark.parametrize("size", ["Qwen3.5-35B-A3B", "Qwen3.6-35B-A3B"])
def test_a_model_with_35_billion_parameters_fits_into_22_gib_in_4_bits(size):
    weights = weights_of(describe(ModelOptions(f"Qwen/{size}", device="cpu", quantize="int4"), local=True))
    assert 16 * 2**30 < weights.bytes < 22 * 2**30
