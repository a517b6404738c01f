"""Test that checkpoints with random weights are complete, for evoprune and for transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file

from evoprune.model import FAMILIES, Config, QwenVL
from evoprune.session import BUNDLED_CONFIGS, load_model
from experiments.speed.checkpoint import write_settings, write_weights
from tests import tiny
from tests.tiny import save_tiny

# of qwen4_exp, no size is small enough to be written
WRITTEN = [family for family in FAMILIES if family != "qwen4_exp"]


def layout(weights):
    return {name: weight.shape for name, weight in weights}


@pytest.fixture
def written(tmp_path, monkeypatch):
    """Return a function that writes a checkpoint of a family in published form, and returns its folder and its weights."""
    # square matrices would not show whether they are transposed
    monkeypatch.setitem(tiny.EXPERTS, "moe_intermediate_size", 48)

    def write(family):
        folder = save_tiny(tmp_path, family=family, mtp=family.startswith("qwen3_5"))
        config = Config.parse(json.loads((folder / "config.json").read_text()))
        model = QwenVL.random(config, torch.bfloat16, torch.device("cpu"))
        (folder / "model.safetensors").unlink()
        write_weights(folder, model, shards=2)
        files = [load_file(file) for file in folder.glob("*.safetensors")]
        assert len(files) == 2
        experts = [
            weight.shape for file in files for name, weight in file.items() if name.endswith("experts.gate_up_proj")
        ]
        transposed = family == "qwen3_vl_moe"
        assert bool(experts) is family.endswith("_moe")
        assert all(shape == ((4, 64, 96) if transposed else (4, 96, 64)) for shape in experts)
        return folder, dict(model.named_parameters())

    return write


@pytest.mark.few(4)
@pytest.mark.filterwarnings("error::evoprune.errors.ModelWarning")
@pytest.mark.parametrize("family", WRITTEN)
def test_evoprune_reads_every_tensor(family, written):
    folder, weights = written(family)
    found = dict(load_model(str(folder), dtype="bf16", pack=False).model.named_parameters())
    assert found.keys() == weights.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in weights.items())


@pytest.mark.few(4)
@pytest.mark.parametrize("family", WRITTEN)
def test_transformers_reads_every_tensor_but_those_for_drafts(family, written):
    from transformers import AutoModelForImageTextToText

    folder, weights = written(family)
    model, report = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report.values()), report
    found = dict(model.named_parameters())
    others = {name: weight for name, weight in weights.items() if not name.startswith("mtp.")}
    assert found.keys() == others.keys()
    assert all(torch.equal(weight, found[name]) for name, weight in others.items())


@pytest.mark.few(4)
@pytest.mark.parametrize("size", [name for name in BUNDLED_CONFIGS if "Flash-Next" not in name])
def test_every_published_size_has_the_tensors_of_transformers(size, tmp_path):
    from transformers import AutoConfig, AutoModelForImageTextToText

    write_settings(tmp_path, size, mtp=True)
    config = Config.parse(json.loads((tmp_path / "config.json").read_text()))
    ours = layout(QwenVL.empty(config).named_parameters())
    drafts = {name for name in ours if name.startswith("mtp.")}
    assert bool(drafts) is size.startswith(("Qwen/Qwen3.5", "Qwen/Qwen3.6", "Qwen/Qwen3.8"))
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tmp_path))
    theirs.tie_weights()
    assert {name: shape for name, shape in ours.items() if name not in drafts} == layout(theirs.named_parameters())


def test_fewer_layers_end_with_attention(tmp_path):
    write_settings(tmp_path, "Qwen/Qwen3.5-35B-A3B", layers=2)
    text = Config.parse(json.loads((tmp_path / "config.json").read_text())).text_config
    assert (text.num_hidden_layers, text.is_linear(0), text.is_linear(1)) == (2, True, False)
