"""List the models on this machine."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from evoprune import VideoQA
from evoprune.errors import ModelError, ModelWarning
from evoprune.session import ModelOptions, describe
from evoprune.session.gguf import files
from tests.gguf_files import Folder, add_to_ollama, write_gguf
from tests.loading import load_model
from tests.tiny import save_tiny


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Use folders for all places in which models are found."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("EVOPRUNE_MODELS", os.pathsep.join([str(tmp_path / "more"), ""]))
    (tmp_path / "more").mkdir()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny") / "model")


def test_the_models_of_each_place(places, tiny):
    snapshot = places / "hub/models--someone--Qwen2.5-VL-Tiny/snapshots/abc"
    shutil.copytree(tiny, snapshot)
    for name, kind in (("bert", "bert"), ("Qwen2-VL-Partial", "qwen2_vl")):
        other = places / f"hub/models--x--{name}/snapshots/abc"
        other.mkdir(parents=True)
        (other / "config.json").write_text(json.dumps({"model_type": kind}))
    text = Folder(tiny).write_pair(places / "home/.lmstudio/models/publisher/Qwen2.5-VL-GGUF", kind="Q8_0")
    write_gguf(text.with_name("llama.gguf"), {"general.architecture": "llama"}, {})
    add_to_ollama(places / "ollama", "qwen2.5vl", [text, text.with_name("mmproj-tiny-f16.gguf")], tag="3b")
    shutil.copytree(tiny, places / "more/folder")
    (places / "more/bad.gguf").write_bytes(b"GGUF")
    found = {model.name: model for model in ModelOptions.on_this_machine()}
    runs = {
        "someone/Qwen2.5-VL-Tiny": "hub", str(text): "lmstudio", "ollama:qwen2.5vl:3b": "ollama",
        str(places / "more/folder"): "folder",
    }  # fmt: skip
    assert {name: found[name].place for name in runs} == runs
    for name in runs:
        model = found[name]
        assert (model.series, model.problem) == ("Qwen2.5-VL", None)
        assert model.disk_bytes > 0 and model.parameters > 0 and model.needed_bytes > 0
        if not name.startswith("someone"):
            assert describe(ModelOptions(name)).config
    parameters = {found[name].parameters for name in (str(text), "ollama:qwen2.5vl:3b")}
    assert parameters == {sum(each.numel() for each in Folder(tiny).tensors.values())}
    assert "llama" in found[str(text.with_name("llama.gguf"))].problem
    assert "damaged" in found[str(places / "more/bad.gguf")].problem
    assert found["x/Qwen2-VL-Partial"].problem
    assert "x/bert" not in found
    assert list(found)[: len(runs)] == [name for name in found if name in runs]  # the others come last


def test_a_model_that_needs_too_much_memory(places, tiny, monkeypatch):
    Folder(tiny).write_pair(places / "more")
    monkeypatch.setattr("evoprune.backend.Host.available_memory", lambda self: 1000)
    (model,) = ModelOptions.on_this_machine()
    assert "memory" in model.problem and model.series == "Qwen2.5-VL"


def test_a_folder_needs_as_much_memory_as_a_file_with_the_same_weights(places, tiny, monkeypatch):
    """Both run in 8 bits on a CPU. If that is too much, 4 bits may fit."""
    shutil.copytree(tiny, places / "more/folder")
    Folder(tiny).write_pair(places / "more/file", kind="Q8_0")
    first, second = ModelOptions.on_this_machine()
    assert (
        first.needed_bytes == pytest.approx(second.needed_bytes, rel=0.01)
        and first.needed_bytes < 1.5 * first.parameters
    )
    monkeypatch.setattr("evoprune.backend.Host.available_memory", lambda self: 0.9 * first.needed_bytes)
    for model in ModelOptions.on_this_machine():
        assert "; --quantize int4 needs about " in model.problem


def test_a_hundred_models_take_half_a_second(places, tiny):
    text = Folder(tiny).write_pair(places / "more/0")
    for number in range(1, 100):
        shutil.copytree(text.parent, places / f"more/{number}")
    ModelOptions.on_this_machine()
    files._short_header.cache_clear()
    start = time.process_time()
    assert len(ModelOptions.on_this_machine()) == 100
    assert time.process_time() - start < 0.5


def test_links_that_lead_in_circles_and_long_folders(places):
    (places / "more/a/b/c/d/e/f").mkdir(parents=True)
    (places / "more/a/loop").symlink_to(places / "more")
    assert ModelOptions.on_this_machine() == []


def test_an_unknown_name_is_answered_with_those_here(places, tiny):
    text = Folder(tiny).write_pair(places / "more/Qwen2.5-VL")
    with pytest.raises(ModelError) as caught:
        ModelOptions("qwen").local_folder()
    assert f"on this machine: {text}" in caught.value.hint


@pytest.mark.parametrize("name", ["qwen2.5vl", "qwen2.5vl:7b", "qwen3-vl", "llava:7b", "owner/qwen2.5vl:3b"])
def test_a_name_of_ollama_without_its_prefix(places, name):
    with pytest.raises(ModelError) as caught:
        ModelOptions(name).local_folder()
    assert f"a model of Ollama is ollama:{name}; " in caught.value.hint and "evoprune models " in caught.value.hint


@pytest.mark.parametrize(
    "name", ["demo2", "Qwen2.5-VL-3B-Instruct", "./qwen2.5vl:7b", "/models/qwen2.5vl", "a:b/c/d/e"]
)
def test_other_names_get_no_hint_on_ollama(places, name):
    with pytest.raises(ModelError) as caught:
        ModelOptions(name).local_folder()
    assert "ollama" not in caught.value.hint.lower()


def test_a_missing_folder_is_warned_of_once(places, monkeypatch):
    ModelOptions.on_this_machine()  # an existing folder, and an empty name
    (places / "file").touch()
    given = [str(places / name) for name in ("more", "missing", "file")]
    monkeypatch.setenv("EVOPRUNE_MODELS", os.pathsep.join(given))
    with pytest.warns(ModelWarning) as warned:
        ModelOptions.on_this_machine()
    assert [str(each.message).partition(": ")[2] for each in warned] == [", ".join(given[1:])]


def test_a_cached_repository_of_gguf_files_has_its_hub_id(places, tiny):
    name = "publisher/Qwen2.5-VL-3B-GGUF"
    repository = places / "hub/models--publisher--Qwen2.5-VL-3B-GGUF"
    text = Folder(tiny).write_pair(repository / "snapshots/abc123")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("abc123")
    (repository / "blobs").mkdir()
    for file in (text, text.with_name("mmproj-tiny-f16.gguf")):  # as the hub's library stores them
        file.rename(repository / "blobs" / file.name)
        file.symlink_to(f"../../blobs/{file.name}")
    (model,) = ModelOptions.on_this_machine()
    assert (model.name, model.place, model.problem) == (name, "hub", None)
    loaded = load_model(name)
    assert VideoQA(loaded).encode("samples/square.mp4", frames=2).ask("What?", max_new_tokens=1).text is not None
    assert loaded.id == name
    shutil.copy(text, text.with_name("other-F32.gguf"))
    names = [model.name for model in ModelOptions.on_this_machine()]
    assert names == [str(text.with_name("other-F32.gguf")), str(text)]
    with pytest.raises(ModelError, match="several models"):
        describe(ModelOptions(name))


@pytest.mark.parametrize("commit", ["../../..", "", "missing"])
def test_a_damaged_cache_of_the_hub(places, tiny, commit):
    repository = places / "hub/models--publisher--Qwen2.5-VL-3B-GGUF"
    Folder(tiny).write_pair(repository / "snapshots/abc")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    with pytest.raises(ModelError):
        describe(ModelOptions("publisher/Qwen2.5-VL-3B-GGUF", offline=True))


@pytest.mark.parametrize(("options", "local"), [({"offline": True}, False), ({}, True)])
def test_an_unknown_hub_id_is_answered_with_the_models_here(places, tiny, options, local):
    text = Folder(tiny).write_pair(places / "more/Qwen2.5-VL")
    with pytest.raises(ModelError) as caught:
        describe(ModelOptions("someone/Qwen2.5-VL-Unknown", **options), local=local)
    assert f"on this machine: {text}" in caught.value.hint


def test_the_list_is_made_without_torch(places):
    code = "import sys; from evoprune.session import ModelOptions; ModelOptions.on_this_machine(); print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert ran.stdout.strip() == "False"
