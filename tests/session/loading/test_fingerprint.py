"""What identifies weights: the same for a checkpoint however it is read, and another one as soon as they are others."""

import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evoprune.errors import UsageError
from evoprune.model.weights import name_in_memory
from evoprune.session.loading.found import find_model
from evoprune.session.loading.weights import model_fingerprint
from evoprune.session.options import ModelOptions
from tests.loading import load_model
from tests.tiny import save_tiny, tiny_model

ROW = "model.language_model.layers.1.self_attn.v_proj.weight"


def of_folder(folder) -> str:
    return find_model(ModelOptions(folder)).weights_fingerprint


def change(folder, edit):
    """Edits the tensors of a checkpoint of one file; from then on it has the names of the tree, instead of the older ones."""
    tensors = {name_in_memory(name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="module", params=["qwen2_5_vl", "qwen2_vl"])
def checkpoint(request, tmp_path_factory):
    """A checkpoint in bf16, as published ones are, with values that fp16 cannot hold."""
    folder = save_tiny(tmp_path_factory.mktemp("tiny") / "bf16", family=request.param)

    def to_bf16(tensors):
        for name in tensors:
            tensors[name] = tensors[name].bfloat16()
        tensors[ROW][0, :3] = torch.tensor([2.0**-15 * 1.0078125, -(2.0**-30), 2.0**-14], dtype=torch.bfloat16)

    change(folder, to_bf16)
    return folder


@pytest.mark.few(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_and_a_transformers_model_in_any_dtype_agree(checkpoint, dtype):
    from transformers import AutoModelForImageTextToText

    assert model_fingerprint(AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=dtype)) == of_folder(
        checkpoint
    )


def test_a_checkpoint_in_fp32_agrees_in_bf16(saved):
    assert model_fingerprint(tiny_model()) == model_fingerprint(tiny_model().bfloat16()) == of_folder(saved)


def test_place_time_names_and_shards_do_not_matter(saved, tmp_path):
    other = shutil.copytree(saved, tmp_path / "other")
    os.utime(other / "model.safetensors", (1, 1))

    def add_what_does_not_belong(tensors):
        tensors["lm_head.weight"] = torch.ones(7, 3)
        tensors["model.rotary_emb.inv_freq"] = torch.ones(3)

    assert "visual.patch_embed.proj.weight" in load_file(saved / "model.safetensors")
    change(other, add_what_does_not_belong)
    assert of_folder(other) == of_folder(saved)
    tiny_model().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    (tmp_path / "shards" / "model.safetensors").unlink(missing_ok=True)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    assert of_folder(tmp_path / "shards") == of_folder(saved)


def test_it_needs_no_weights_in_memory_and_is_the_loaded_models(saved, monkeypatch):
    loaded, before = load_model(str(saved)), of_folder(saved)
    assert loaded.weights_fingerprint == before
    monkeypatch.setattr("evoprune.session.loading.found.files_fingerprint", lambda *_: pytest.fail("read again"))
    assert loaded.weights_fingerprint == before


def merge_adapter(tensors):
    a, b = (torch.randn(*shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 64), (32, 2)))
    tensors[ROW] += 0.001 * b @ a


def fine_tune(tensors):
    tensors["model.visual.merger.ln_q.weight"][5] *= 1.01


@pytest.mark.parametrize("edit", [merge_adapter, fine_tune])
def test_other_weights_have_another(folder, edit):
    before = of_folder(folder)
    change(folder, edit)
    assert of_folder(folder) != before


def adapted(model):
    model.model.language_model.layers[0].mlp.up_proj.base_layer = torch.nn.Linear(2, 2)


def quantised_by_its_config(model):
    model.config.quantization_config = {"quant_method": "torchao"}


def quantised(model):
    weight = torch.nn.Parameter(torch.zeros(64, 1, dtype=torch.uint8), requires_grad=False)
    model.model.language_model.layers[0].mlp.up_proj.weight = weight


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (adapted, "an adapter changes"),
        (quantised_by_its_config, "this model is quantised"),
        (quantised, "up_proj.weight of this model is quantised"),
        (lambda model: model.to("meta"), "meta device"),
    ],
)
def test_weights_that_cannot_be_read_have_none(spoil, reason):
    model = tiny_model()
    spoil(model)
    with pytest.raises(UsageError, match=reason) as caught:
        model_fingerprint(model)
    assert caught.value.hint


def test_an_adapter_of_peft(saved):
    peft = pytest.importorskip("peft")
    model = tiny_model()
    around = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(UsageError, match="an adapter changes"):
        model_fingerprint(around.get_base_model())
    assert model_fingerprint(around.merge_and_unload()) != of_folder(saved)


def test_the_default_device_of_the_host_program_does_not_matter(saved):
    expected = find_model(ModelOptions(str(saved))).weights_fingerprint
    try:
        torch.set_default_device("meta")
        assert find_model(ModelOptions(str(saved))).weights_fingerprint == expected
    finally:
        torch.set_default_device(None)


def test_random_weights_have_none(saved):
    with pytest.raises(UsageError, match="are random"):
        load_model(str(saved), load_format="dummy").weights_fingerprint  # noqa: B018 (a property that raises)


def test_files_that_changed_since_are_not_taken_for_those_that_were_loaded(folder):
    loaded = load_model(str(folder))
    change(folder, fine_tune)
    with pytest.raises(UsageError, match="have changed since it was loaded"):
        loaded.weights_fingerprint  # noqa: B018 (a property that raises)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UsageError, match="have changed since it was loaded"):
        loaded.weights_fingerprint  # noqa: B018 (a property that raises)
