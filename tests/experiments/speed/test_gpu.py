"""The steps of `experiments.speed.gpu` at a tiny size, and how it starts and stops them."""

import json
import os

import pytest

from experiments.speed import gpu, gpu_steps
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny


def run_step(tmp_path, *arguments: str) -> dict:
    seconds = "1e6"  # since the import of the module, which may be long ago in this process
    gpu_steps.main(
        [*arguments, "--device", "cpu", "--rounds", "1", "--seconds", seconds, "-o", str(tmp_path / "found.json")]
    )
    return json.loads((tmp_path / "found.json").read_text())


@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_a_varlen_call_in_the_tower_of_transformers_gives_what_its_loop_over_windows_gives(kind, tmp_path, saved):
    folder = saved if kind == "qwen2_5_vl" else save_tiny(tmp_path / "model", family=kind)
    found = run_step(tmp_path, "table", "-m", str(folder), "--cases", "4x112x168")
    rows = {row["row"]: row for row in found["rows"]}
    assert [*rows] == ["HF", "HF+", "ours 1.0", "evoprune 0.25", "evoprune:inner=always 0.25", "divprune 0.25"]
    assert rows["HF"]["first_tokens"] == rows["HF+"]["first_tokens"] == rows["ours 1.0"]["first_tokens"]
    assert [row["tokens"] for row in rows.values()] == [48, 48, 48, 12, 12, 12]
    assert rows["ours 1.0"]["vs_full"] == 1 and rows["HF+"]["vs_hf"] > 0


def test_a_step_that_fails_or_hangs_does_not_end_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "SPARE", 0.0)
    small = ("-m", "demo", "--device", "cpu", "--rounds", "1", "--cases", "4x56x84")
    fails = gpu.Step("table", "fails", ("-m", "no-such-model", "--device", "cpu"))
    done = gpu.run_part([fails, gpu.Step("table", "works", small)], 200, tmp_path)
    done += gpu.run_part([gpu.Step("first", "hangs", small)], 0.3, tmp_path)
    assert [each["state"].partition(":")[0] for each in done] == ["exit code 1", "done", "stopped"]
    assert "no-such-model" in (tmp_path / "table-fails.txt").read_text() and done[1]["found"]["rows"]
    page = gpu.document(done)
    assert "- works: done" in page and "| works | 4x56x84 | HF+ |" in page


def test_every_part_runs_at_the_size_of_the_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu, "DRY_SECONDS", 300)  # the machine may be busy
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    gpu.main(["-o", str(tmp_path), "--dry"])
    page = (tmp_path / "gpu.md").read_text()
    assert page.count(": done") == len(gpu.dry_steps()), page
    shown = capsys.readouterr().out
    assert "HF+" in shown and "HF generate" in shown and "demo full" in shown
    decoded, plain = (json.loads((tmp_path / f"decoding-demo{name}.json").read_text()) for name in ("", "-plain"))
    assert decoded["tokens"]["ours 1.0"] == plain["tokens"]["ours 1.0"] == decoded["tokens"]["HF"]


@pytest.mark.parametrize("more", [("--parts", "talking"), ("--seconds", "table=soon"), ("--seconds", "talking=3")])
def test_what_cannot_be_run_is_refused(more, capsys):
    with pytest.raises(SystemExit):
        gpu.parsed(["-o", "a", *more])
