"""Test what can be derived from a model's name before torch is imported."""

import pytest

from evoprune.errors import UsageError
from evoprune.session.hub import nearest_id
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.session import Session


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("Qwen/Qwen2.5-VL-3B", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("Qwen/Qwen2.5-VL-7b-instruct", "Qwen/Qwen2.5-VL-7B-Instruct"),
        ("Qwen/Qwen2.5-VL-72B", "Qwen/Qwen2.5-VL-72B-Instruct"),
        ("Qwen/Qwen3.5-VL-4B", "Qwen/Qwen3.5-4B"),
        ("Qwen/Qwen3.5-VL-9B-Instruct", "Qwen/Qwen3.5-9B"),
        ("Qwen/Qwen3.6-VL-27B", "Qwen/Qwen3.6-27B"),
        ("Qwen3.8-27B-Instruct", "Qwen/Qwen3.8-27B"),
        ("Qwen/Qwen3.6-35B-A3B-FP8", None),
        ("qwen/qwen3-vl-8b", "Qwen/Qwen3-VL-8B-Instruct"),
        ("Qwen2-VL-7B", "Qwen/Qwen2-VL-7B-Instruct"),
        ("Qwen/Qwen3-VL-4B-Instruct", None),
        ("Qwen/Qwen2.5-VL-7B-Instruct-AWQ", None),
        ("unsloth/Qwen2.5-VL-3B", None),
        ("nobody/nothing", None),
        ("./nodir", None),
        ("clip.mp4", None),
    ],
)
def test_a_misspelt_id_is_recognized(name, meant):
    assert nearest_id(name) == meant


@pytest.mark.parametrize("name", ["Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.6-35B-A3B"])
def test_a_model_that_cannot_watch_is_refused_before_a_download_is_suggested(name):
    with pytest.raises(UsageError, match="cannot forget the oldest tokens") as caught:
        Session.load(ModelOptions(name, engine="transformers"), PruneOptions(), streams=True)
    assert "download" not in str(caught.value)
