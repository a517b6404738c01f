"""The plugin registers itself only with the versions of vLLM that it was tested with. These tests replace vLLM by a stub."""

import logging
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import evoprune_vllm
from evoprune_vllm import DECODER, FAMILIES, PREFIX, TESTED, register

PROJECT = Path(__file__).parents[3] / "plugins" / "vllm" / "pyproject.toml"
QWEN3_5 = "Qwen3_5ForConditionalGeneration"


@pytest.fixture
def stub(monkeypatch, caplog):
    """A function that puts a stub of a vLLM version in place of vLLM. The stub records each registration."""
    logger = logging.getLogger("vllm.evoprune")
    logger.addHandler(caplog.handler)  # the real vLLM does not propagate records to the root logger
    monkeypatch.setattr(logger, "propagate", False)
    monkeypatch.setattr(logger, "level", logging.DEBUG)

    def stub(version: str) -> SimpleNamespace:
        names = ("vllm", "vllm.model_executor", "vllm.model_executor.models", "vllm.model_executor.models.config")
        modules = {name: ModuleType(name) for name in (*names, "vllm.multimodal", "vllm.multimodal.video_decoders")}
        models, configs, decoders = {}, {QWEN3_5: "settings"}, {}
        modules["vllm"].__version__ = version
        modules["vllm"].ModelRegistry = SimpleNamespace(register_model=models.__setitem__)
        modules["vllm.model_executor.models.config"].MODELS_CONFIG_MAP = configs
        modules["vllm.multimodal.video_decoders"]._BACKEND_OPTION_DEFAULTS = decoders
        modules["vllm.multimodal"].video_decoders = modules["vllm.multimodal.video_decoders"]
        for name, module in modules.items():
            monkeypatch.setitem(sys.modules, name, module)
        decoder = ModuleType("evoprune_vllm.decoder")  # the real one imports vLLM's decoders
        decoder.OPTIONS = {"num_ffmpeg_threads": 0}
        monkeypatch.setitem(sys.modules, decoder.__name__, decoder)
        monkeypatch.setattr(evoprune_vllm, "decoder", decoder, raising=False)
        place = f"vllm.multimodal.video_decoders.{DECODER}"
        monkeypatch.setitem(sys.modules, place, None)  # monkeypatch removes the plugin's entry after the test
        return SimpleNamespace(models=models, configs=configs, decoders=decoders, place=place, decoder=decoder)

    yield stub
    logger.removeHandler(caplog.handler)


@pytest.mark.parametrize("version", ["0.32.0", "0.32.1+cpu", "0.33.0", "0.33.1.dev5+gabc", "0.33.0rc1"])
def test_a_tested_version_gets_the_architectures_and_the_decoder(stub, caplog, version):
    made = stub(version)
    register()
    assert set(made.models) == {f"{PREFIX}{family}ForConditionalGeneration" for family in FAMILIES}
    assert made.models[PREFIX + QWEN3_5] == f"evoprune_vllm.model:{PREFIX}{QWEN3_5}"
    assert made.configs == {QWEN3_5: "settings", PREFIX + QWEN3_5: "settings"}
    assert made.decoders == {DECODER: made.decoder.OPTIONS} and sys.modules[made.place] is made.decoder
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.31.2", "0.34.0", "0.3.2", "0.320.0", "1.32.0", "1.0.0", "dev"])
def test_another_version_gets_nothing_but_one_line(stub, caplog, capsys, version):
    made = stub(version)
    register()
    assert not made.models and not made.decoders and made.configs == {QWEN3_5: "settings"}
    assert sys.modules[made.place] is None
    (record,) = caplog.records
    line = record.getMessage()
    assert record.name.startswith("vllm.") and record.levelno == logging.WARNING and "\n" not in line
    assert f"found vLLM {version}" in line and "0.32 and 0.33" in line and "install" in line
    assert capsys.readouterr().out == ""


def test_the_package_requires_the_tested_versions():
    requires = tomllib.loads(PROJECT.read_text("utf-8"))["project"]["dependencies"]
    major, minor = TESTED[-1].split(".")
    assert f"vllm>={TESTED[0]},<{major}.{int(minor) + 1}" in requires
