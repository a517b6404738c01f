"""The distributions in plugins/: what they declare, and what installing them changes in vLLM. Neither host program is needed."""

import ast
import logging
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

import evoprune
import evoprune_vllm
from evoprune_vllm import DECODER, FAMILIES, PREFIX, TESTED

ROOT = Path(__file__).parents[2]
PLUGINS = {path.parent.name: tomllib.loads(path.read_text("utf-8")) for path in ROOT.glob("plugins/*/pyproject.toml")}
PROJECTS = {name: made["project"] for name, made in PLUGINS.items()}


def test_the_plugins_are_those_that_pytest_and_ruff_find():
    assert (
        sorted(PLUGINS) == ["lmms_eval", "serve", "vllm"] == sorted(path.name for path in (ROOT / "plugins").iterdir())
    )
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]
    folders = {f"plugins/{name}" for name in PLUGINS}
    assert set(tools["pytest"]["ini_options"]["pythonpath"]) == folders == set(tools["ruff"]["src"]) - {"."}


@pytest.mark.parametrize("name", PLUGINS)
def test_a_plugin_belongs_to_one_version_of_evoprune_and_installs_its_package(name):
    project, core = PROJECTS[name], tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["version"] == evoprune.__version__
    needed = [each.replace("[schema]", "") for each in project["dependencies"]]
    assert f"evoprune=={evoprune.__version__}" in needed
    assert (project["requires-python"], project["license"]) == (core["requires-python"], core["license"])
    (package,) = PLUGINS[name]["tool"]["setuptools"]["packages"]
    assert [path.name for path in (ROOT / "plugins" / name).iterdir() if (path / "__init__.py").exists()] == [package]
    for entries in project["entry-points"].values():
        for entry in entries.values():
            assert callable(EntryPoint("", entry, "").load()) and entry.startswith(f"{package}:")


def test_the_core_has_neither_their_extras_nor_their_entry_points():
    core = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert not {"vllm", "lmms-eval"} & set(core["optional-dependencies"])
    assert all(group.startswith("evoprune.") for group in core["entry-points"])


def test_an_entry_point_imports_neither_its_host_program_nor_torch():
    hosts = "{'vllm', 'lmms_eval', 'starlette', 'uvicorn', 'torch'}"
    code = f"import sys, evoprune, evoprune_vllm, evoprune_lmms_eval, evoprune_serve; assert not {hosts} & {{*sys.modules}}"
    folders = [str(ROOT / "plugins" / name) for name in PLUGINS]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path += {folders}; {code}"], check=True, cwd=ROOT)


def test_the_modules_of_a_server_s_settings_need_no_vllm():
    for name in ("positions", "pruning"):
        code = ast.parse((ROOT / f"plugins/vllm/evoprune_vllm/{name}.py").read_text("utf-8"))
        imported = [node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)]
        assert not [each for each in imported if each.startswith("vllm")]


def test_the_pinned_version_of_vllm_is_the_one_that_was_tested():
    assert f"vllm=={TESTED}.*" in PROJECTS["vllm"]["dependencies"]
    page = (ROOT / "docs/serving.md").read_text("utf-8")
    assert f"vLLM {TESTED}, the version that the plugin was tested with" in page


@pytest.fixture
def registered(monkeypatch):
    """What a version of vLLM is asked to register."""

    def with_version(version: str) -> dict[str, str]:
        found, stand_in = {}, ModuleType("vllm")
        stand_in.__version__ = version
        stand_in.ModelRegistry = SimpleNamespace(register_model=found.__setitem__)
        monkeypatch.setitem(sys.modules, "vllm", stand_in)
        settled = ModuleType("vllm.model_executor.models.config")
        settled.MODELS_CONFIG_MAP = found.setdefault("settled", {"Qwen3_5ForConditionalGeneration": object})
        monkeypatch.setitem(sys.modules, settled.__name__, settled)
        decoders, ours = ModuleType("vllm.multimodal.video_decoders"), ModuleType("evoprune_vllm.decoder")
        decoders._BACKEND_OPTION_DEFAULTS = found.setdefault("decoders", {"opencv": {}})
        ours.OPTIONS = {"num_ffmpeg_threads": 0}
        monkeypatch.setitem(sys.modules, "vllm.multimodal", ModuleType("vllm.multimodal"))
        monkeypatch.setattr(sys.modules["vllm.multimodal"], "video_decoders", decoders, raising=False)
        monkeypatch.setitem(sys.modules, ours.__name__, ours)
        monkeypatch.setattr(evoprune_vllm, "decoder", ours, raising=False)
        monkeypatch.setitem(sys.modules, f"{decoders.__name__}.{DECODER}", None)  # and away again after the test
        EntryPoint("", PROJECTS["vllm"]["entry-points"]["vllm.general_plugins"]["evoprune"], "").load()()
        return found

    return with_version


def test_it_registers_architectures_of_its_own_which_the_model_defines(registered):
    found = registered(f"{TESTED}.4+cpu")
    assert found.pop("decoders") == {"opencv": {}, DECODER: {"num_ffmpeg_threads": 0}}
    assert sys.modules[f"vllm.multimodal.video_decoders.{DECODER}"] is sys.modules["evoprune_vllm.decoder"]
    assert found.pop("settled")[f"{PREFIX}Qwen3_5ForConditionalGeneration"] is object
    assert set(found) == {f"{PREFIX}{family}ForConditionalGeneration" for family in FAMILIES}
    code = ast.parse((ROOT / "plugins/vllm/evoprune_vllm/model.py").read_text("utf-8"))
    defined = {node.name for node in code.body if isinstance(node, ast.ClassDef)}
    assert all(where == f"evoprune_vllm.model:{name}" and name in defined for name, where in found.items())


@pytest.mark.parametrize("version", ["0.3.2", "0.31.1", "1.0.0", "dev"])
def test_with_another_version_it_registers_nothing_and_logs_one_line(registered, caplog, version):
    with caplog.at_level(logging.WARNING):
        found = registered(version)
    assert [*found] == ["settled", "decoders"] and [*found["decoders"]] == ["opencv"]
    assert len(caplog.messages) == 1 and TESTED in caplog.text and version in caplog.text
