"""The OpenMP threads of a live stream."""

import json
import subprocess
import sys

import pytest


@pytest.mark.full
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_the_threads_of_a_team_end_and_come_back():
    """Runs in a separate process, which computes with two threads, then with only one."""
    code = """
import json, os, threading
import torch
from evoprune.live.omp import _openmp, release_omp_threads, use_one_omp_thread
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
