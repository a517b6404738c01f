"""`evoprune verify`: its output, exit codes and files."""

import json
import platform
import shutil

import huggingface_hub
import pytest

from evoprune.bench.verify.run import render
from evoprune.bench.verify.subject import QUESTION
from tests.bench.faults import FAULTS

NAMES = ("weights", "positions", "tower", "logits", "answer", "counts")


@pytest.mark.full
def test_a_line_for_each_check_and_a_verdict(cli):
    result = cli("verify", "-m", "demo", "--quick")
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert lines[0].startswith("demo, fp32, cpu: ") and all(len(line) <= 80 for line in lines)
    for name in NAMES:
        assert [line for line in lines if line.startswith(f"held     {name} ")]
    assert "held, 0 differs, " in lines[-2] + lines[-1] or "held, 0 differs" in result.out
    assert "with this model, this machine computes the same results as transformers" in " ".join(result.out.split())


def test_one_thread_is_one():
    env = {"device_name": "a CPU", "evoprune": "0", "torch": "2", "transformers": "5", "threads": 1}
    document = {"model": {"id": "m", "dtype": "fp32", "device": "cpu"}, "env": env, "checks": [], "seconds": 1.0}
    assert "transformers 5, 1 thread\n" in render(
        document | {"verdict": "held", "held": 1, "differs": 0, "skipped": 0}, 80
    )


def test_a_difference_has_an_exit_code_of_its_own(cli, monkeypatch, tmp_path):
    FAULTS["columns off by one"].plant(monkeypatch)
    result = cli("verify", "-m", "demo", "--quick", "--json", "-o", tmp_path / "report.json")
    assert result.code == 7 and result.record["verdict"] == "differs" and result.record["error"] is None
    assert json.loads((tmp_path / "report.json").read_text()) == result.record
    (found,) = [check for check in result.record["checks"] if check["name"] == "positions"]
    assert found["state"] == "differs" and found["figures"]["wrong"] > 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (("-m", "no-such-model"), 4),
        (("gone.mp4", "-m", "demo"), 3),
        (("--device", "abacus"), 2),
        (("-m", "demo", "--device", "meta"), 2),
        (("-o", "no/such/x"), 2),
    ],
)
def test_what_cannot_be_verified_is_an_error(cli, args, code):
    result = cli("verify", *args, "--json")
    assert result.code == code and result.record["error"]["code"] == code and result.err.startswith("error: ")


@pytest.mark.full
def test_a_model_of_the_hub_is_not_named(cli, tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    shutil.copytree(tiny_folder, tmp_path / "models--org--tiny" / "snapshots" / ("a" * 40))
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("a" * 40)
    result = cli("verify", "-m", "org/tiny", "--offline", "--quick", "-o", tmp_path / "report.json")
    written = (tmp_path / "report.json").read_text()
    assert result.code == 0 and json.loads(written)["model"]["id"] is None
    assert not [secret for secret in ("org/tiny", str(tmp_path), platform.node(), QUESTION) if secret in written]


def test_what_was_found_before_an_interrupt_is_told(cli, monkeypatch, tmp_path):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("evoprune.bench.verify.checks.model_positions", interrupted)
    result = cli("verify", "-m", "demo", "--quick", "-o", tmp_path / "report.json")
    record = json.loads((tmp_path / "report.json").read_text())
    assert result.code == 130 == record["error"]["code"]
    assert [check["name"] for check in record["checks"]] == ["weights"]
    assert [line for line in result.out.splitlines() if line.startswith("held     weights ")]


@pytest.mark.full
def test_a_traceback_of_what_a_check_raised(cli, monkeypatch):
    def broken(*_):
        raise ZeroDivisionError("1/0")

    monkeypatch.setattr("evoprune.language.prompt.video_positions", broken)
    result = cli("verify", "-m", "demo", "--quick", "--debug")
    assert result.code == 7 and "ZeroDivisionError: 1/0" in result.err and "Traceback" in result.err
    assert "Traceback" not in cli("verify", "-m", "demo", "--quick").err
