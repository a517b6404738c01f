"""The device is known before torch is: as torch itself finds it here, and without a driver, or where GPUs are hidden."""

import pytest
import torch

from evoprune.backend import expected
from evoprune.backend.devices import is_host, pick_device
from evoprune.backend.expected import expects_host


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """The root of a machine with a torch that can use GPUs, and no driver."""
    (tmp_path / "dev").mkdir()
    monkeypatch.setattr(expected, "_built_for_gpus", lambda: True)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    return tmp_path


def test_names_say_it_and_auto_is_what_torch_finds_here():
    assert expects_host("auto") == is_host(pick_device("auto"))
    assert expects_host("cpu") and expects_host("cpu:0")
    assert not any(map(expects_host, ("cuda", "cuda:1", "xpu", "mps")))


def test_a_torch_without_gpus_is_known_by_its_files(monkeypatch):
    assert expected._built_for_gpus() == (torch.version.cuda is not None or torch.version.hip is not None)
    for text, there in {
        "cuda: Optional[str] = None\nhip: Optional[str] = None\n": False,
        "cuda: Optional[str] = '12.8'\nhip: Optional[str] = None\n": True,
        "cuda = None\nhip = '6.2'\n": True,
    }.items():
        assert bool(expected.BUILT_WITH.search(text)) == there
    for broken in (None, type("Frozen", (), {"submodule_search_locations": None})):
        monkeypatch.setattr(expected, "find_spec", lambda name, spec=broken: spec)
        assert expected._built_for_gpus()


@pytest.mark.parametrize("node", ["nvidia0", "kfd", "dxg"])
def test_a_driver_is_a_gpu_unless_it_is_hidden(machine, monkeypatch, node):
    assert expects_host("auto", machine)
    (machine / "dev" / node).touch()
    assert not expects_host("auto", machine)
    for hidden in ("", " ", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert expects_host("auto", machine)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert not expects_host("auto", machine)


def test_where_devices_are_no_files_torch_decides(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(expected, "_built_for_gpus", lambda: True)
    assert not expects_host("auto", tmp_path)
