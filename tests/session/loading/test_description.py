"""Test facts about a model that are determined before torch is imported, and reused by plans and when loading the model."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub
import pytest

from evoprune.errors import ModelError
from evoprune.methods import TowerShape
from evoprune.session.loading.description import describe
from evoprune.session.loading.model import load_model
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.published import BUNDLED_CONFIGS
from evoprune.video import SamplingOptions, probe
from evoprune.video_qa import VideoQA

ROOT = Path(__file__).parents[3]
CLIP = "samples/square.mp4"
PUBLISHED = next(iter(BUNDLED_CONFIGS))

PLANNED = """
import sys
from evoprune.session.loading.description import describe
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.video.frames import probe

plan = describe(ModelOptions("demo")).plan(probe("samples/square.mp4"), SamplingOptions(), PruneOptions())
assert plan.grid == (6, 4, 6) and plan.units == 144, plan
assert "torch" not in sys.modules and "transformers" not in sys.modules
assert plan.encoder.keep == 36
"""


def test_a_plan_is_made_before_torch_is_imported():
    done = subprocess.run([sys.executable, "-c", PLANNED], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("options", [{}, {"load_format": "dummy"}])
@pytest.mark.parametrize("method", ["evoprune", "downscale", "none"])
def test_the_plan_of_a_session_is_the_one_that_was_made_before(saved, options, method):
    model = describe(ModelOptions(str(saved), **options))
    pruning, sampling, info = PruneOptions(0.25, method), SamplingOptions(frames=8), probe(CLIP)
    before = model.plan(info, sampling, pruning)
    loaded = load_model(model, pack=False)
    assert loaded.description is model and loaded.limits is model.limits
    assert TowerShape.of_tower(loaded.model.model.visual) == model.tower
    session = VideoQA(loaded, budget=0.25, method=method).session
    later = loaded.description.plan(info, sampling, session.pruning)
    assert before.encoder == later.encoder
    assert replace(before, pruning=None, unshrunk=None) == replace(later, pruning=None, unshrunk=None)
    assert (before.unshrunk is None) == (method != "downscale") and before.full.grid == later.full.grid


def test_without_the_hub_the_cache_comes_first_and_then_the_bundled_config(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert describe(ModelOptions(PUBLISHED, device="cpu"), local=True).max_visual_tokens == 4096
    for name in ("a/b-", "a/b.git", f"a/{'b' * 200}", "no such model"):
        with pytest.raises(ModelError):
            describe(ModelOptions(name), local=True)
    with pytest.raises(ModelError, match="not on this machine"):
        describe(ModelOptions(PUBLISHED, revision="other"), local=True)
    folder = tmp_path / "hub" / f"models--{PUBLISHED.replace('/', '--')}"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    shutil.copy(BUNDLED_CONFIGS[PUBLISHED], snapshot / "config.json")
    limits = {"size": {"shortest_edge": 3136, "longest_edge": 50_176}}
    (snapshot / "video_preprocessor_config.json").write_text(json.dumps(limits))
    assert describe(ModelOptions(PUBLISHED), local=True).limits["video"].max_pixels == 50_176
    (snapshot / "config.json").write_text("{")
    with pytest.raises(ModelError):
        describe(ModelOptions(PUBLISHED), local=True)


def test_weights_come_from_the_commit_that_was_described(monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: asked.append(how) or "/nowhere")
    model = replace(describe(ModelOptions("demo")), options=ModelOptions("org/tiny"), commit="0123abc")
    model.download("*.safetensors")
    assert (asked[0]["revision"], asked[0]["local_files_only"]) == ("0123abc", False)
    replace(model, unreachable="network access is disabled").download("*.safetensors")
    assert (asked[1]["revision"], asked[1]["local_files_only"]) == (None, True)
