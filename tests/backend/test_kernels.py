"""Test that Triton kernels agree with the other implementations, and what happens when a kernel fails."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from evoprune.backend import devices
from evoprune.backend.devices import with_fallback
from evoprune.errors import DeviceWarning

HERE = Path(__file__).parent


@pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton here")
@pytest.mark.parametrize(
    ("file", "interpreter", "which"),
    [
        ("kernels.py", "1", "not full"),
        pytest.param("kernels.py", "1", "full", marks=pytest.mark.full),
        pytest.param("compiled.py", "0", "not full", marks=pytest.mark.full),
        pytest.param("../session/loading/variants.py", "1", "not full", marks=pytest.mark.full),
    ],
)
def test_the_kernels_of_triton(file, interpreter, which, tmp_path):
    """This runs in a separate process, because Triton decides at import whether to interpret functions."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "-m", which, str(HERE / file)]
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")}
    variables |= {"TRITON_INTERPRET": interpreter, "TRITON_CACHE_DIR": str(tmp_path)}
    made = subprocess.run(command, env=variables, cwd=HERE.parents[1], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout[-6000:] + made.stderr[-2000:]


@pytest.fixture
def tried(monkeypatch):
    """Reset the failed kernels, and return a list to which a test can add each kernel that it starts."""
    monkeypatch.setattr(devices, "has_triton", lambda: True)
    monkeypatch.setattr(devices, "_failed", set())
    monkeypatch.delenv("EVOPRUNE_PLAIN", raising=False)
    return []


@pytest.mark.parametrize(("value", "triton", "runs"), [("1", True, 0), ("0", True, 2), ("", True, 2), ("0", False, 0)])
def test_a_kernel_runs_where_there_is_triton_unless_the_environment_turns_it_off(
    value, triton, runs, tried, monkeypatch
):
    monkeypatch.setenv("EVOPRUNE_PLAIN", value)
    monkeypatch.setattr(devices, "has_triton", lambda: triton)
    kernel = failing(tried, None)
    assert [kernel(1, 2), kernel(1, b=2)] == (["kernel"] * 2 if runs else [3, 3]) and len(tried) == runs


def failing(tried, problem):
    @with_fallback("the sum", lambda a, b: a + b)
    def kernel(a, b):
        tried.append(1)
        if problem:
            raise problem
        return "kernel"

    return kernel


def test_a_kernel_that_fails_is_replaced_and_said_once(tried):
    kernel = failing(tried, RuntimeError("no such instruction\nof this GPU"))
    with pytest.warns(DeviceWarning, match="the sum runs without its kernel.*no such instruction$") as said:
        assert [kernel(1, 2), kernel(3, b=4)] == [3, 7] and len(tried) == 1
    assert len(said) == 1


def test_memory_that_runs_out_is_no_failure_of_a_kernel(tried):
    kernel = failing(tried, torch.OutOfMemoryError("out of memory"))
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError):
            kernel(1, 2)
    assert len(tried) == 2
