"""Run `evoprune models`."""

import pytest

from tests.gguf_files import Folder
from tests.tiny import save_tiny


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("EVOPRUNE_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path


def test_a_machine_without_models(cli, places):
    (places / "models").mkdir()
    result = cli("models")
    assert (result.code, result.err) == (0, "")
    assert "The demo needs no download" in " ".join(result.out.split())
    assert cli("models", "--json").record == {"schema": "evoprune/models@1", "models": [], "error": None}


def test_a_missing_folder_is_reported_in_one_line(cli, places):
    result = cli("models", "--json")
    assert (result.code, result.err.count("\n")) == (0, 1)
    assert result.err.startswith("warning: EVOPRUNE_MODELS ") and result.err.endswith(f": {places / 'models'}\n")
    assert result.record["models"] == []


def test_a_listed_name_is_the_name_of_a_model(cli, places):
    text = Folder(save_tiny(places / "original")).write_pair(places / "models")
    (places / "models/other.gguf").write_bytes(b"GGUF")
    result = cli("models")
    assert (result.code, result.err) == (0, "")
    assert result.out.splitlines()[0] == str(text)
    assert "Qwen2.5-VL, EVOPRUNE_MODELS" in result.out and "; runs here" in result.out
    assert "1 other model cannot be run" in result.out
    first, second = cli("models", "--json").record["models"]
    assert (first["name"], first["runs"], first["problem"]) == (str(text), True, None)
    assert (second["runs"], "damaged" in second["problem"]) == (False, True)
    facts = cli("inspect", "-m", first["name"], "--json").record["model"]
    assert facts["files"] == [str(text), str(places / "models/mmproj-tiny-f16.gguf")]
    assert "frame rate and pixel limits of videos" in facts["assumed"]
    assert facts["folder"] is None
    assert cli("inspect", "--clear-cache").code == 0
    assert not any((places / "cache").rglob("config.json"))
