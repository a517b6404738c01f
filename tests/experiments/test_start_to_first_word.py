"""A checkpoint of a model's dimensions is written and can be asked; two checkouts take turns and give the same answer."""

import json
import sys
from pathlib import Path

import pytest

from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from experiments import checkpoint, start_to_first_word
from tests.tiny import tiny_config

CLIP = Path(__file__).parents[2] / "samples/square.mp4"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("written")
    tiny = tiny_config().to_dict()
    tiny["text_config"]["vocab_size"] = 700
    (folder / "config.json").write_text(json.dumps(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "WORDS", 600)
        patch.setitem(checkpoint.BUNDLED_CONFIGS, "tiny", folder / "config.json")
        checkpoint.write_checkpoint(folder / "checkpoint", "tiny")
    return folder / "checkpoint"


def test_a_checkpoint_has_every_weight_and_a_tokenizer_of_that_size(written):
    loaded = load_model(str(written), dtype="bf16")
    assert len(list(written.glob("*.safetensors"))) == 2 and not list(written.parent.glob("*.writing"))
    assert loaded.tokenizer.backend.get_vocab_size() == 600 + len(checkpoint.SPECIAL_TOKENS)
    text = "What colour is the square?"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    answer = VideoQA(loaded).encode(CLIP, frames=4).ask("What?", max_new_tokens=5)
    assert answer.text is not None and answer.report.tokens.new == 5  # no token ends an answer


@pytest.mark.slow
def test_two_checkouts_take_turns(written, monkeypatch, capsys):
    root = str(start_to_first_word.ROOT)
    command = [str(written), "--before", root, "--video", str(CLIP), "--frames", "4", "-n", "3", "-r", "1"]
    monkeypatch.setattr(sys, "argv", ["start_to_first_word", *command])
    start_to_first_word.main()
    out, err = capsys.readouterr()
    assert [line.partition(":")[0] for line in err.splitlines()] == ["before 0", "now 0", "before 1", "now 1"]
    assert "all answers are equal" in out and "| | before | now |" in out
    assert all(name in out for name in start_to_first_word.FIGURES)
