"""Threads, and the memory of this process."""

import json
import mmap
import subprocess
import sys

import pytest

from evoprune.backend.devices import memory_in_use
from evoprune.errors import UsageError
from evoprune.session import ModelOptions


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_mapped_files_are_not_the_processs_own_memory(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 2**26)
    own, mapped = memory_in_use("cpu")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        assert sum(view[:: mmap.PAGESIZE]) > 0
        own_then, mapped_then = memory_in_use("cpu")
    assert mapped_then - mapped > 0.9 * 2**26 and own_then - own < 2**25


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_the_threads_of_a_team_end_and_come_back():
    """Runs in a separate process, which computes with two threads, then with only one."""
    code = """
import json, os, threading
import torch
from evoprune.backend.cpu.machine import _openmp, use_one_omp_thread, release_omp_threads
from evoprune.vision.preprocess import resize

def product():
    return (torch.ones(512, 512) @ torch.ones(512, 512)).sum().item()

def threads():
    return len(os.listdir("/proc/self/task"))

def alone():
    use_one_omp_thread()
    counts.append((resize(torch.ones(2, 512, 512, 3, dtype=torch.uint8), 512, 256).sum().item() * 512 / 3, threads()))

torch.set_num_threads(2)
before, counts = threads(), [(product(), threads())]
release_omp_threads()
counts.append((product() if not _openmp() else 512.0**3, threads()))
counts.append((product(), threads()))
release_omp_threads()
thread = threading.Thread(target=alone)
thread.start()
thread.join()
print(json.dumps([bool(_openmp()), [result == 512.0**3 for result, _ in counts], [count - before for _, count in counts]]))
"""
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    known, right, more = json.loads(made.stdout)
    assert all(right)
    if known:
        assert more[:3] == [1, 0, 1] and more[3] == 1  # only the other thread itself, none of the team


@pytest.mark.parametrize("wrong", ["0", "-1", "257", "two", "1.5", "", 0, "²"], ids=repr)
def test_what_is_no_number_of_threads(wrong):
    with pytest.raises(UsageError, match="not a number of threads") as caught:
        ModelOptions(threads=wrong)
    assert caught.value.hint == "use auto, or 1 to 256"
