from evoprune.video.sandbox import isolation
from experiments.speed import decoders


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(decoders, "CLIP_S", 1)
    monkeypatch.setattr(decoders, "CLIP_SIZE", (96, 128))
    monkeypatch.setattr("sys.argv", ["benchmark", "--repeat", "1"])
    decoders.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 + isolation.POSSIBLE
    assert sum("MPEG-4" in line for line in rows) == 2 + 2 * isolation.POSSIBLE
