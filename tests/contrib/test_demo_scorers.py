"""The bundled scorers of the demo models."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from evoprune import UsageError, VideoQA
from evoprune.bundled import DEMOS
from evoprune.contrib.scorer import demo_scorers
from evoprune.methods import Tokens
from evoprune.util import open_safetensors

BOTH = ("idpruner", "visionselector")
MODELS = {"demo": DEMOS["demo"].folder, "second": Path("tests/demo/second")}
MODELS |= {"scenes": DEMOS["demo-scenes"].folder, "second scenes": Path("tests/demo/second-scenes")}
SQUARE = "samples/square.mp4"


def test_each_demo_model_has_a_scorer():
    scorers = demo_scorers()
    assert len(scorers) == len(MODELS)
    for scorer in scorers.values():
        assert sum(file.stat().st_size for file in Path(scorer.folder).iterdir()) < 2**20


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.full) if "scenes" in model else model for model in MODELS]
)
def test_a_demo_model_is_recognized_by_its_weights(tmp_path, model, name):
    """The folder may be anywhere, and the dtype does not matter. Other weights of the same size have no scorer."""
    folder = tmp_path / "copy"
    shutil.copytree(MODELS[model], folder)
    used = VideoQA.load(str(folder), method=name, budget=0.25, dtype="fp32").encode(SQUARE, frames=4).encoded
    half = VideoQA.load(str(folder), method=name, budget=0.25, dtype="bf16").encode(SQUARE, frames=4).encoded
    assert len(used.kept) == len(half.kept) == round(0.25 * len(used.unit_to_row))
    [own] = [scorer for scorer in demo_scorers().values() if scorer.model == fingerprint_of(folder)]
    given = VideoQA.load(str(folder), method=f"{name}:scorer={own.folder}", budget=0.25, dtype="fp32")
    assert torch.equal(given.encode(SQUARE, frames=4).encoded.kept, used.kept)


def fingerprint_of(folder: Path) -> str:
    with open_safetensors(folder / "model.safetensors") as file:
        [name] = [name for name in file.keys() if name.endswith("merger.ln_q.weight")]  # noqa: SIM118 (not a dict)
        norm = file.get_tensor(name)
    return Tokens(norm[None], torch.zeros(1, dtype=torch.int64), (1, 1, 1), merger_norm=norm).fingerprint


def test_a_scorer_of_another_demo_model_is_refused():
    first, second = (demo_scorers()[fingerprint_of(MODELS[model])] for model in ("demo", "second"))
    assert first.width == second.width
    qa = VideoQA.load("demo", method=f"idpruner:scorer={second.folder}", budget=0.25)
    with pytest.raises(UsageError, match="was trained for another model"):
        qa.encode(SQUARE, frames=4)


def test_other_weights_have_no_scorer(tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(MODELS["demo"], folder)
    with open_safetensors(folder / "model.safetensors") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    [name] = [name for name in tensors if name.endswith("merger.ln_q.weight")]
    tensors[name] *= 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UsageError, match="needs a scorer trained for this model"):
        VideoQA.load(str(folder), method="idpruner", budget=0.25).encode(SQUARE, frames=4)
