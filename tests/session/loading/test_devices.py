"""Which device is taken, and what is said about one that cannot be."""

import os
import warnings

import pytest
import torch

from evoprune.backend.devices import accelerator, available_memory, exact_shapes, pick_device
from evoprune.bundled import DEMOS
from evoprune.errors import DeviceWarning, OutOfMemory, UsageError, memory_guard
from evoprune.model.cost import shortage
from evoprune.session.loading.find import FoundModel
from evoprune.session.options import ModelOptions

OLD_DRIVER = "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040).\nPlease update"


def test_the_other_tests_see_no_gpu():
    """Those marked `cuda` alone do: `auto` is the CPU here, and in processes that a test starts."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and not torch.cuda.is_available()


def test_a_gpu_with_an_old_driver_is_named_in_one_line_and_the_cpu_goes_on(monkeypatch):
    def unusable() -> bool:
        warnings.warn(OLD_DRIVER, UserWarning, stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", unusable)
    with pytest.warns(DeviceWarning, match=r"^no GPU is used: .*too old \(found version 11040\)\.$") as said:
        assert pick_device("auto") == torch.device("cpu")
    assert len(said) == 1


def test_auto_takes_a_gpu_and_without_one_the_cpu_says_nothing(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert pick_device("auto").type == "cpu"
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch, "zeros", lambda *_, device, **__: device)
        assert pick_device("auto") == torch.device("cuda") and pick_device("cuda:1").index == 1


@pytest.mark.parametrize(("visible", "hint"), [("", "CUDA_VISIBLE_DEVICES is ''"), (None, "auto finds a GPU")])
def test_what_hides_a_gpu_is_in_the_hint(monkeypatch, visible, hint):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with pytest.raises(UsageError) as refused:
        pick_device("cuda:7")
    assert refused.value.hint.endswith(hint)


@pytest.mark.parametrize(
    ("device", "demo", "dtype"),
    [
        ("cuda:0", False, "bf16"),
        ("cuda:1", False, "fp32"),
        ("cuda:0", True, "fp32"),
        ("xpu", False, "bf16"),
        ("mps", False, "fp32"),
    ],
)
def test_the_dtype_of_a_device(device, demo, dtype, monkeypatch):
    of_each = {0: (9, 0), 1: (7, 5)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: of_each[device.index])
    folder = DEMOS["demo"].folder if demo else None
    for asked, expected in (("auto", dtype), ("bf16", "bf16")):
        assert FoundModel(ModelOptions(dtype=asked), torch.device(device), folder, None, None).dtype == expected


def test_two_models_on_one_gpu(monkeypatch):
    """What another process holds is not free; what this one's allocator keeps and does not use is."""
    gib = 2**30
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * gib, 16 * gib))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 6 * gib)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 5 * gib)
    assert available_memory("cuda:1") == 4 * gib and shortage(4 * gib, "cuda:1") is None
    assert shortage(5 * gib, "cuda:1") == "needs about 5.0 GiB of memory, and 4.0 GiB are available"


def test_reading_waits_everywhere_but_on_the_cpu(monkeypatch):
    names = "cpu", "cuda:1", "xpu", "mps", "meta"
    assert [name for name in names if exact_shapes(torch.device(name))] == ["cpu"]
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    assert accelerator() == "xpu"


@pytest.mark.parametrize(
    ("says", "message"),
    [
        (
            "Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15.77 GiB of which 1.25 GiB is free.",
            ": 2.00 GiB wanted, 1.25 GiB free",
        ),
        ("Tried to allocate 512.00 MiB.\nGPU 0 has a total capacity of ...", ": 512.00 MiB wanted"),
        ("", ""),
    ],
)  # fmt: skip
def test_running_out_of_memory_on_a_gpu_has_numbers(says, message):
    with pytest.raises(OutOfMemory) as raised, memory_guard("encode"):
        raise torch.OutOfMemoryError(f"CUDA out of memory. {says}")
    assert raised.value.message == f"out of memory in encode{message}" and raised.value.exit_code == 5
