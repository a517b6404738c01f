"""Test the training of a layer for multi-token prediction, and that evoprune computes the same as during training."""

import sys

import pytest
import torch
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration

from evoprune.session import load_model
from experiments.demo import train_mtp
from experiments.demo.train_mtp import Mtp, MtpRecipe, text_of, train
from tests.language import drafts


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            train_mtp, "in_worker", lambda make, *args: make(*args)
        )  # a worker would leave a signal handler behind
        train(folder, MtpRecipe(steps=2, mtp_steps=2, batch=2))
    return folder


def test_the_text_of_a_clip_has_the_answer():
    prompt, answer = text_of("heldout", 3, ("describe",))
    assert "cross, flashes, up, purple, small\nring, appears, down, purple, small\n" in prompt
    assert answer == "A small purple cross moves up and flashes. A small purple ring moves down and appears."


def test_evoprune_predicts_the_same_as_during_training(folder):
    model = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    text = model.model.language_model
    loaded = load_model(str(folder), dtype="fp32", pack=False)
    layer = Mtp(text.config)
    layer.load_state_dict(loaded.model.mtp.state_dict())
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("".join(text_of("heldout", 3))).input_ids])
    columns = ids.shape[1] - 1
    positions = torch.arange(columns).expand(3, -1)
    with torch.no_grad():
        hidden = text(inputs_embeds=text.embed_tokens(ids)).last_hidden_state[:, :-1]
        places = text.rotary_emb(hidden, positions[:, None])
        expected = layer(text.embed_tokens(ids[:, 1:]), hidden, places)[0, -1] @ text.embed_tokens.weight.T
    made = loaded.language.mtp_layer().logits(hidden[0], ids[0, 1:], positions)
    torch.testing.assert_close(made, expected, rtol=1e-3, atol=1e-4)


def test_the_measurement(folder, monkeypatch, capsys):
    for kind in (drafts.PrefillState, drafts.Lookup, drafts.mtp_drafter.MtpDrafter):
        for name in {"read", "draft", "verified"} & vars(kind).keys():
            monkeypatch.setattr(kind, name, getattr(kind, name))  # is restored after the test
    monkeypatch.setattr(drafts, "NEW", 20)
    monkeypatch.setattr(sys, "argv", ["drafts", str(folder), "--questions", "2"])
    drafts.main()
    lines = capsys.readouterr().out.splitlines()
    rows = [[part.strip() for part in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    assert [row[0] for row in rows[2:6]] == [*drafts.DRAFTERS]
    assert {row[1] for row in rows[2:6]} == {rows[2][1]} and {row[-1] for row in rows[2:6]} == {"2 of 2"}
    assert [row[0] for row in rows[8:]] == [*drafts.READ]
