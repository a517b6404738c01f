"""Qwen2-VL, tensor parallelism and compiled models."""

import pytest

from tests.integrations.vllm.serving import answers, farthest, pruning, same, samples
from tests.tiny import save_tiny

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("family", "name"), [("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL")])
def test_random_weights_of_both_families(start, tmp_path, family, name):
    folder = save_tiny(tmp_path / family, family=family, heads=2)
    llm = start(model=folder, family=name, **pruning(0.75))
    for budget in (0.25, 1.0):
        asked = samples(names=("square.mp4", "pan.mp4"), model=str(folder), budget=budget)
        assert farthest(llm, asked, budget) < 1e-3  # such answers are no text


def test_tensor_parallel(start):
    """Two processes; the first one encodes."""
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), tensor_parallel_size=2, distributed_executor_backend="mp")
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3


@pytest.mark.slow
def test_compiled(start):
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), enforce_eager=False)
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3
