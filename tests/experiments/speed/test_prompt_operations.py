"""Operations of prompts, where layers are linear attention."""

import torch

from evoprune.model.weights import HostedVL
from evoprune.session.loading.description import describe
from evoprune.session.loading.hosted import meta_model
from evoprune.session.options import ModelOptions
from experiments.speed.prompt_operations import count
from tests.tiny import save_tiny


def test_a_chunk_costs_one_operation_for_each_gated_delta_net(tmp_path):
    config = describe(ModelOptions(str(save_tiny(tmp_path, family="qwen3_5")))).config
    host = meta_model(config, torch.bfloat16).eval()
    model = HostedVL(config, host.model.visual, host.model.language_model, host.lm_head)
    theirs, ours = ([count(model, 64 * chunks, 0, own) for chunks in (2, 3, 4)] for own in (False, True))
    assert theirs[2] - theirs[1] == theirs[1] - theirs[0] == 4 * 9
    assert ours[2] - ours[1] == ours[1] - ours[0] == 4
    for own, whole in ((False, theirs), (True, ours)):
        assert count(model, 1, 64, own) < whole[0]
