"""Find kernel variants that a question would compile on a GPU because loading did not. test_kernels.py runs this file.

Triton's interpreter runs the GPU kernels on CPU tensors, and each call records the variant that it would compile.
"""

import inspect

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from evoprune.backend import layers
from evoprune.session import load_model
from evoprune.session.loading.model import _warm_up
from evoprune.video_qa import VideoQA
from tests.backend.gpu_ways import gpu_ways
from tests.tiny import NATIVE, save_tiny

run_interpreted = InterpretedFunction.run


def variant(kernel: InterpretedFunction, args: tuple, kwargs: dict) -> tuple:
    """Return a key made of constants, dtypes and divisibility by 16. Calls with the same key use the same compiled kernel."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    anyhow = {
        *(kernel.kwargs["do_not_specialize"] or ()),
        "head_stride",
        "column_stride",
    }  # real heads are multiples of 16, heads of 24 are not
    kinds = []
    for name, parameter in inspect.signature(kernel.fn).parameters.items():
        value = given.pop(name)
        if isinstance(value, torch.Tensor):
            kinds.append((value.dtype, value.data_ptr() % 16 == 0))
        elif isinstance(value, float) or name in anyhow:
            kinds.append(type(value))
        elif "constexpr" in str(parameter.annotation):
            kinds.append(value)
        else:
            kinds.append((value == 1, value % 16 == 0))
    return kernel.fn.__name__, *kinds, *given.items()


@pytest.fixture
def noted(monkeypatch):
    """Record the variant of each kernel call while the CPU takes the code paths of a GPU."""
    seen = set()

    def run(self, *args, grid, warmup, **kwargs):
        seen.add(variant(self, args, kwargs))
        return run_interpreted(self, *args, grid=grid, warmup=warmup, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    with gpu_ways():
        yield seen


@pytest.mark.filterwarnings("ignore:Warning only once for all operators")
@pytest.mark.parametrize("family", [*NATIVE, "qwen3_5"])
def test_a_question_compiles_nothing_that_was_not_compiled_beside_loading(family, noted, tmp_path):
    loaded = load_model(str(save_tiny(tmp_path, family=family)), device="cpu", dtype="fp16")
    if native := loaded.model.native:
        layers.join(loaded.model)
    layers.join_tower(loaded.model.model.visual)
    noted.clear()
    _warm_up(loaded.model.config, torch.float16, torch.device("cpu"), native)
    known = set(noted)
    names = {"_scan", "_greedy", "_means", "_rotate_into_groups", "_rotate_put" if native else "_add_norm"}
    assert {name for name, *_ in known} >= names
    for budget, tokens in ((0.25, 90), ("high", 60)):
        clip = VideoQA(loaded, budget=budget).encode("samples/square.mp4", max_visual_tokens=tokens)
        assert clip.ask("What?", max_new_tokens=2).text
    assert noted - known == set()
