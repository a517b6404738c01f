"""What a model's folder holds and how much of it is used: as transformers uses it, or said."""

import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from evoprune.errors import ModelWarning
from evoprune.session.loading.find import describe_model, stored_dtype
from evoprune.session.options import ModelOptions
from tests.loading import edit, error_of, load_model

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"  # as transformers writes them


def change(folder, edited):
    """Writes the weights of a folder anew: `edited` changes their dict."""
    weights = load_file(folder / "model.safetensors")
    edited(weights)
    save_file(
        {name: weight.clone() for name, weight in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def of_transformers(folder):
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).state_dict()


def assert_as_transformers(folder):
    loaded, expected = load_model(str(folder), dtype="fp32"), of_transformers(folder)
    assert all(torch.equal(weight, expected[name]) for name, weight in loaded.model.state_dict().items())
    return loaded


def shifted(weights):
    weights[HEAD] = weights[EMBEDDINGS].roll(1, 0)


def same(weights):
    weights[HEAD] = weights[EMBEDDINGS]


def head_alone(weights):
    del weights[EMBEDDINGS]


@pytest.mark.parametrize("edited, apart", [(shifted, True), (same, False), (head_alone, False)])
def test_an_output_layer_in_the_file_under_tied_embeddings(folder, edited, apart):
    change(folder, edited)
    edit(folder / "config.json", tie_word_embeddings=True)
    loaded = assert_as_transformers(folder)
    model = loaded.model
    assert model.config.tie_word_embeddings is not apart
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) is not apart
    tree = describe_model(ModelOptions(str(folder))).tree
    assert sum(weight.numel() for weight in tree.parameters()) == sum(w.numel() for w in model.parameters())
    if apart:
        assert load_model(str(folder), load_format="dummy").model.config.tie_word_embeddings


def test_a_tensor_that_is_not_read_is_named_once(folder):
    def more(weights):
        weights["model.language_model.layers.0.self_attn.q_proj.lora_A.weight"] = torch.zeros(2, 64)
        weights["value_head.bias"] = torch.zeros(1)
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # buffers of older versions
        weights["visual.rotary_pos_emb.inv_freq"] = torch.zeros(8)

    change(folder, more)
    with pytest.warns(ModelWarning) as said:
        load_model(str(folder))
    (only,) = said
    assert str(only.message).startswith(f"2 tensors of the weights are not used in {folder}: ")
    assert "q_proj.lora_A.weight, value_head.bias" in str(only.message)


def test_whole_checkpoints_say_nothing(folder):
    change(folder, same)
    edit(folder / "config.json", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(str(folder))


def test_a_tensor_under_two_names_is_refused_where_they_differ(folder):
    old, new = "visual.merger.ln_q.weight", "model.visual.merger.ln_q.weight"
    change(folder, lambda weights: weights.update({new: weights[old].clone()}))
    assert_as_transformers(folder)
    change(folder, lambda weights: weights.update({new: weights[old] + 1}))
    assert f"{new} is stored twice" in error_of(folder)


def test_an_adapter_beside_the_weights_is_said(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA"}))
    save_file({"base_model.model.lm_head.lora_A.weight": torch.zeros(2, 64)}, folder / "adapter_model.safetensors")
    with pytest.warns(
        ModelWarning, match=r"holds an adapter \(adapter_config.json\) beside the weights, which is not used"
    ):
        load_model(str(folder))


@pytest.mark.parametrize(
    "name, value", [("quantization_config", None), ("dtype", None), ("text_config", {"quantization_config": None})]
)
def test_null_in_a_config_is_missing(folder, name, value):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    content[name] = content[name] | value if value else value
    path.write_text(json.dumps({"torch_dtype": "float32"} | content))
    assert load_model(str(folder)).model is not None and stored_dtype(path) == torch.float32
