"""Run every command with a model in GGUF files."""

import json
from pathlib import Path

import pytest

from tests.gguf_files import Folder, add_to_ollama
from tests.quantized import parameters
from tests.tiny import save_tiny

CLIP = "samples/square.mp4"
Q = "What happens?"
COMMANDS = {
    "ask": [CLIP, Q, "-n", "2", "--json"],
    "batch": [CLIP, "-Q", Q, "-n", "2", "-o", "{}/rows.jsonl"],
    "find": [CLIP, "a green square", "--json"],
    "watch": [CLIP, "-Q", Q, "-n", "2", "--json"],
    "inspect": [CLIP, "--json"],
    "eval": ["--data", "{}/row.jsonl", "-b", "0.5", "--json", "-o", "{}/run"],
    "tune": [CLIP, "-Q", Q, "-b", "0.5", "--time-limit", "60", "--json"],
    "profile": ["--frames", "2", "--size", "56x56", "--repeat", "1", "--warmup", "0", "-b", "0.5", "--format", "json"],
    "verify": [CLIP, "--quick", "--json"],
}

UNDECIDED = ("tune",)  # because a single question proves nothing
ONE_RECORD = "ask", "inspect", "eval", "tune", "verify"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """The text file of a pair in 8 bits."""
    folder = tmp_path_factory.mktemp("gguf")
    return Folder(save_tiny(folder / "original")).write_pair(folder / "models", kind="Q8_0")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch, text):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "ollama"))
    add_to_ollama(tmp_path / "ollama", "tiny", [text, text.with_name("mmproj-tiny-f16.gguf")])


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_a_gguf_file(cli, text, command, tmp_path):
    (tmp_path / "row.jsonl").write_text(
        json.dumps({"video": str(Path(CLIP).absolute()), "question": Q, "answer": "green"})
    )
    result = cli(command, *(word.format(tmp_path) for word in COMMANDS[command]), "-m", text)
    assert result.code == (6 if command in UNDECIDED else 0), result.err
    if command in ONE_RECORD:
        assert result.record["error"] is None
        assert result.record["model"]["id"] in (str(text), None)


@pytest.mark.parametrize("quantize", parameters("none", "int8", "int4"))
def test_a_model_of_ollama_in_each_form(cli, quantize):
    result = cli("ask", CLIP, Q, "-n", "2", "-m", "ollama:tiny", "--quantize", quantize, "--json")
    assert result.code == 0, result.err
    assert (result.record["model"]["id"], result.record["model"]["quantize"]) == ("ollama:tiny", quantize)
