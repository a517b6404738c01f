"""Lets vLLM's runner on CPUs ask the model for positions.

The runner on GPUs looks at the model after loading, and notes that it prunes. The one on CPUs has a loader of its own, which does
not (0.32): vLLM's own pruning fails there.
"""

from functools import wraps

from torch import nn
from vllm.platforms import current_platform


def let_cpu_runner_prune(model: type[nn.Module]) -> None:
    """From now on, a runner on a CPU notes that models of class `model` prune, if they do. Nothing else changes, nor on a GPU."""
    if not current_platform.is_cpu():
        return
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    stock = CPUModelRunner.initialize_kv_cache
    if hasattr(stock, "prunes"):
        stock.prunes.add(model)
        return

    @wraps(stock)
    def initialize_kv_cache(runner, *args, **options):
        if type(runner.model) in initialize_kv_cache.prunes:
            runner.is_multimodal_pruning_enabled = runner.model.is_multimodal_pruning_enabled
        return stock(runner, *args, **options)

    initialize_kv_cache.prunes = {model}
    CPUModelRunner.initialize_kv_cache = initialize_kv_cache
