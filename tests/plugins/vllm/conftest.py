"""Tests with the mark `vllm` run in an environment that has vLLM (docs/serving.md); elsewhere they are skipped."""

import gc
import os
from importlib.util import find_spec

import pytest

MISSING = "vLLM is not installed; docs/serving.md says how to make an environment that has it"
# For tests on a CPU, in pytest's process. vLLM reads these when it is imported.
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
INSTALLED = find_spec("vllm") is not None
if INSTALLED:
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)


def pytest_collection_modifyitems(items):
    if not INSTALLED:
        for item in items:
            if item.get_closest_marker("vllm"):
                item.add_marker(pytest.mark.skip(reason=MISSING))


@pytest.fixture(scope="module")
def start():
    """A function that makes an `LLM` after ending the previous one, so that only one is in memory."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests.plugins.vllm.serving import make_llm

    running = []

    def end():
        running.clear()
        gc.collect()
        cleanup_dist_env_and_memory()

    def start(**options):
        end()
        running.append(make_llm(**options))
        return running[0]

    yield start
    end()
