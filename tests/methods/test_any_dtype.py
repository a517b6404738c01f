"""Every method in host programs with another default dtype or default device, and under torch's autocast."""

from contextlib import contextmanager
from functools import cache

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.contrib.attended import Mmr
from evoprune.methods.base import Merger
from evoprune.methods.types import Selection
from evoprune.model.config import MODEL_TYPES
from evoprune.session.loading.model import load_model
from evoprune.video_qa import VideoQA
from tests.methods.kinds import one_of_each
from tests.prompts import processed
from tests.quantized import SOME
from tests.tiny import tiny_model

NAMES = [*methods.built_in(), "reuse+visionzip", "evoprune+fastv"]
ON_PATCHES = [name for name in NAMES if methods.parse(name).acts != "input" and not methods.parse(name).language]
ALONE = [name for name in ON_PATCHES if not methods.parse(name).reads_question]
OTHERS = [name for name in NAMES if name not in ALONE]
CHOOSING = [
    name for name in ON_PATCHES if methods.parse(name).tokens or isinstance(methods.parse(name).encoder, Merger)
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HALVES = ["bf16", "fp16"]
BUDGETS = (1.0, 0.25)


@contextmanager
def host(name: str):
    """A program that has another default dtype, or a default device that holds no values."""
    try:
        if name == "meta":
            torch.set_default_device("meta")
        else:
            torch.set_default_dtype(DTYPES[name])
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_default_device(None)


def autocast(name: str):
    return torch.autocast("cpu", dtype=DTYPES[name])


@cache
def model(family: str = "qwen2_5_vl"):
    return tiny_model(family=family).requires_grad_(False)


@cache
def load(folder, default: str | None):
    """A model that was loaded under another default."""
    return load_model(str(folder), dtype="fp32", quantize=SOME)


@cache
def prompt(family: str = "qwen2_5_vl") -> dict:
    return processed(model(family), (5, ("video", 6, 8, 12), 7), (3, ("video", 2, 4, 4), 9))


@cache
def question() -> torch.Tensor:
    return model().get_input_embeddings()(torch.tensor([5, 9, 40]))


def encode(name: str, budget: float, family: str = "qwen2_5_vl"):
    inputs = prompt(family)["pixel_values_videos"], prompt(family)["video_grid_thw"]
    how = {"budget": budget, "method": name, "question": question()}
    return evoprune.encode(model(family), *inputs, **how)


@torch.no_grad()
def logits(name: str, budget: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the last columns in a pruned Hugging Face model; and the columns that are left."""
    with evoprune.EvoPrune(budget=budget, method=name)(model()) as run:
        return model()(**prompt(), logits_to_keep=3).logits, run.columns.index


def moved(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


def assert_equal_encodings(made, expected) -> None:
    for field in ("features", "kept", "rows", "owner", "size", "deepstack"):
        a, b = getattr(made, field), getattr(expected, field)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), field
    assert made.kept_per_pair == expected.kept_per_pair


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(other, marks=pytest.mark.full) for other in MODEL_TYPES[1:])]
)
@pytest.mark.parametrize("name", one_of_each(ON_PATCHES))
def test_the_encoding_is_the_same_whatever_the_default(name, family):
    for budget in BUDGETS:
        expected = encode(name, budget, family)
        for default in (*DTYPES, "meta"):
            with host(default):
                assert_equal_encodings(encode(name, budget, family), expected)


@pytest.mark.few(2)
@pytest.mark.parametrize("name", one_of_each(ALONE))
def test_the_logits_of_a_pruned_hugging_face_model_are_the_same_whatever_the_default(name):
    for budget in BUDGETS:
        expected, columns = logits(name, budget)
        for default in DTYPES:
            with host(default):
                made, left = logits(name, budget)
            assert torch.equal(left, columns) and torch.equal(made, expected), (budget, default)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", one_of_each(["evoprune", "reuse+visionzip", "tome", *OTHERS])
)  # the encodings of all are compared above
def test_video_qa_answers_the_same_whatever_the_default_and_under_autocast(name, saved):
    def answered(loaded):
        video = VideoQA(loaded, budget=0.25, method=name).encode("samples/arrivals.webm", frames=4)
        return video.ask("What happens?", max_new_tokens=2).text, video.encoded

    text, expected = answered(load(saved, None))
    for default in ("bf16", "meta"):
        with host(default):
            made, encoded = answered(load(saved, default))
        assert made == text
        assert_equal_encodings(encoded, expected)
    with autocast("bf16"):
        made, encoded = answered(load(saved, None))
    assert made == text
    assert_equal_encodings(encoded, expected)


@pytest.mark.few(4)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", one_of_each(CHOOSING))
def test_a_method_chooses_from_the_same_rows_as_without_autocast(name, half, monkeypatch):
    method, calls = methods.parse(name), []
    kind, call = (type(method.tokens), "select") if method.tokens else (type(method.encoder), "match")
    choose = getattr(kind, call)

    def seen(*args):
        calls.append((args, choose(*args)))
        return calls[-1][1]

    monkeypatch.setattr(kind, call, seen)
    with autocast(half):
        made = encode(name, 0.25)
    assert calls and made.features.dtype == DTYPES[half] and len(made.kept) == len(encode(name, 0.25).kept)
    for args, chosen in calls[:8]:
        with torch.inference_mode():
            again = choose(*args)
        if call == "match":
            assert args[1].features.dtype == torch.float32 and torch.equal(again, chosen)
            continue
        assert all(x.dtype == torch.float32 for x in args[1].given.values())
        for field in ("kept", "owner", "weight", "size"):
            a, b = getattr(again, field), getattr(chosen, field)
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), field


def test_the_attention_received_is_summed_in_float32_under_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(Mmr, "select", lambda _, tokens, keep: seen.append(tokens) or Selection(torch.arange(keep)))
    with autocast("fp16"):
        encode("mmr", 0.25)
    for tokens in seen:  # shares of a frame pair, 1 on average
        mean = tokens.attention.view(tokens.grid[0], -1).mean(1)
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("family", MODEL_TYPES)
def test_at_full_budget_the_tower_under_autocast_is_hugging_faces(family, half):
    inputs = prompt(family)["pixel_values_videos"], prompt(family)["video_grid_thw"]
    exact = torch.cat(model(family).model.get_video_features(*inputs).pooler_output)
    with autocast(half):
        theirs = torch.cat(model(family).model.get_video_features(*inputs).pooler_output)
        made = encode("evoprune", 1.0, family).features
    assert made.dtype == theirs.dtype == DTYPES[half]
    assert moved(made, theirs) < 1.5 * moved(theirs, exact) < 0.02


@pytest.mark.parametrize("half", ["bf16", pytest.param("fp16", marks=pytest.mark.full)])
@pytest.mark.parametrize("name", one_of_each(ALONE))
def test_autocast_moves_the_logits_no_further_than_hugging_faces_own(name, half):
    """Where the rows, which are rounded, still lead to the same choice; among nearly equal rows they may not."""
    exact, columns = logits(name, 0.25)
    expected, whole = encode(name, 0.25), logits("none", 1.0)[0]
    with autocast(half):
        (made, left), theirs = logits(name, 0.25), logits("none", 1.0)[0]
        chosen = encode(name, 0.25)
    assert left.shape == columns.shape and made.isfinite().all()
    if torch.equal(left, columns) and torch.equal(chosen.owner, expected.owner):
        assert moved(made, exact) < 2 * moved(theirs, whole) < 0.02
