"""Every form of packing is run in a process of its own, and answers the same."""

import sys
from pathlib import Path

import pytest

from experiments.speed import packing
from tests.tiny import save_tiny

CLIP = Path(__file__).parents[3] / packing.CLIP


def test_forms_answer_the_same(tmp_path, monkeypatch, capsys):
    command = [str(save_tiny(tmp_path)), "--video", str(CLIP), "--tokens", "2,3", "--questions", "2", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", ["packing", *command])

    def here(form, args, tokens):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("START_PASSES", "PASS_BYTES"):
                patch.setattr(packing.linear, name, getattr(packing.linear, name))  # given back afterwards
            return packing.measure(form, args.checkpoint, args.video, args.budget, tokens, args.questions)

    monkeypatch.setattr(packing, "run", here)
    packing.main()
    said = capsys.readouterr().out
    assert [said.count(f"| {form} |") for form in packing.FORMS] == [4, 4, 4] and "different" not in said
