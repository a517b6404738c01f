"""Encodings, answers, selections and decoding in a CUDA graph give the same results as on the CPU. Run with `-m cuda`."""

import pytest
import torch

from evoprune.bench.shared import TimeLimit
from evoprune.bench.verify.checks import accelerated
from evoprune.bench.verify.run import subject_of, verify
from evoprune.bench.verify.subject import DIFFERS, INSIDE
from evoprune.model import FAMILIES
from evoprune.session import load_model
from evoprune.video_qa import VideoQA
from tests.tiny import NATIVE, save_tiny

pytest.importorskip("triton")
from evoprune.backend import kernels

pytestmark = pytest.mark.cuda

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture(scope="module")
def devices():
    """Return the demo model on the CPU and on the device that `auto` selects."""
    return load_model("demo", device="cpu"), load_model("demo", dtype="fp32", pack=False)


def test_auto_takes_the_gpu(devices):
    assert [loaded.device.partition(":")[0] for loaded in devices] == ["cpu", "cuda"]


@pytest.mark.parametrize(
    ("budget", "on_cpu", "on_gpu"),
    [(1.0, "evoprune", "evoprune"), (0.25, INSIDE, INSIDE), (0.25, "evoprune:depth=1:reuse=0", "evoprune")],
)
def test_an_encoding_and_an_answer_are_those_of_the_cpu(devices, budget, on_cpu, on_gpu):
    """By default, the GPU prunes this clip only after the tower, because it is small."""
    methods = on_cpu, on_gpu
    here, there = (
        VideoQA(loaded, budget=budget, method=name).encode(CLIP) for loaded, name in zip(devices, methods, strict=True)
    )
    kept, there_kept = ({*each.encoded.kept.tolist()} for each in (here, there))
    assert len(there_kept) == len(kept)
    assert len(kept - there_kept) <= 0.05 * len(kept)  # distances that are equal except for rounding
    if kept == there_kept:
        features = there.encoded.features.cpu()
        torch.testing.assert_close(features, here.encoded.features, rtol=2e-3, atol=2e-3 * float(features.abs().max()))
    small = 1 if budget < 1 and on_gpu == "evoprune" else None
    assert there.report.pruning.after_tower_inputs == small and here.report.pruning.after_tower_inputs is None
    answers = [each.ask(QUESTION, max_new_tokens=8) for each in (here, there)]
    assert answers[0].text == answers[1].text == "green"
    assert answers[1].report.memory.peak_bytes > 0 and answers[1].report.model.device.startswith("cuda")


@pytest.mark.parametrize(("budget", "method"), [(1.0, "evoprune"), (0.25, "evoprune"), (0.25, INSIDE)])
def test_without_graphs_and_kernels_the_tokens_are_the_same(devices, budget, method, monkeypatch):
    video = VideoQA(devices[1], budget=budget, method=method).encode(CLIP)
    long = {"max_new_tokens": 24, "temperature": 1.0, "seed": 3}  # sampling, so that the answer does not end at once
    answer = video.ask("What happens in the clip?", **long)
    text = answer.text
    monkeypatch.setenv("EVOPRUNE_PLAIN", "1")
    plain = VideoQA(devices[1], budget=budget, method=method).encode(CLIP)
    assert {*plain.encoded.kept.tolist()} == {*video.encoded.kept.tolist()}
    assert plain.ask("What happens in the clip?", **long).text == text


def test_verify_holds(devices):
    with subject_of(devices[1], None) as subject:
        *_, results = verify(subject, TimeLimit(240), quick=True)
    assert not [(found.check.name, found.outcome.says) for found in results.of("differs")]
    assert results.verdict == "held"


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in NATIVE])
def test_verify_holds_where_transformers_runs_the_language_model(family, tmp_path):
    loaded = load_model(str(save_tiny(tmp_path / family, family=family)), dtype="fp32")
    assert loaded.device.startswith("cuda")
    with subject_of(loaded, None) as subject:
        *_, results = verify(subject, TimeLimit(240), quick=True)
    assert not [(found.check.name, found.outcome.says) for found in results.of("differs")]


def test_a_kernel_that_computes_something_else_is_found(devices, monkeypatch):
    real = kernels.nearest_selected
    monkeypatch.setattr(kernels, "nearest_selected", lambda *args: real(*args).flip(0))
    with subject_of(devices[1], None) as subject:
        outcome = accelerated(subject)
    assert outcome.state == DIFFERS and "clusters unlike" in outcome.says
