"""Every command on a Qwen3-VL with random weights."""

import json

import pytest

from tests.tiny import save_tiny

CLIP, LONG = "samples/square.mp4", "samples/arrivals.webm"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("qwen3") / "model", family="qwen3_vl")


@pytest.fixture
def qwen3(cli, folder):
    """A command on that model, in fp32."""
    return lambda command, *args: cli(command, *args, "-m", folder, "--dtype", "fp32")


def test_batch_and_eval(qwen3, tmp_path):
    out = tmp_path / "out.jsonl"
    assert qwen3("batch", CLIP, LONG, "-Q", "What happens?", "-n", "2", "-o", out).code == 0
    assert [json.loads(line)["finish_reason"] for line in out.read_text().splitlines()] == ["length"] * 2
    how = "--limit", "2", "-b", "0.5", "--method", "evoprune,tome,divprune,fastv", "-n", "2", "--frames", "4"
    result = qwen3("eval", "--data", "samples/questions.jsonl", *how)
    assert result.code == 0 and "fastv -b 0.5" in result.out


@pytest.mark.full
def test_inspect(qwen3, cli, tmp_path):
    facts = qwen3("inspect", CLIP, "--json").record
    height, width = facts["plan"]["resized_hw"]
    assert height % 32 == width % 32 == 0 and facts["plan"]["visual_tokens"] == 6 * (height // 32) * (width // 32)
    picture = tmp_path / "fates.png"
    assert qwen3("inspect", CLIP, "--overlay", picture, "-b", "0.2").code == 0 and picture.stat().st_size
    for size, billions in (("2B", 2.1), ("4B", 4.4), ("8B", 8.8)):
        facts = cli("inspect", CLIP, "-m", f"Qwen/Qwen3-VL-{size}-Instruct", "--json").record
        assert facts["model"]["parameters"] / 1e9 == pytest.approx(billions, abs=0.05)
        assert facts["plan"]["grid"][1:] == [4, 5]


def test_profile_takes_units_of_32_pixels(qwen3, monkeypatch):
    monkeypatch.setattr("evoprune.bench.profile.matmul_rate", lambda *_, **__: 1e11)
    how = "-r", "1", "-w", "0", "-b", "0.25", "--frames", "4", "--method", "evoprune,fastv", "--synthetic", "static90"
    result = qwen3("profile", *how)
    assert (
        result.code == 0
        and "4 frames of 256x384: 192 units" in result.out
        and "adds 8 tokens for its time" in result.out
    )
    assert "not a whole number of merge units" in qwen3("profile", *how, "--size", "224x336").err


@pytest.mark.full
def test_tune_finds_a_setting_that_is_used(qwen3):
    how = "--frames", "4", "-b", "0.2", "-Q", "What happens?", "--agree", "0.01"
    options = qwen3("tune", CLIP, LONG, *how, "--json").record["options"]
    found = "-b", str(options["budget"]), "--method", options["method"]
    answer = qwen3("ask", CLIP, "What?", "--frames", "4", *found, "-n", "2", "--json")
    assert answer.record["pruning"]["method"] == options["method"]
