import atexit
import functools
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

import pytest

# The workers of pytest-xdist share the cores, so each one computes in one thread. Torch reads this variable on import.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
else:  # the workers inherit it
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="caches-of-tests-")  # instead of the user's caches
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import torch

from evoprune.session import encoding
from evoprune.session.patches import content_key
from tests.process_state import differences, process_state
from tests.tiny import save_tiny

# A shell starts background and nohup jobs with signals ignored. Every process that a test starts would inherit that.
for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    number = getattr(signal, name, None)
    if number is not None and signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)


EXPERIMENTS = Path(__file__).parent / "experiments"
# Failure reports print the difference, so a few elements of a tensor are enough.
torch.set_printoptions(threshold=8, edgeitems=2)
_differences: list[str] = []  # between tensors that the current test compared


def _reporting(compare):
    """Return `torch.equal` or `torch.allclose` with a note of the difference each time it returns False."""

    @functools.wraps(compare)
    def compared(first, second, *args, **kwargs):
        same = compare(first, second, *args, **kwargs)
        if not same:
            _differences.append(_difference(first, second))
        return same

    return compared


def _difference(first: torch.Tensor, second: torch.Tensor) -> str:
    kinds = [f"{each.dtype} {list(each.shape)}" for each in (first, second)]
    if kinds[0] != kinds[1] or first.device.type != "cpu":
        return f"{kinds[0]} is not {kinds[1]}"
    apart = (first.double() - second.double()).abs().nan_to_num(torch.inf).flatten()
    place = int(apart.argmax())
    values = f"{first.flatten()[place].item()} is not {second.flatten()[place].item()}"
    count = int(torch.count_nonzero(apart))
    return f"{count} of {len(apart)} numbers of {kinds[0]} differ; most the one at {place} of the flat tensor: {values}"


torch.equal = _reporting(torch.equal)
torch.allclose = _reporting(torch.allclose)


def pytest_runtest_setup():
    _differences.clear()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(call):
    report = yield
    if report.failed and _differences:
        report.sections.append(("the last tensors that differed", _differences[-1]))
    return report


def pytest_addoption(parser):
    parser.addoption("--cases", type=int, metavar="N", help="run at most N cases of each parametrized test")


def pytest_configure(config):
    """Hide GPUs from this process and its children, so that `auto` means the CPU, unless `-m` asks for CUDA tests.

    The other tests compare with CPU tensors, expect CPU sums to the last bit, or need 8-bit layers. This must run before
    anything initializes CUDA.
    """
    if "cuda" not in (config.option.markexpr or "").replace("not cuda", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run on the CPU; Triton reads this when it is imported


def pytest_xdist_auto_num_workers(config):
    """Let `-n auto` start one worker more than there are cores, because some tests wait, e.g. for live video or a time limit."""
    return (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1) + 1


def pytest_sessionstart(session):
    """Import the test modules in a different order in each pytest-xdist worker, if the whole suite was requested.

    In a fresh checkout, pytest rewrites the asserts in the modules and caches the result. With the same order in all workers,
    each worker would rewrite every module.
    """
    worker = getattr(session.config, "workerinput", None)
    if worker is None or session.config.option.file_or_dir:
        return
    folder = Path(__file__).parent
    paths = sorted(path.relative_to(folder.parent) for path in folder.rglob("test_*.py"))
    modules = [".".join(path.with_suffix("").parts) for path in paths]
    first = len(modules) * int(worker["workerid"].removeprefix("gw")) // worker["workercount"]
    for name in modules[first:] + modules[:first]:
        with suppress(Exception, pytest.skip.Exception):  # the collection reports the error
            importlib.import_module(name)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Keep n evenly spaced cases of each test marked `few(n)` in the default run, and mark its other cases `full`.

    `--cases N` does the same for all tests, with n at most N.

    All tests of experiments, which users never run, are marked `full` too. Tests marked `cuda` are skipped without a visible GPU.
    """
    needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and -m cuda")
    cases = defaultdict(list)
    for item in items:
        if EXPERIMENTS in item.path.parents:
            item.add_marker("full")
        if item.get_closest_marker("cuda"):
            item.add_marker(needs_gpu)
        cases[item.nodeid.partition("[")[0]].append(item)
    for all_of_it in cases.values():
        few = all_of_it[0].get_closest_marker("few")
        count = min(few.args[0] if few else len(all_of_it), config.option.cases or len(all_of_it))
        stay = {round(n * len(all_of_it) / count) for n in range(count)}
        for number, item in enumerate(all_of_it):
            if number not in stay:
                item.add_marker("full")


@pytest.fixture(scope="session", autouse=True)
def what_is_there_by_now_stays():
    """Keep the garbage collector away from the million objects created before the first test."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="session", autouse=True)
def the_process_stays_as_it_was():
    """Check that the tests leave the process state unchanged, because later tests and child processes depend on it."""
    before = process_state()
    yield
    if {"lmms_eval", "ray", "vllm"} & set(sys.modules):  # importing these packages changes the following state
        for name in ("environment", "path", "hooks"):
            del before[name]
    changed = differences(before, process_state())
    assert not changed, "\n".join(changed)


@pytest.fixture(autouse=True)
def nothing_was_read_before(monkeypatch):
    """Give each test its own patch store keys, so that models shared between tests never reuse patches of another test."""

    def key(*what):
        known = content_key(*what)
        return None if known is None else (monkeypatch, known)

    monkeypatch.setattr(encoding, "content_key", key)


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Folder of a tiny model, read-only by convention."""
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of the tiny model's folder that a test may modify."""
    return shutil.copytree(saved, tmp_path / "tiny")


@pytest.fixture
def speech_model(monkeypatch, tmp_path):
    """The folder of a speech model, which a stand-in for faster-whisper pretends to load (tests/speech.py)."""
    from tests.speech import stand_in

    return stand_in(monkeypatch, tmp_path / "whisper")


@pytest.fixture
def spool(tmp_path, monkeypatch):
    """Folder for temporary files. Fails the test if files remain in it."""
    folder = tmp_path / "spool"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    assert not list(folder.iterdir())
