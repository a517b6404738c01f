"""Let vLLM's own pruning run on a CPU. vLLM imports this in its worker process because of `--worker-extension-cls`.

vLLM's GPU runner asks the model whether it prunes after loading it. The CPU runner in vLLM 0.32 doesn't, so requests with videos
fail.
"""

from functools import wraps

from vllm.v1.worker.cpu_model_runner import CPUModelRunner

_stock = CPUModelRunner.initialize_kv_cache


@wraps(_stock)
def _initialize_kv_cache(runner, *args, **options):
    runner.is_multimodal_pruning_enabled = True
    return _stock(runner, *args, **options)


CPUModelRunner.initialize_kv_cache = _initialize_kv_cache


class PrunesOnCpu:
    """Adds nothing to the worker, because importing this module is enough."""
