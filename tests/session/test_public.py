"""The names of `import evoprune`: all there, listed, and free until they are used."""

import copy
import json
import os
import pickle
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial

import numpy as np
import pytest
import torch

import evoprune
from evoprune.session.options import GenerationOptions, ModelOptions, PruneOptions, SamplingOptions, StreamOptions
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def demo():
    return evoprune.VideoQA.load("demo", device="cpu")


def test_every_public_name_can_be_had_and_is_listed():
    assert set(evoprune.__all__) <= set(dir(evoprune))
    for name in evoprune.__all__:
        assert getattr(evoprune, name).__name__.rpartition(".")[2] == name


def test_settings_are_of_the_class_that_users_know():
    settings = evoprune.EvoPrune(budget=0.1, seed=3)
    assert f"{type(settings)}" == "<class 'evoprune.EvoPrune'>" and pickle.loads(pickle.dumps(settings)) == settings


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_what_belongs_to_its_process_says_so_where_it_is_copied(demo, copied):
    video = demo.encode("samples/square.mp4", frames=4)
    answer = video.ask("What colour is the square?", max_new_tokens=1)
    with demo.stream() as stream:
        for each, hint in (
            (demo, "VideoQA.load"),
            (video, "threads may"),
            (stream, "threads may"),
            (answer, "answer.text"),
        ):
            with pytest.raises(TypeError, match=f"no {type(each).__name__} can be pickled or copied: .*{hint}"):
                copied(each)
    assert copied(answer.report) and copied(evoprune.Cache("cache"))


class Unprintable(os.PathLike):
    """Of a class that can be printed no more than read."""

    def __repr__(self):
        raise ZeroDivisionError

    def __fspath__(self):
        return b"samples/square.mp4"


def test_odd_arguments_are_refused_in_a_sentence(demo, tmp_path):
    odd = Unprintable()
    for call, says in {
        lambda: demo.encode(odd): "an input is of class Unprintable, not a path",
        lambda: demo.ask(odd, "What?"): "an input is of class Unprintable, not a path",
        lambda: evoprune.VideoQA.load("demo", budget=odd): "budget is of class Unprintable, not",
        lambda: evoprune.Cache(None): "the folder of a cache is None, not a path",
        lambda: evoprune.Cache("a\0b"): "the folder of a cache is .*, not a path",
        lambda: evoprune.Cache("a\ud800b"): "the folder of a cache is .*, not a path",
        lambda: evoprune.Cache(tmp_path, limit_bytes="2 GiB"): "limit_bytes is '2 GiB', not a whole number",
    }.items():
        with pytest.raises(evoprune.UsageError, match=says):
            call()
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(evoprune.VideoError, match="no file can have the name 'a"):
            demo.encode(name)


def test_numbers_of_numpy_are_welcome(demo):
    numbers = {
        "max_visual_tokens": np.int64(50),
        "start_s": np.float32(1),
        "end_s": np.float64(3),
        "frames": np.int16(4),
    }
    video, plain = demo.encode("samples/square.mp4", **numbers), {name: value.item() for name, value in numbers.items()}
    assert video.report.sampling == demo.encode("samples/square.mp4", **plain).report.sampling
    answer = video.ask("What?", max_new_tokens=np.int32(1), temperature=np.float32(0.5), seed=np.int64(3))
    assert answer.text and json.loads(answer.report.to_json())["generation"]["temperature"] == 0.5
    seeds = (np.uint8(5), 5)
    drawn = [evoprune.VideoQA(demo.loaded, method="random", seed=seed).encode("samples/square.mp4") for seed in seeds]
    assert drawn[0].report.pruning == drawn[1].report.pruning


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (evoprune.VideoQA.load, (ModelOptions, PruneOptions)),
        (evoprune.VideoQA, (PruneOptions,)),
        (evoprune.VideoQA.encode, (SamplingOptions,)),
        (evoprune.VideoQA.stream, (StreamOptions,)),
        (evoprune.EncodedInputs.ask, (GenerationOptions,)),
        (evoprune.EvoPrune, (evoprune.EvoPrune,)),
    ],
)
def test_help_names_every_option(function, kinds):
    names = [field.name for kind in kinds for field in fields(kind)]
    assert [name for name in names if not re.search(rf"\b{name}\b", function.__doc__)] == []


@pytest.mark.parametrize("call", [evoprune.EvoPrune, partial(evoprune.apply, None)])
def test_a_mistyped_option_is_named_with_those_that_exist(call):
    with pytest.raises(TypeError, match=r"unknown option 'bugdet'; known: budget, method, method_args, .*seed"):
        call(bugdet=0.5)


def test_a_name_is_no_loaded_model():
    with pytest.raises(TypeError, match=r"VideoQA.load\('demo'\) loads one"):
        evoprune.VideoQA("demo")


