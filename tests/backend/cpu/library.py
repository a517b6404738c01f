"""Compile the library as `pip install` does, and give them to evoprune. Test files import the fixtures."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from evoprune.backend.cpu import compiled as module
from evoprune.backend.cpu import deltas, layer

FOLDER = Path(module.__file__).parent


def compile_library(compiler: str | None, folder: Path, *more: str) -> ctypes.CDLL:
    """Compile the library into a folder with more options. Skips the test if this is not possible here."""
    if compiler is None or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("needs a compiler and AVX2")
    objects = [folder / f"{name}.o" for name in ("rows", "attention", "layer")]
    for made in objects:  # linking both files at once would need another option for the compiler
        options = ["-O3", "-mavx2", "-mfma", "-fPIC", *more]
        subprocess.run([compiler, *options, "-c", FOLDER / f"{made.stem}.c", "-o", made], check=True)
    subprocess.run([compiler, "-shared", *objects, "-o", folder / "_rows.so", "-lm"], check=True)
    return module.load(str(folder / "_rows.so"))


@pytest.fixture(scope="session")
def library(tmp_path_factory) -> ctypes.CDLL:
    compiler = shutil.which("cc") or shutil.which("gcc")
    return compile_library(compiler, tmp_path_factory.mktemp("rows"), "-fopenmp")


@pytest.fixture
def compiled(library, monkeypatch) -> None:
    """Compute with the compiled library, even if evoprune was installed without it."""
    use(library, monkeypatch)


def use(library: ctypes.CDLL | None, monkeypatch) -> None:
    """Make evoprune use a library, or none."""
    for each in (module, layer, deltas):
        monkeypatch.setattr(each, "library", lambda: library)
    monkeypatch.setattr(layer, "_known", type(layer._known)())
