"""The steps of `experiments.speed.gpu` at a tiny size, and how it starts and stops them."""

import json
import os
import tarfile

import pytest

from experiments.speed import gpu, gpu_steps
from tests.threads import one_thread  # noqa: F401
from tests.tiny import save_tiny


def run_step(tmp_path, *arguments: str) -> dict:
    seconds = "1e6"  # since the module was imported, which other tests of this process may have done long ago
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
    hangs = gpu.Step("first", "hangs", ("-c", "import time; time.sleep(60)"))
    fails = gpu.Step("table", "fails", ("-c", "raise ValueError('no such kernel')"))
    works = "import sys; open(sys.argv[2], 'w').write('{\"rows\": []}')"
    (tmp_path / "work").mkdir()
    run = gpu.Run(tmp_path, tmp_path / "work")
    run.part([fails, gpu.Step("operations", "works", ("-c", works))], 20)
    run.part([hangs], 0.3)
    assert [each["state"] for each in run.done] == ["exit code 1", "done", "stopped"]
    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept[0]["output"][-1] == "ValueError: no such kernel" and kept[1]["found"] == {"rows": []}
    assert "ValueError: no such kernel" in (tmp_path / "gpu.txt").read_text()
    with tarfile.open(tmp_path / "gpu.tar.gz") as packed:
        names = packed.getnames()
    assert (
        names[:2] == ["gpu.json", "gpu.txt"] and "00-table-fails.txt" in names and "01-operations-works.json" in names
    )


def test_every_part_runs_at_the_size_of_the_demo(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu, "DRY_SECONDS", 300)  # the machine may be busy
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    gpu.main(["-o", str(tmp_path), "--dry"])
    done = json.loads((tmp_path / "gpu.json").read_text())
    assert [each["state"] for each in done] == ["done"] * len(gpu.dry_steps()), (tmp_path / "gpu.txt").read_text()
    shown = capsys.readouterr().out
    assert "0 differs" in shown and "HF+" in shown and "HF generate" in shown and "demo full" in shown
    decoded, plain = (each["found"] for each in done if each["part"] == "decoding")
    assert decoded["tokens"]["ours 1.0"] == plain["tokens"]["ours 1.0"] == decoded["tokens"]["HF"]
    assert "cumulative" in (tmp_path / "gpu.txt").read_text() and (tmp_path / "gpu.tar.gz").stat().st_size > 1000
