"""Compile `rows.c` as `pip install` does, and give it to evoprune. Test files import the fixtures."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from evoprune.backend.cpu import four_bits, rows

SOURCE = Path(rows.__file__).with_suffix(".c")


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a compiler and AVX2")
    folder = tmp_path_factory.mktemp("rows")
    options = ["-O3", "-mavx2", "-mfma", "-fopenmp", "-fPIC"]
    subprocess.run([compiler, *options, "-c", SOURCE, "-o", folder / "rows.o"], check=True)
    subprocess.run([compiler, "-shared", folder / "rows.o", "-o", folder / "_rows.so"], check=True)
    return rows.load(str(folder / "_rows.so"))


@pytest.fixture
def compiled(library, monkeypatch) -> None:
    """Compute with the compiled products, even if evoprune was installed without them."""
    for module in (rows, four_bits):
        monkeypatch.setattr(module, "library", lambda: library)
