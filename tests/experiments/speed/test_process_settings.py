"""experiments.speed.process_settings: every setting encodes in a process of its own."""

from experiments.speed import process_settings


def test_a_table_of_all_settings(capfd, monkeypatch):
    names = ["as Python has them", "kept, spin 10,000, thread, ended (watch)"]
    monkeypatch.setattr(process_settings, "SETTINGS", {name: process_settings.SETTINGS[name] for name in names})
    process_settings.main(["--frames", "4", "--windows", "2", "--rounds", "1"])
    rows = [line.strip("| ").split(" | ") for line in capfd.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == names
    assert all(float(row[1].split()[0]) >= 0 and float(row[2]) > 0 for row in rows)
