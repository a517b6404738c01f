"""Options of the pipeline: checked when they are made, without torch, and made of keywords."""

import pickle
from dataclasses import FrozenInstanceError, fields, replace
from inspect import signature
from pathlib import Path

import numpy as np
import pytest

from evoprune import methods
from evoprune.errors import UsageError
from evoprune.methods.plans import PRESETS
from evoprune.session.options import (
    GenerationOptions,
    ModelOptions,
    PipelineOptions,
    PruneOptions,
    SamplingOptions,
    record,
)
from evoprune.util import from_keywords
from evoprune_cli.ask import ask
from evoprune_cli.batch import batch

WRONG = {
    ModelOptions: [
        ("load_format", "gguf", "unknown load format 'gguf'"),
        ("dtype", "fp64", "unknown dtype 'fp64'"),
        ("quantize", "int2", "unknown quantisation 'int2'"),
        ("model", 3, "model is 3, not a text or a path"),
        ("offline", 1, "offline is 1, not True or False"),
    ],
    PruneOptions: [
        *[("budget", value, f"budget {value!r} is not a share") for value in (0, "lots", None)],
        ("method", "magic", "no pruning method 'magic'"),
        ("method", 3, "method is 3, not a text"),
        ("method_args", ["alpha"], "method_args is ['alpha'], not a dict or None"),
        ("seed", "x", "seed is 'x', not a whole number"),
    ],
    SamplingOptions: [
        *[(name, value, f"{name.removesuffix('_s')} is {value}") for name, value in (
            ("fps", 0), ("fps", float("nan")), ("frames", 0), ("start_s", float("nan")), ("end_s", float("inf")), ("frame_rate", 0),
            ("max_frames", 1))],
        ("max_visual_tokens", 0, "at most 0 visual tokens"),
        ("start_s", "1:30", "start_s is '1:30', not a number"),
        ("frames", True, "frames is True, not a whole number or None"),
    ],
    GenerationOptions: [
        *[(name, value, f"{name} is {value}") for name, value in (
            ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_k", -1), ("repetition_penalty", 0.0),
            ("repetition_penalty", float("inf")), ("temperature", float("nan")), ("top_p", 1.1))],
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5, not a whole number"),
        ("system", 3, "system is 3, not a text or None"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"), [(kind, *row) for kind, rows in WRONG.items() for row in rows]
)
def test_a_bad_value_is_refused(kind, name, value, message):
    with pytest.raises(UsageError) as caught:
        kind(**{name: value})
    assert caught.value.message.startswith(message) and caught.value.hint


def test_numbers_of_numpy_and_settings_that_are_no_texts_are_welcome():
    assert SamplingOptions(fps=np.float32(2), frames=None) and GenerationOptions(np.int64(3))
    assert PruneOptions(method_args={"alpha": 2, "average": True}).method_args == {"alpha": "2", "average": "True"}
    assert methods.get("evoprune", {"alpha": 2, "average": False}).args["average"] is False
    assert ModelOptions(Path("a/model")).model == "a/model"
    with pytest.raises(UsageError, match="fps and frames exclude each other"):
        SamplingOptions(fps=1.0, frames=4)


def test_a_preset_keeps_its_name():
    fast = PruneOptions("fast")
    assert fast == PruneOptions(PRESETS["fast"]) == replace(fast, seed=0) == pickle.loads(pickle.dumps(fast))
    assert fast != PruneOptions(float(PRESETS["fast"])) and record([fast], ("budget",))["budget"] == "fast"
    assert PruneOptions(0.1) == PruneOptions("0.1") == PruneOptions("10%")
    assert PruneOptions("auto").budget == "auto" and PruneOptions(method_args=None).method_args == {}


def test_keywords_go_to_the_options_that_have_them():
    pruning, sampling = from_keywords({"fps": 1.0, "budget": 0.5}, PruneOptions, SamplingOptions)
    assert (pruning, sampling) == (PruneOptions(0.5), SamplingOptions(1.0))
    with pytest.raises(TypeError, match=r"unknown option 'speed'; known: fps, frames, start_s"):
        from_keywords({"speed": 1.0}, SamplingOptions)
    assert PipelineOptions.of(model="demo", seed=3, frames=4).pruning.seed == 3


def test_no_two_options_have_the_same_name_and_none_changes():
    kinds = (ModelOptions, PruneOptions, SamplingOptions, GenerationOptions)
    names = [each.name for kind in kinds for each in fields(kind)]
    assert len(names) == len(set(names))
    with pytest.raises(FrozenInstanceError):
        PruneOptions().budget = 1.0


@pytest.mark.parametrize("command", [ask, batch])
def test_every_option_is_one_of_the_command_line(command):
    names = {each.name for kind in PipelineOptions.KINDS for each in fields(kind)}
    assert names <= signature(command).parameters.keys()
