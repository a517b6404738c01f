import torch

from experiments.speed import schemas


def test_tables(monkeypatch, capsys):
    threads = str(torch.get_num_threads())  # which the model sets
    arguments = ["--tokens", "12", "--repeat", "1", "--vocabulary", "1000", "--threads", threads]
    monkeypatch.setattr("sys.argv", ["schemas", *arguments])
    schemas.main()
    masks, answers = capsys.readouterr().out.strip().split("\n\n")
    names = [*schemas.CONSTRAINTS]
    for table, rows in ((masks, names), (answers, ["nothing", *names])):
        assert [line.split(" | ")[0].strip("| ") for line in table.splitlines()[2:]] == rows
    assert "+0.0%" in answers and "1,000 tokens" in masks
