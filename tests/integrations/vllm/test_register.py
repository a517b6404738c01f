"""The entry point, in versions of vLLM that were tested and in others."""

import logging
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from evoprune.integrations.vllm import ARCHITECTURES, PREFIX, TESTED

PROJECT = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
ENTRY = PROJECT["entry-points"]["vllm.general_plugins"]["evoprune"]


@pytest.fixture
def registered(monkeypatch):
    """What a version of vLLM is asked to register."""

    def with_version(version: str) -> dict[str, str]:
        found, stand_in = {}, ModuleType("vllm")
        stand_in.__version__ = version
        stand_in.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
        EntryPoint("evoprune", ENTRY, "vllm.general_plugins").load()()
        return found

    return with_version


def test_it_registers_architectures_of_its_own(registered):
    found = registered(f"{TESTED[-1]}.4+cpu")
    assert set(found) == {PREFIX + name for name in ARCHITECTURES}
    assert all(where == f"evoprune.integrations.vllm.model:{name}" for name, where in found.items())


@pytest.mark.parametrize("version", ["0.3.2", "0.31.1", "1.0.0", "dev"])
def test_with_another_version_it_registers_nothing_and_logs_one_line(registered, caplog, version):
    with caplog.at_level(logging.WARNING):
        assert registered(version) == {}
    assert len(caplog.messages) == 1 and TESTED[0] in caplog.text and version in caplog.text


def test_the_package_does_not_import_vllm():
    code = "import sys, evoprune, evoprune.integrations.vllm as x; assert not {'vllm', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_extra_installs_the_tested_version():
    assert PROJECT["optional-dependencies"]["vllm"] == [f"vllm=={TESTED[-1]}.*"]
