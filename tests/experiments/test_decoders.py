from evoprune.video.readers.pyav import MIN_JUMP_S
from evoprune.video.sandbox import isolation
from experiments import decoders


def test_tables(monkeypatch, capsys):
    monkeypatch.setattr(decoders, "CLIP_S", 1)
    monkeypatch.setattr(decoders, "CLIP_SIZE", (96, 128))
    monkeypatch.setattr(decoders, "LONG_SIZE", (48, 64))
    monkeypatch.setattr("sys.argv", ["benchmark", "--minutes", "0.1", "--repeat", "1"])
    decoders.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1 + isolation.POSSIBLE
    assert sum("MPEG-4" in line for line in rows) == 2 + 2 * isolation.POSSIBLE
    assert sum("cheaper" in line for line in lines) == 2
    from evoprune.video.readers import pyav

    assert pyav.MIN_JUMP_S == MIN_JUMP_S


def test_crossover():
    assert "every 3.0 s, or 1.33%" in decoders.crossover([(4.0, 0.5), (2.0, 1.5)])
    assert decoders.crossover([(4.0, 0.5), (2.0, 0.9)]) == "Jumps are cheaper throughout."
    assert decoders.crossover([(4.0, 1.5), (2.0, 1.9)]) == "One pass is cheaper throughout."
