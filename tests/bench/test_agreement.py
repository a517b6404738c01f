"""Test the agreement along the unpruned model's answers against distributions that are computed in full."""

from dataclasses import replace

import pytest
import torch

from evoprune.bench import agreement as made
from evoprune.bench.agreement import Agreement, Reference
from evoprune.session import load_model
from evoprune.video_qa import VideoQA

CLIP, QUESTION = "samples/square.mp4", "What happens?"


@pytest.fixture(scope="module")
def loaded(saved):
    return load_model(str(saved), dtype="fp32", pack=False)


@pytest.fixture(scope="module")
def full(loaded):
    return VideoQA(loaded, budget=1.0, method="none").encode(CLIP, frames=4)


@pytest.fixture(scope="module")
def ids(full):
    answer = full.ask(QUESTION, max_new_tokens=6)
    assert answer.text and len(answer.ids) == answer.report.tokens.new > 3
    return answer.ids


def test_logits_along_an_answer_choose_it(full, ids):
    logits, seconds = full.read_along(QUESTION, ids)
    assert logits.argmax(1).tolist() == ids and logits.dtype == torch.float32 and seconds > 0
    assert full.ask(QUESTION, max_new_tokens=6).ids == []  # nothing is generated before the iterator is read
    shorter, _ = full.read_along(QUESTION, ids[:2])
    torch.testing.assert_close(shorter, logits[:2])


@pytest.mark.parametrize("method", ["evoprune", "random", "cdpruner"])
@pytest.mark.parametrize("kept", [16, 10**6])
def test_a_pruned_model(loaded, full, ids, method, kept, monkeypatch):
    monkeypatch.setattr(made, "KEPT", kept)
    pruned = VideoQA(loaded, budget=0.2, method=method).encode(CLIP, frames=4)
    found = Reference.of(full, QUESTION, ids, ended=False).agreement(pruned)
    p, q = (video.read_along(QUESTION, ids)[0].double().log_softmax(1) for video in (full, pruned))
    whole = (p.exp() * (p - q)).sum(1)
    assert found.agrees.tolist() == (p.argmax(1) == q.argmax(1)).tolist()
    assert float(whole.max()) > 1e-3
    if kept > p.shape[1]:
        torch.testing.assert_close(found.kl.double(), whole, atol=1e-5, rtol=1e-3)
    assert ((found.kl > 0) & (found.kl <= whole + 1e-5)).all()


def test_what_is_recorded_of_it():
    found = Agreement(torch.tensor([True, False, True]), torch.tensor([0.0, 0.0, 3.0]), 0.1).record()
    assert found == {"tokens": 3, "agree": 2, "kl": 1.0, "kl_p95": pytest.approx(2.7)}


def test_the_unpruned_model_agrees_with_itself_and_the_end_of_an_answer_counts(full, ids):
    """An answer cut before a token that the model would add: the model disagrees that the answer ends there."""
    for given, count in ((ids, len(ids)), ([], 1)):  # without tokens, only the end of the answer is compared
        found = Reference.of(full, QUESTION, given, ended=False).agreement(full)
        assert len(found.agrees) == count and found.agrees.all() and float(found.kl.max()) < 1e-5
    told = Reference.of(full, QUESTION, ids, ended=False, system="Be brief.")
    assert float(told.agreement(full).kl.max()) < 1e-5  # under the same system prompt
    ended = Reference.of(full, QUESTION, ids[:3], ended=True)
    assert len(ended.ids) == 4 and ended.tokens[:, 0].tolist() == ids[:4] and ended.agreement(full).agrees.all()
    other = replace(ended, tokens=torch.cat([ended.tokens[:3], ended.tokens[3:].flip(1)])).agreement(full)
    assert other.agrees.tolist() == [True, True, True, False]
