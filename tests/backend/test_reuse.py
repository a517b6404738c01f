"""The operator of reuse: it may be cut anywhere, and its form for a device reads no value."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from evoprune.backend import operators
from evoprune.bench.profiling.verify.waiting import shape_depends_on_values
from tests.backend.cases import means
from tests.threads import one_thread  # noqa: F401


class OnADevice(TorchDispatchMode):
    """Has no shape depend on values, nor a branch."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not shape_depends_on_values(func, args), func
        assert func is not torch.ops.aten._local_scalar_dense.default, func
        return func(*args, **(kwargs or {}))


def scanned(frames, threshold=8.0, form=operators.reuse_scan):
    return form(frames, frames[0], torch.zeros(frames.shape[1], dtype=torch.int64), False, 0, threshold)


@pytest.mark.parametrize("units", [1, 5, 24])
@pytest.mark.parametrize("kind", ["noise", "still", "cut"])
def test_a_scan_may_be_cut_anywhere(units, kind):
    frames = means(9, units, 0, kind)
    whole = scanned(frames)
    source, held, pair = scanned(frames[:1])
    made = [source]
    for first, count in ((1, 1), (2, 3), (5, 4)):
        source, held, pair = operators.reuse_scan(frames[first : first + count], held, pair, True, first, 8.0)
        made.append(source)
    for ours, expected in zip((torch.cat(made), held, pair), whole, strict=True):
        assert torch.equal(ours, expected)
