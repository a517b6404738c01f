"""Operations of prompts, where transformers runs the language model."""

import torch

from evoprune.session.loading.find import describe_model
from evoprune.session.loading.hosted import meta_model
from evoprune.session.options import ModelOptions
from experiments.prompt_operations import count
from tests.tiny import save_tiny


def test_each_chunk_of_a_gated_delta_net_costs_as_much(tmp_path):
    config = describe_model(ModelOptions(str(save_tiny(tmp_path, family="qwen3_5")))).config
    text = meta_model(config, torch.bfloat16).model.language_model.eval()
    one, two, three = (count(text, 64 * chunks) for chunks in (1, 2, 3))
    assert three - two == two - one > 0
    assert count(text, 1, before=64) < one
