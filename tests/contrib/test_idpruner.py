"""IDPruner and VisionSelector: their scores and selections, the scorers' files, and the bundled scorers of the demo models."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evoprune import UsageError, methods
from evoprune.contrib.scorer import Scorer
from evoprune.methods import TowerShape, snap
from tests.contrib.public import KINDS, public_tokens
from tests.methods.tokens import Largest, encoded, selected, tokens_of
from tests.scorers import scorer_tensors, write_scorer
from tests.vision.clips import changes, clip
from tests.vision.tower import tiny_tower

GRID = (3, 6, 8)
BOTH = ("idpruner", "visionselector")


def all_pairs(tensors: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Compute the scores from the whole N x N matrix."""
    keys, queries = (x @ tensors[f"{part}_proj.weight"].T + tensors[f"{part}_proj.bias"] for part in "kq")
    return (queries @ keys.T / keys.shape[1] ** 0.5).mean(1)


def greedy(x: torch.Tensor, scores: torch.Tensor, keep: int, lam: float) -> list[int]:
    """Select with the formula of the authors' code, with rounded numbers, so that ties go to the lower index."""
    importance = snap((scores - scores.min()) / (scores.max() - scores.min() + 1e-6))
    unit = x / (x.norm(dim=1, keepdim=True) + 1e-8)
    cosine = snap(unit @ unit.T)
    kept = [int(importance.argmax())]
    while len(kept) < keep:
        value = snap(lam * importance - (1 - lam) * cosine[:, kept].amax(1))
        value[kept] = -torch.inf
        kept.append(int(value.argmax()))
    return sorted(kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 0.001])
def test_they_keep_what_the_formulas_say(tmp_path, kind, scale):
    tokens, tensors = public_tokens(kind, 0, GRID), scorer_tensors(32, 16, scale=scale)
    setting = write_scorer(tmp_path, tensors)
    scores = all_pairs(tensors, tokens.features)
    torch.testing.assert_close(methods.get(f"idpruner:{setting}").scores(tokens), scores, atol=1e-4 * scale, rtol=1e-4)
    for keep in (1, 14, 36):
        assert selected(f"idpruner:{setting}", tokens, keep) == greedy(tokens.features, scores, keep, 0.5)
        assert selected(f"visionselector:{setting}", tokens, keep) == sorted(scores.topk(keep).indices.tolist())
    assert selected(f"idpruner:{setting}:lam=0.8", tokens, 14) == greedy(tokens.features, scores, 14, 0.8)


