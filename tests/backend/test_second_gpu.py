"""Test that a model on `cuda:1` uses `cuda:1` for launches, captures and queries while `cuda:0` is the current device.

The tests need neither a GPU nor Triton. CPU tensors claim to be on `cuda:1`, and every launch records the current device.
"""

import importlib.util
import sys
import threading
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch.overrides import TorchFunctionMode

from evoprune.backend import attention, devices, operators
from tests.backend.cases import SHAPES, clusters, means, points, unit_rows

CALLED = {"_snap", "_gain", "_distances"}  # by other kernels
THERE = torch.device("cuda", 1)


class OnTheSecond(TorchFunctionMode):
    """A mode that creates new tensors on the CPU but makes them claim to be on the second GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func == torch.Tensor.device.__get__:
            return THERE
        kwargs = kwargs or {}
        if kwargs.get("device") is not None:
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


class Current(threading.local):
    """Each thread's current device, which is initially the first GPU."""

    number = 0


class Seen:
    """Records events as pairs of a name and the number of the current device."""

    def __init__(self):
        self.all: list[tuple[str, int]] = []
        self.current = Current()

    def note(self, name: str) -> None:
        self.all.append((name, self.current.number))

    @contextmanager
    def device(self, device):
        before = self.current.number
        self.current.number = torch.device(device).index
        try:
            yield
        finally:
            self.current.number = before


@pytest.fixture
def seen(monkeypatch):
    made = Seen()
    monkeypatch.setattr(torch.cuda, "device", made.device)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: made.current.number)
    return made


class Kernel:
    """A stand-in for a function compiled by Triton."""

    def __init__(self, function, seen: Seen):
        self._name, self._seen = function.__name__, seen

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self._seen.note(self._name)


@pytest.fixture
def kernels(seen, monkeypatch):
    """Return the module backend/kernels.py with kernels that compute nothing."""

    def jit(function=None, **_):
        return jit if function is None else Kernel(function, seen)

    triton, language = ModuleType("triton"), ModuleType("triton.language")
    triton.jit = jit
    triton.cdiv = lambda a, b: -(-a // b)
    triton.next_power_of_2 = lambda n: 1 << (n - 1).bit_length()
    triton.language = language
    language.constexpr = None
    monkeypatch.setitem(sys.modules, "triton", triton)
    monkeypatch.setitem(sys.modules, "triton.language", language)
    spec = importlib.util.find_spec("evoprune.backend.kernels")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_launched_on_the_device_of_its_tensors(kernels, seen):
    launched = {name for name, value in vars(kernels).items() if isinstance(value, Kernel)} - CALLED
    rows, count = torch.randn(9, 16), torch.ones(9)
    selection, (unit, value) = points(SHAPES["several tubes, padded"], 1), unit_rows(19, 3)
    place, half, weight, _, row, time, _ = selection
    several = torch.zeros(3, dtype=torch.int64)
    turns, cache = torch.randn(2, 3, 8), torch.zeros(2, 2, 8, 8)
    scan = means(3, 5, 0, "noise"), torch.zeros(5, 96), several.new_zeros(5), False, 0, 8.0
    with OnTheSecond():
        kernels.standard_places(rows, count, None, 16384, operators.VARIANCE_FLOOR, operators.ROUNDING)
        kernels.tube_radii(*selection, 1)
        kernels.nearest_selected(place, half, weight, row, time, (row >= 0).nonzero()[:, 0])
        kernels.mean_rows(*clusters(SHAPES["dropped"], 4, torch.float32))
        kernels.greedy_cosine(unit, value, None, 0.5, 4, False)
        kernels.reuse_scan(*scan, operators.BLOCKS, operators.CHANNELS, operators.BRIGHTNESS)
        kernels.add_norm(rows, None, count, 1e-6)
        kernels.silu_times(rows)
        kernels.rotate_put(torch.randn(3, 64), tuple(turns), None, 1e-6, 4, *cache, None, 0)
        kernels.rotate_into_groups(torch.randn(3, 4, 48), turns, turns, several, 2, several, several)
    assert {name for name, _ in seen.all} == launched
    assert {number for _, number in seen.all} == {1}
    assert seen.current.number == 0


def test_a_kernel_that_fails_leaves_the_current_device(seen):
    def fails(x):
        seen.note("launch")
        raise RuntimeError("no such kernel")

    with OnTheSecond(), pytest.raises(RuntimeError, match="no such kernel"):
        devices.on_its_device(fails)(torch.zeros(1))
    assert seen.all == [("launch", 1)] and seen.current.number == 0


@pytest.fixture
def streams(seen, monkeypatch):
    """Replace streams and graphs with stand-ins that record the current device."""

    class Stream:
        def __init__(self, device):
            self.device = torch.device(device)

        def wait_stream(self, other):
            assert self.device == other.device == THERE

    @contextmanager
    def stream(entered):
        assert entered.device == THERE
        yield

    class Graph:
        def capture_begin(self, **_):
            seen.note("begin")

        def capture_end(self):
            seen.note("end")

        def replay(self):
            seen.note("replay")

    for name, value in (("Stream", Stream), ("current_stream", Stream), ("stream", stream), ("CUDAGraph", Graph)):
        monkeypatch.setattr(torch.cuda, name, value)
    return seen


def test_a_graph_is_captured_and_run_again_on_its_device(streams):
    replay = devices.run_and_capture(lambda: streams.note("run"), THERE)
    replay()
    names = [name for name, _ in streams.all]
    assert names == ["run", "begin", "run", "end", "replay"]
    assert {number for _, number in streams.all} == {1} and streams.current.number == 0


@pytest.mark.parametrize(("name", "current"), [("cuda:1", 0), ("cuda", 1)])
def test_what_runs_beside_runs_on_the_device_of_the_model(name, current, streams):
    """The first GPU is the current device of a new thread, no matter which device is current in the main thread."""
    streams.current.number = current
    devices.Device(name).run_beside(lambda: streams.note("run"))()
    assert streams.all == [("run", 1)]


def test_flash_attention_is_asked_of_the_device_of_the_queries(seen, monkeypatch):
    def can_use(params):
        seen.note("asked")
        return False

    monkeypatch.setattr(attention, "uses_kernels", lambda device: True)
    fakes = SimpleNamespace(SDPAParams=lambda *_: None, can_use_flash_attention=can_use)
    monkeypatch.setattr(torch.backends, "cuda", fakes)
    queries, keys = torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 9, 8)
    with OnTheSecond():
        assert attention.Attention.of(queries).causal(queries, keys, keys, None) is None
    assert seen.all == [("asked", 1)]
