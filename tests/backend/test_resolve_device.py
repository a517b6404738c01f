"""The device is chosen before torch is imported, and matches torch's choice here, without a driver, and with hidden GPUs."""

import os

import pytest
import torch

from evoprune.backend import limits
from evoprune.backend.devices import pick_device
from evoprune.backend.limits import VISIBLE_DEVICES, DeviceName


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return the root folder of a machine that has a CUDA build of torch but no driver."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(limits, "_toolkits", lambda: ["cuda"])
    for variable in VISIBLE_DEVICES:
        monkeypatch.delenv(variable, raising=False)
    return tmp_path


def driver(machine, file: str) -> None:
    (machine / file).parent.mkdir(parents=True, exist_ok=True)
    (machine / file).touch()


def test_names_say_it_and_auto_is_what_torch_finds_here():
    assert DeviceName("auto").resolve() == ("cuda" if torch.cuda.is_available() else "cpu")
    assert pick_device(DeviceName("auto").resolve(), auto=True).type == DeviceName("auto").resolve()
    assert [DeviceName(name).resolve() for name in ("cpu:0", "cuda:1", "xpu", "mps")] == [
        "cpu:0",
        "cuda:1",
        "xpu",
        "mps",
    ]


def test_a_torch_without_gpus_is_known_by_its_files(monkeypatch):
    built = {"cuda": torch.version.cuda, "hip": torch.version.hip}
    assert limits._toolkits() == [name for name, version in built.items() if version]
    for text, toolkits in {
        "cuda: Optional[str] = None\nhip: Optional[str] = None\n": [],
        "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n": ["cuda"],
        "cuda = None\nhip = '6.2'\n": ["hip"],
    }.items():
        assert limits.BUILT_WITH.findall(text) == toolkits
    for broken in (None, type("Frozen", (), {"submodule_search_locations": None})):
        monkeypatch.setattr(limits, "find_spec", lambda name, spec=broken: spec)
        assert limits._toolkits() == ["cuda", "hip"]


@pytest.mark.parametrize(
    ("toolkit", "file"),
    [
        ("cuda", "dev/nvidia0"),
        ("cuda", "dev/nvmap"),
        ("cuda", "usr/lib/wsl/lib/libcuda.so.1"),
        ("hip", "dev/kfd"),
        ("hip", "dev/dxg"),
    ],
)
def test_a_driver_is_a_gpu_for_a_torch_of_its_kind(machine, monkeypatch, toolkit, file):
    assert DeviceName("auto").resolve(machine) == "cpu"
    driver(machine, file)
    for built in ("cuda", "hip"):
        monkeypatch.setattr(limits, "_toolkits", lambda built=built: [built])
        assert DeviceName("auto").resolve(machine) == ("cuda" if built == toolkit else "cpu")
    monkeypatch.setattr(limits, "_toolkits", list)
    assert DeviceName("auto").resolve(machine) == "cpu"


@pytest.mark.parametrize("variable", VISIBLE_DEVICES)
def test_a_gpu_may_be_hidden(machine, monkeypatch, variable):
    driver(machine, "dev/nvidia0")
    for hidden in ("", " ", "-1", "NoDevFiles"):
        monkeypatch.setenv(variable, hidden)
        assert DeviceName("auto").resolve(machine) == "cpu"
    for visible in ("0,1", "GPU-8932f937-d72c", "MIG-GPU-1/0/0"):
        monkeypatch.setenv(variable, visible)
        assert DeviceName("auto").resolve(machine) == "cuda"


def test_a_gpu_may_be_forbidden(machine, monkeypatch):
    driver(machine, "dev/nvidia0")
    monkeypatch.setattr(os, "access", lambda file, mode: False)
    assert DeviceName("auto").resolve(machine) == "cpu"


def test_where_devices_are_no_files_the_build_of_torch_decides(tmp_path, machine):
    assert DeviceName("auto").resolve(tmp_path / "elsewhere") == "cuda"
