"""Test what must hold for every method: counts, ties, chunks, the host program's dtypes and devices, and autocast."""

import os
import subprocess
import sys
from contextlib import contextmanager
from functools import cache
from math import prod

import pytest
import torch

import evoprune
from evoprune import methods
from evoprune.contrib.mmr import Mmr
from evoprune.methods.merger import Merger
from evoprune.methods.types import Selection
from evoprune.model import FAMILIES
from evoprune.session import load_model
from evoprune.video_qa import VideoQA
from tests.methods.kinds import one_of_each
from tests.methods.tokens import AFTER, KINDS, Largest, encoded, selected, tokens_of
from tests.prompts import processed
from tests.quantized import SOME
from tests.tiny import tiny_model
from tests.vision.clips import changes, clip

GRID = (5, 4, 5)
QUESTION = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))


@pytest.mark.few(3)
@pytest.mark.parametrize("name", AFTER)
def test_the_result_does_not_depend_on_the_chunk_size(name):
    args = methods.MethodChain.parse(name), clip(GRID, changes(GRID, 0.4)), GRID, 23
    whole, *others = (encoded(*args, question=QUESTION, piece_units=size) for size in (10**6, 1, 40))
    for other in others:
        assert torch.equal(other.kept, whole.kept)
        torch.testing.assert_close(other.features, whole.features, atol=2e-5, rtol=1e-5)


@pytest.mark.few(15)
@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("kind", ["random", "constant", "duplicates"])
def test_nothing_is_drawn_and_every_tensor_is_made_beside_the_tokens(name, kind):
    """The method does not use the global random generator, and creates no tensors on the default device.

    The test makes meta the default device, whose tensors cannot be combined with the tokens.
    """
    tokens, made = tokens_of(kind, GRID), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        made.append(selected(name, tokens, 23))
        assert torch.equal(before, torch.get_rng_state())
    assert made[0] == made[1]
    if name == "pool":
        return
    with torch.device("meta"):
        found = methods.get(name).select(tokens, 23)
        assert found.features(tokens.features).device.type == "cpu"
    assert found.kept.tolist() == made[0]


INDEXED = ["divprune", "evs-nofloor", "mmr", "scope", "dart"]
IN_EACH_PAIR = ["cdpruner", "vidcom2", "visionzip"]


@pytest.mark.parametrize("name", INDEXED + IN_EACH_PAIR)
@pytest.mark.parametrize("kind", ["constant", "zero"])
def test_equal_tokens_go_by_index(name, kind):
    """The first tokens in the video or in each frame pair are selected. Other methods spread equal tokens as their papers say."""
    kept = selected(name, tokens_of(kind, (3, 4, 5)), 6)
    assert kept == ([0, 1, 2, 3, 4, 5] if name in INDEXED else [0, 1, 20, 21, 40, 41])


@pytest.mark.full
def test_nothing_depends_on_hashes():
    code = (
        "from tests.methods.tokens import AFTER, selected, tokens_of\n"
        "print([selected(name, tokens_of(kind, (5, 4, 5)), 23) for name in AFTER for kind in ('duplicates', 'drift')])"
    )
    env = os.environ | {"PYTHONHASHSEED": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    here = [selected(name, tokens_of(kind, GRID), 23) for name in AFTER for kind in ("duplicates", "drift")]
    assert done.stdout.strip() == str(here)


@pytest.mark.few(24)
@pytest.mark.parametrize("name", AFTER)
@pytest.mark.parametrize("kind", KINDS)
def test_counts_and_order(name, kind):
    method = methods.get(name)
    for grid, keep in (
        ((3, 4, 5), 1),
        ((3, 4, 5), 17),
        ((3, 4, 5), 60),
        ((1, 1, 1), 1),
        ((5, 1, 1), 2),
        ((1, 6, 6), 9),
    ):
        kept = selected(name, tokens_of(kind, grid), keep)
        assert kept == sorted(set(kept)) and kept[0] >= 0 and kept[-1] < prod(grid)
        if method.exact:
            assert len(kept) == keep
        else:
            assert len(kept) <= keep or (name == "evs" and len(kept) == grid[1] * grid[2])
        if keep == prod(grid):
            assert kept == list(range(keep))


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["random", "constant"])
def test_no_matrix_of_all_pairs(kind):
    """Random tokens all differ from each other, and equal tokens do not change over time."""
    names = AFTER if kind == "random" else ["fastvid", "prunevid", "holitom", "flashvid", "visionzip"]
    tokens = tokens_of(kind, (16, 16, 16), width=8)
    n = len(tokens.unit_to_row)
    with Largest() as largest:
        for name in names:
            assert 0 < len(selected(name, tokens, 32)) <= 256
    assert n <= largest.numbers <= 512 * n < n * n / 4