NETWORK = torch.nn.Linear(2, 2)
MISTAKES = {
    "VideoQA takes no Linear; to prune a model you hold: evoprune.EvoPrune": lambda: evoprune.VideoQA(NETWORK),
    "model is of class Linear, not a name; to prune a model you hold": lambda: evoprune.VideoQA.load(NETWORK),
    "class Linear is no setting; .*EvoPrune.budget=0.1..model.": lambda: evoprune.EvoPrune(NETWORK),
    "class Linear is no setting; first the settings": lambda: evoprune.EvoPrune(NETWORK, budget=0.1),
    "class Linear is no setting; first the": lambda: evoprune.EvoPrune(model=NETWORK),
    r"EvoPrune.budget=0.1, .*has no model yet; with evoprune.EvoPrune\(": lambda: evoprune.EvoPrune(0.1).__enter__(),
    "takes 1 positional argument": lambda: evoprune.apply(NETWORK, 0.1),
    "budget None is not a share.*full, high, balanced, fast": lambda: evoprune.EvoPrune(None),
    "budget None .*full, high, balanced, fast": lambda: evoprune.VideoQA.load(budget=None),
    "auto works with VideoQA": lambda: evoprune.EvoPrune("auto"),
    "an object of class int cannot be pruned": lambda: evoprune.apply(3),
    "an object of class int cannot be pruned; supported": lambda: evoprune.remove(3),
    "progress is True, not a function or None": lambda: evoprune.VideoQA.load(progress=True),
    "seed is 1[0-9]{30}, which 64 bits cannot hold": lambda: evoprune.EvoPrune(seed=10**30),
    "unknown dtype 'float64'": lambda: evoprune.VideoQA.load(dtype=torch.float64),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_named_in_a_line_with_what_would_be_right(says):
    with pytest.raises((TypeError, evoprune.EvopruneError)) as caught:
        MISTAKES[says]()
    text = "; ".join(str(caught.value).split("\nhint: "))
    assert re.search(says, text) and "in_features" not in text and "\n" not in text


@pytest.mark.parametrize("path", [None, [], ["a.mp4", 3], torch.zeros(2, 3, 4, 4), b"a.mp4"], ids=str)
def test_an_input_is_a_path(demo, path):
    with pytest.raises(evoprune.UsageError, match=r"the input is .*, not a path|an input is 3, not a path"):
        demo.encode(path)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [("cache", True, "True, not a Cache"), ("name", 3, "3, not a text"), ("progress", "x", "'x', not a function")],
)
def test_options_of_a_video_are_what_they_should_be(demo, option, value, says):
    with pytest.raises(evoprune.UsageError, match=f"{option} is {says}"):
        demo.encode("samples/square.mp4", **{option: value})


@pytest.mark.parametrize("dtype", ["fp32", "float32", torch.float32, "torch.float32"], ids=str)
@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=str)
def test_torchs_own_names_of_dtypes_and_devices_are_welcome(dtype, device):
    assert ModelOptions(dtype=dtype, device=device) == ModelOptions(dtype="fp32", device="cpu")
    assert [ModelOptions(dtype=x).dtype for x in (torch.bfloat16, "float16")] == ["bf16", "fp16"]


def test_objects_say_in_a_line_what_they_are(demo):
    assert repr(demo.loaded) == "<LoadedModel 'demo' in fp32 on cpu>"
    assert repr(demo.engine) == "<Engine 'demo' in fp32 on cpu: method 'evoprune', budget balanced, seed 0>"
    model = tiny_model()
    run = evoprune.apply(model, budget="fast")
    assert repr(run) == "<PrunedModel: evoprune at budget fast, active>" and repr(run.settings).startswith("EvoPrune(")
    run.remove()
    assert repr(run) == "<PrunedModel: evoprune at budget fast, not active>"


def test_a_method_that_prunes_nothing_says_so():
    """Whatever the budget is."""
    assert "method 'none', budget 1.0, " in repr(evoprune.VideoQA.load("demo", method="none", budget=0.1))
    pruned = evoprune.EvoPrune(method="none", budget=0.1)(tiny_model())
    assert repr(pruned) == "<PrunedModel: none at budget 1, not active>"


def test_the_cache_of_the_commands_is_a_call_away(monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    assert evoprune.Cache() == evoprune.Cache(str(tmp_path)) == evoprune.Cache(tmp_path)


@pytest.mark.few(2)
@pytest.mark.parametrize("question", [3, None, b"What?", ["What?"]])
def test_a_question_is_a_text(question):
    video = evoprune.VideoQA.load("demo").encode("samples/square.mp4", frames=4)
    with pytest.raises(evoprune.UsageError, match="not a text"):
        video.ask(question)


def test_importing_it_costs_nothing():
    code = "import sys, evoprune; dir(evoprune); print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.full
def test_an_answer_imports_neither_transformers_nor_the_compiler_of_torch():
    """Each takes longer to import than a short answer takes."""
    code = (
        "import sys, evoprune\n"
        "video = evoprune.VideoQA.load('demo').encode('samples/square.mp4', frames=4)\n"
        "assert video.ask('What?', max_new_tokens=1).text\n"
        "print([m for m in ('transformers', 'torch._dynamo', 'torch._inductor', 'sympy') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
