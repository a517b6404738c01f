"""Test device-dependent behaviour that no other test covers. Only the names of the devices are used, so they need not exist."""

import mmap
import os
import sys
from pathlib import Path

import pytest
import torch

from evoprune.backend.attention import Attention
from evoprune.backend.devices import Device
from evoprune.backend.limits import MAX_VISUAL_TOKENS_CPU, DeviceName

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("device", "gpus", "expected"),
    [
        ("cpu", 4, (5, {"num_cpus": 2})),  # nodes with 2, 4 and 5 cores
        ("auto", 0, (5, {"num_cpus": 2})),
        ("auto", 4, (4, {"num_gpus": 1})),
        ("cuda", 3, (3, {"num_gpus": 1})),
        ("cuda:1", 0, (1, {"num_gpus": 1})),
    ],
)
def test_the_share_of_a_process_in_a_cluster(device, gpus, expected):
    assert DeviceName(device).cluster_share(gpus, [2, 4, 5, 0]) == expected


def test_a_cluster_without_cores_has_room_for_one():
    assert DeviceName("cpu").cluster_share(0, [0]) == (1, {"num_cpus": 1})


def test_a_cpu_computes_with_all_threads():
    assert (Device(CPU).busy_cores, Device(GPU).busy_cores) == (torch.get_num_threads(), 1)
    assert max(Device(CPU).product_sides) < min(Device(GPU).product_sides)
    assert DeviceName("cpu").visual_token_limit == MAX_VISUAL_TOKENS_CPU < DeviceName("cuda:1").visual_token_limit
    assert (Device("cpu").kind, Device("cuda:1").kind) == ("cpu", "cuda")


def test_weights_stay_in_their_files_on_a_cpu_alone():
    assert Device(CPU).maps_weights({"BF16"}, torch.bfloat16, "none") and Device(CPU).maps_weights(
        {"BF16"}, torch.float32, "int8"
    )
    assert not Device(CPU).maps_weights({"BF16"}, torch.float32, "none")
    assert not Device(CPU).maps_weights({"BF16", "F32"}, torch.float32, "none")
    assert not Device(GPU).maps_weights({"BF16"}, torch.bfloat16, "none")
    assert Device(CPU).widens("fp8") and not Device(CPU).widens("awq") and not Device(GPU).widens("fp8")


@pytest.mark.parametrize(
    ("device", "dtype", "installed", "expected"),
    [
        (CPU, torch.bfloat16, True, "sdpa"),
        (GPU, torch.bfloat16, True, "flash_attention_2"),
        (GPU, torch.float32, True, "sdpa"),
        (GPU, torch.bfloat16, False, "sdpa"),
    ],
)
def test_the_attention_of_transformers(device, dtype, installed, expected, monkeypatch):
    monkeypatch.setattr("evoprune.backend.attention.find_spec", lambda name: installed or None)
    made, note = Attention(device, dtype).of_transformers()
    assert made == expected
    assert note is None if device == CPU else note.startswith(f"transformers runs {made}")


def file_system(path: Path) -> str:
    """Return the type of the file system that a file is on, such as ext4."""
    device = os.stat(path).st_dev
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        mount, _, source = line.partition(" - ")
        if mount.split()[2] == f"{os.major(device)}:{os.minor(device)}":
            return source.split()[0]
    return "unknown"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_files_are_not_the_processs_own_memory():
    """The file is an installed one, because temporary files may be in memory (tmpfs), which counts as the process's own."""
    path, size = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so", 2**26
    if not path.exists() or path.stat().st_size < size or file_system(path) in ("tmpfs", "ramfs"):
        pytest.skip("no large file on a disk")
    own, mapped = Device("cpu").memory_in_use()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) > 0
        own_then, mapped_then = Device("cpu").memory_in_use()
    assert mapped_then - mapped > 0.9 * size and own_then - own < size // 2