# Every method in host programs with another default dtype or default device, and under torch's autocast.


NAMES = [name for name in methods.available(plugins=False) if name not in ("idpruner", "visionselector")]
NAMES += ["reuse+visionzip", "evoprune+fastv"]
ON_PATCHES = [
    name
    for name in NAMES
    if methods.MethodChain.parse(name).acts != "input" and not methods.MethodChain.parse(name).language
]
ALONE = [name for name in ON_PATCHES if not methods.MethodChain.parse(name).reads_question]
OTHERS = [name for name in NAMES if name not in ALONE]
CHOOSING = [
    name
    for name in ON_PATCHES
    if methods.MethodChain.parse(name).token_selector or isinstance(methods.MethodChain.parse(name).encoder, Merger)
]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
HALVES = ["bf16", "fp16"]
BUDGETS = (1.0, 0.25)


@contextmanager
def host(name: str):
    """Imitate a host program that uses another default dtype, or a default device that holds no values."""
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
    """Load a model in a host program that uses another default."""
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


def moved(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((x.float() - y.float()).norm() / y.float().norm())


def assert_equal_encodings(made, expected) -> None:
    for field in ("features", "kept", "rows", "unit_to_row", "size", "deepstack"):
        a, b = getattr(made, field), getattr(expected, field)
        assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), field
    assert made.kept_per_pair == expected.kept_per_pair


@pytest.mark.parametrize(
    "family", ["qwen2_5_vl", *(pytest.param(other, marks=pytest.mark.full) for other in list(FAMILIES)[1:])]
)
@pytest.mark.parametrize("name", one_of_each(ON_PATCHES))
def test_the_encoding_is_the_same_whatever_the_default(name, family):
    for budget in BUDGETS:
        expected = encode(name, budget, family)
        for default in (*DTYPES, "meta"):
            with host(default):
                assert_equal_encodings(encode(name, budget, family), expected)


@pytest.mark.few(3)
@pytest.mark.parametrize(
    "name", one_of_each(["evoprune", "reuse+visionzip", "tome", *OTHERS])
)  # encodings are compared above, for every method
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
    method, calls = methods.MethodChain.parse(name), []
    kind, call = (type(method.token_selector), "select") if method.token_selector else (type(method.encoder), "match")
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
        for field in ("kept", "unit_to_token", "weight", "size"):
            a, b = getattr(again, field), getattr(chosen, field)
            assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), field


def test_the_attention_received_is_summed_in_float32_under_autocast(monkeypatch):
    seen = []
    monkeypatch.setattr(Mmr, "select", lambda _, tokens, keep: seen.append(tokens) or Selection(torch.arange(keep)))
    with autocast("fp16"):
        encode("mmr", 0.25)
    for tokens in seen:  # shares within a frame pair, 1 on average
        mean = tokens.attention.view(tokens.grid[0], -1).mean(1)
        torch.testing.assert_close(mean, torch.ones_like(mean), rtol=0, atol=1e-5)


@pytest.mark.few(2)
@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_budget_the_tower_under_autocast_is_hugging_faces(family, half):
    inputs = prompt(family)["pixel_values_videos"], prompt(family)["video_grid_thw"]
    exact = torch.cat(model(family).model.get_video_features(*inputs).pooler_output)
    with autocast(half):
        theirs = torch.cat(model(family).model.get_video_features(*inputs).pooler_output)
        made = encode("evoprune", 1.0, family).features
    assert made.dtype == theirs.dtype == DTYPES[half]
    assert moved(made, theirs) < 1.5 * moved(theirs, exact) < 0.02


@pytest.mark.few(2)
@pytest.mark.parametrize("default", DTYPES)
@pytest.mark.parametrize("name", one_of_each(ALONE))
@torch.no_grad()
def test_a_pruned_hugging_face_model_is_the_same_whatever_the_default(name, default):
    for budget in BUDGETS:
        with evoprune.EvoPrune(budget=budget, method=name)(model()) as run:
            expected, columns = model()(**prompt(), logits_to_keep=3).logits, run.columns.index
            with host(default):
                made = model()(**prompt(), logits_to_keep=3).logits
            assert torch.equal(run.columns.index, columns) and torch.equal(made, expected)
