"""The distributions in plugins/: their metadata, and the effect of installing them on vLLM. Needs neither host program."""

import ast
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

import evoprune
from evoprune_vllm import FAMILIES, PREFIX

ROOT = Path(__file__).parents[2]
PLUGINS = {path.parent.name: tomllib.loads(path.read_text("utf-8")) for path in ROOT.glob("plugins/*/pyproject.toml")}
PROJECTS = {name: made["project"] for name, made in PLUGINS.items()}


def test_the_plugins_are_those_that_pytest_and_ruff_find():
    assert (
        sorted(PLUGINS)
        == ["lmms_eval", "mcp", "serve", "vllm"]
        == sorted(path.name for path in (ROOT / "plugins").iterdir())
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
    hosts = "{'vllm', 'lmms_eval', 'starlette', 'uvicorn', 'mcp', 'torch'}"
    plugins = ", ".join(f"evoprune_{name}" for name in PLUGINS)
    code = f"import sys, evoprune, {plugins}; assert not {hosts} & {{*sys.modules}}"
    folders = [str(ROOT / "plugins" / name) for name in PLUGINS]
    subprocess.run([sys.executable, "-c", f"import sys; sys.path += {folders}; {code}"], check=True, cwd=ROOT)


def test_the_modules_of_a_server_s_settings_need_no_vllm():
    for name in ("positions", "pruning"):
        code = ast.parse((ROOT / f"plugins/vllm/evoprune_vllm/{name}.py").read_text("utf-8"))
        imported = [node.module for node in ast.walk(code) if isinstance(node, ast.ImportFrom)]
        assert not [each for each in imported if each.startswith("vllm")]


def test_every_registered_architecture_is_a_class_of_the_model():
    code = ast.parse((ROOT / "plugins/vllm/evoprune_vllm/model.py").read_text("utf-8"))
    defined = {node.name for node in code.body if isinstance(node, ast.ClassDef)}
    assert {f"{PREFIX}{family}ForConditionalGeneration" for family in FAMILIES} <= defined
