"""How many threads a model computes with, and who may change the number."""

import json
import subprocess
import sys

import pytest
import torch

from evoprune.errors import UsageError
from evoprune.session.loading import model
from evoprune.session.loading.find import describe_model
from evoprune.session.loading.model import load_model, threads_of_each, use_threads
from evoprune.session.options import ModelOptions

REAL = "Qwen/Qwen2.5-VL-3B-Instruct"


@pytest.fixture(autouse=True)
def three_threads(monkeypatch):
    """A host program with three, on a machine with eight cores."""
    monkeypatch.setattr(model, "available_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("weights", "cores", "count"),
    [(4_000_000, 64, 1), (72_000_000, 8, 2), (3_754_622_976, 4, 4), (3_754_622_976, 1, 1), (0, 4, 1)],
)
def test_small_models_get_one_thread_and_large_ones_all_cores(weights, cores, count, monkeypatch):
    monkeypatch.setattr(model, "available_cores", lambda: cores)
    use_threads("auto", weights)
    assert torch.get_num_threads() == count


@pytest.mark.parametrize(
    ("wanted", "environment", "count"),
    [(None, "", 3), ("auto", "", 1), ("auto", "5", 3), (2, "", 2), ("2", "5", 2)],
    ids=str,
)
def test_a_model_that_is_loaded_takes_the_threads_it_is_given(saved, monkeypatch, wanted, environment, count):
    """Without a word from the caller, torch's number stays as the host program has set it."""
    monkeypatch.setenv("OMP_NUM_THREADS", environment)
    load_model(str(saved), dtype="fp32", threads=wanted)
    assert torch.get_num_threads() == count


def test_a_real_model_takes_all_cores_that_this_process_may_use():
    use_threads("auto", describe_model(ModelOptions(REAL)).parameters)
    assert torch.get_num_threads() == 8


@pytest.mark.parametrize(("wanted", "processes", "each"), [("auto", 2, 3), (None, 4, 2), ("auto", 100, 1), (5, 4, 5)])
def test_several_processes_share_the_cores(wanted, processes, each):
    assert threads_of_each(wanted, processes) == each


@pytest.mark.parametrize("wrong", ["0", "-1", "257", "two", "1.5", "", 0, "²"], ids=repr)
def test_what_is_no_number_of_threads(wrong):
    with pytest.raises(UsageError, match="not a number of threads") as caught:
        ModelOptions(threads=wrong)
    assert caught.value.hint == "use auto, or 1 to 256"


def test_the_defaults():
    """The library leaves the number alone."""
    assert ModelOptions().threads is None and ModelOptions(threads="auto").threads == "auto"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts the threads in /proc")
def test_the_threads_of_a_team_end_and_come_back():
    """In a process of its own, which computes with two threads, then with one of its own alone."""
    code = """
import json, os, threading
import torch
from evoprune.cpu.machine import _openmp, use_one_omp_thread, release_omp_threads
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
        assert more[:3] == [1, 0, 1] and more[3] == 1  # the other thread itself, and none of a team