# Recorded from pruning/strategies/idpruner.py of YF-T/IDPruner (6aeb9dc): `public_tokens(kind, 0, (3, 6, 8))` and the scorer
# `scorer_tensors(32, 16)`, 36 tokens.
AUTHORS = json.loads((Path(__file__).parent / "fixtures" / "scorer" / "idpruner.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_they_keep_what_the_authors_code_keeps(tmp_path, kind):
    setting = write_scorer(tmp_path, scorer_tensors(32, 16))
    for name in BOTH:
        assert selected(f"{name}:{setting}", public_tokens(kind, 0, GRID), 36) == AUTHORS[kind][name]


@pytest.mark.parametrize("name", BOTH)
def test_equal_tokens_go_by_index(tmp_path, name):
    setting = write_scorer(tmp_path, scorer_tensors(8))
    for kind in ("constant", "zero"):
        assert selected(f"{name}:{setting}", tokens_of(kind, (3, 4, 5)), 6) == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", BOTH)
def test_memory_is_linear_and_nothing_is_made_on_the_default_device(tmp_path, name):
    setting = write_scorer(tmp_path, scorer_tensors(8))
    tokens = tokens_of("random", (16, 16, 16))
    expected = selected(f"{name}:{setting}", tokens, 32)
    with Largest() as largest, torch.device("meta"):
        assert selected(f"{name}:{setting}", tokens, 32) == expected
    assert largest.numbers <= 4096 * 8


@pytest.mark.parametrize("name", BOTH)
def test_the_result_does_not_depend_on_the_chunk_size(tmp_path, name):
    grid = (5, 4, 5)
    text = f"reuse+{name}:{write_scorer(tmp_path, scorer_tensors(24))}"
    args = methods.MethodChain.parse(text), clip(grid, changes(grid, 0.4)), grid, 23
    whole, *others = (encoded(*args, piece_units=size) for size in (10**6, 1, 40))
    assert len(whole.kept) == 23
    assert all(torch.equal(other.kept, whole.kept) for other in others)


# Scorer folders.


@pytest.mark.parametrize(
    "prefix", ["module.", "visual.importance_scorer.", "_orig_mod.module.", "model.visual.importance_scorer."]
)
def test_prefixes_unused_tensors_and_half_precision_are_accepted(tmp_path, prefix):
    tensors = {name: tensor.bfloat16() for name, tensor in scorer_tensors(8).items()}
    plain = Scorer.read(write_scorer(tmp_path / "a", tensors).removeprefix("scorer="))
    more = tensors | {"norm.weight": torch.ones(8)}
    prefixed = Scorer.read(write_scorer(tmp_path / "b", more, prefix).removeprefix("scorer="))
    assert prefixed == replace(plain, folder=prefixed.folder)
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.scores(x), prefixed.scores(x))


def spoiled(folder: Path, how: str) -> None:
    """Write a folder that is not a valid scorer."""
    tensors, config = scorer_tensors(8), {}
    if how == "shape":
        config["hidden_dim"] = 9
    elif how == "config":
        config["in_features"] = "8"
    elif how == "bias":
        tensors["q_proj.bias"] = torch.zeros(3)
    elif how == "NaN":
        tensors["k_proj.bias"][0] = torch.nan
    elif how == "integers":
        tensors["k_proj.bias"] = tensors["k_proj.bias"].long()
    elif how == "tensor":
        tensors["other.weight"] = tensors.pop("q_proj.weight")
    write_scorer(folder, tensors, **config)
    weights = folder / "model.safetensors"
    if how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "pickle":
        torch.save(tensors, folder / "pytorch_model.bin")
        weights.unlink()
    elif how == "damaged":
        weights.write_bytes(b"nonsense")
    elif how == "pointer":
        weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif how == "list":
        (folder / "config.json").write_text("[]")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("empty", "cannot read the scorer .*config.json: No such file"),
        ("pickle", "cannot read the scorer .*model.safetensors: No such file"),
        ("damaged", "cannot read the scorer "),
        ("pointer", "model.safetensors is a git-lfs pointer"),
        ("list", "is not a scorer: it is not a JSON object"),
        ("config", "is not a scorer: config.json has no valid in_features"),
        ("shape", r"k_proj.weight has shape \[8, 8\], but config.json says \[9, 8\]"),
        ("bias", r"q_proj.bias has shape \[3\], but config.json says \[8\]"),
        ("NaN", "k_proj.bias has values that are not finite numbers"),
        ("integers", "k_proj.bias has values that are not finite numbers"),
        ("tensor", "model.safetensors has no q_proj.weight"),
    ],
)
def test_a_folder_that_is_no_scorer_is_refused(tmp_path, how, says):
    spoiled(tmp_path / "scorer", how)
    for name in BOTH:
        with pytest.raises(UsageError, match=says) as caught:
            methods.MethodChain.parse(f"{name}:scorer={tmp_path / 'scorer'}")
        assert (
            "\n" not in caught.value.message
            and ("git lfs pull" if how == "pointer" else "IDPruner") in caught.value.hint
        )


def test_a_missing_folder_is_refused_with_a_similar_one(tmp_path):
    write_scorer(tmp_path / "scorer-3b", scorer_tensors(8))
    with pytest.raises(UsageError, match="there is no scorer folder") as caught:
        methods.get(f"idpruner:scorer={tmp_path / 'scorer-3B'}")
    assert "scorer-3b" in caught.value.hint


def test_a_scorer_for_other_tokens_is_refused_before_anything_is_encoded(tmp_path):
    setting = write_scorer(tmp_path, scorer_tensors(2048, 2))
    tower = TowerShape.of_tower(tiny_tower())
    for text in (f"idpruner:{setting}", f"reuse+visionselector:{setting}", f"ipcv+idpruner:{setting}"):
        with pytest.raises(UsageError, match="for tokens of 2,048 channels, but this model's have 24"):
            methods.MethodChain.parse(text).plan(tower, (5, 4, 5), 9)
