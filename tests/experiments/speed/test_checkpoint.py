"""Test that checkpoints with random weights are complete."""

import pytest
import torch

from evoprune.session import load_model
from experiments.speed.checkpoint import write_weights
from tests.tiny import NATIVE, save_tiny

FAMILIES = [*NATIVE, "qwen3_5_moe", "qwen3_vl_moe"]  # of qwen4_exp, no size is small enough to be written


@pytest.mark.few(4)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_checkpoint_can_be_loaded(family, tmp_path):
    folder = save_tiny(tmp_path, family=family)
    made = load_model(str(folder), load_format="dummy", dtype="bf16", pack=False).model
    (folder / "model.safetensors").unlink()
    write_weights(folder, made, shards=2)
    read = load_model(str(folder), dtype="bf16", pack=False).model
    names, others = (dict(model.named_parameters()) for model in (made, read))
    assert names.keys() == others.keys()
    assert all(torch.equal(weight, others[name]) for name, weight in names.items())
