"""Qwen2-VL, tensor parallelism and compiled models."""

import pytest

from tests.plugins.vllm.serving import answers, farthest, pruning, same, samples
from tests.tiny import save_tiny

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(("family", "name"), [("qwen2_vl", "Qwen2VL"), ("qwen2_5_vl", "Qwen2_5_VL")])
def test_random_weights_of_both_families(start, tmp_path, family, name):
    folder = save_tiny(tmp_path / family, family=family, heads=2)
    llm = start(model=folder, family=name, **pruning(0.75))
    for budget in (0.25, 1.0):
        asked = samples(names=("square.mp4", "pan.mp4"), model=str(folder), budget=budget)
        assert farthest(llm, asked, budget) < 1e-3  # such answers are no text


PARALLEL = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}  # two processes; the first one encodes


@pytest.mark.parametrize("options", [PARALLEL, pytest.param({"enforce_eager": False}, marks=pytest.mark.slow)], ids=str)
def test_tensor_parallel_and_compiled(start, options):
    asked = samples(budget=0.25)
    llm = start(**pruning(0.75), **options)
    assert same(answers(llm, [each.request() for each in asked]), asked)
    assert farthest(llm, asked) < 1e-3


@pytest.mark.slow
def test_bfloat16(start):
    """Nothing pruned: the tokens of stock vLLM. Pruned: most answers of `VideoQA`, whose sums are rounded elsewhere."""
    how = {"dtype": "bf16"}
    full = [each.request() for each in samples(budget=1.0, **how)]
    stock = answers(start(ours=False, dtype="bfloat16"), full)
    assert answers(start(dtype="bfloat16"), full) == stock
    llm = start(dtype="bfloat16", **pruning(0.75))
    for budget in (0.25, 0.1):
        asked = samples(budget=budget, **how)
        found = answers(llm, [each.request(budget) for each in asked])
        assert sum(a.strip() == b.answer.strip() for a, b in zip(found, asked, strict=True)) >= 12
        assert farthest(llm, asked, budget) < 0.2
