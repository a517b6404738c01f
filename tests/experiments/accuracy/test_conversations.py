"""experiments.accuracy.conversations: right answers to one question of each clip, alone and after others."""

import sys

from experiments.accuracy import conversations


def test_a_row_for_a_model(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["conversations", "--world", "shapes", "--clips", "2"])
    conversations.main()
    title, _, row = capsys.readouterr().out.splitlines()
    model, clips, *right = [cell.strip() for cell in row.strip("|").split("|")]
    assert title.count("after") == len(right) == len(conversations.TURNS)
    assert (model, clips) == ("`demo`", "2") and all(0 <= int(count) <= 2 for count in right)
