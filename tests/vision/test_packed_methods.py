"""Every method through the path of a GPU: groups packed for the varlen kernel, or padded without it, equal to the CPU's buckets."""

import pytest
import torch

from evoprune.methods import parse
from evoprune.methods.registry import built_in
from evoprune.vision import attention
from evoprune.vision.encoder import encode
from evoprune.vision.tower import tower_shape
from tests.methods.kinds import INNER
from tests.vision.clips import changes, clip
from tests.vision.devices import take_gpu_route, varlen_by_hand
from tests.vision.results import assert_same
from tests.vision.tower import tiny_tower

GRID = (5, 5, 7)
METHODS = [name for name in built_in() if name not in (*INNER, "downscale", "subsample")]
COMBINED = ["reuse+divprune", "reuse+visionzip", "ipcv+divprune", "ipcv+nuwa"]


def encoded(name: str, chunk_units: int):
    method, visual = parse(name), tiny_tower((1, 3))
    plan = method.plan(tower_shape(visual), GRID, 40)
    random = torch.Generator().manual_seed(1)
    question = torch.randn(6, 24, generator=random) if method.reads_question else None
    patches = clip(GRID, changes(GRID, 0.4))
    return encode(visual, [patches], plan, question=question, chunk_units=chunk_units)


@pytest.mark.few(12)
@pytest.mark.parametrize("chunk_units", [70, 10**6])
@pytest.mark.parametrize("kernel", [True, False], ids=["varlen", "padded"])
@pytest.mark.parametrize("name", [*METHODS, *COMBINED])
def test_every_method_is_the_cpus(name, kernel, chunk_units, monkeypatch):
    expected = encoded(name, chunk_units)
    take_gpu_route(monkeypatch, kernel)  # methods may wait for the device where they select
    calls = []

    def counted(*given, **how):
        calls.append(given)
        return varlen_by_hand(*given, **how)

    monkeypatch.setattr(attention, "varlen_kernel", lambda device, dtype: counted if kernel else None)
    assert_same(encoded(name, chunk_units), expected, atol=1e-4)
    assert bool(calls) == kernel
