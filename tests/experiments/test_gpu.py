import json
import os

from experiments import gpu
from tests.threads import one_thread  # noqa: F401


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
