"""The public names are complete and listed, options are validated when created, and nothing is imported before it is used."""

import copy
import os
import pickle
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import evoprune
from evoprune.errors import UsageError, VideoError
from evoprune.language import GenerationOptions
from evoprune.session import Session, open_inputs
from evoprune.session.options import FindOptions, ModelOptions, PipelineOptions, PruneOptions, StreamOptions
from evoprune.util import from_keywords, record_of
from evoprune.video import SamplingOptions
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def demo():
    return evoprune.VideoQA.load("demo", device="cpu")


def test_a_session_takes_the_name_of_a_model(demo, tmp_path):
    session = Session.load(Path("demo"), PruneOptions(budget="25%"))
    assert (session.loaded.id, session.pruning.budget.recorded) == ("demo", 0.25)
    with pytest.raises(TypeError, match="not a PruneOptions"):
        Session.load("demo", "evoprune")
    with pytest.raises(TypeError, match="model is 3, not a name"):
        Session.load(3, PruneOptions())


def test_open_inputs_close_at_the_end_of_a_block_and_their_encodings_stay_valid(demo):
    with open_inputs(demo.session, ["samples/square.mp4"]) as opened:
        encoded = opened.encode()
    opened.close()
    assert str(encoded.ask("What colour is the square?"))


def test_every_public_name_can_be_had_and_is_listed():
    assert set(evoprune.__all__) <= set(dir(evoprune))
    for name in evoprune.__all__:
        assert getattr(evoprune, name).__name__.rpartition(".")[2] == name


@pytest.mark.parametrize("copied", [pickle.dumps, copy.deepcopy, copy.copy])
def test_what_belongs_to_its_process_says_so_where_it_is_copied(demo, copied):
    video = demo.encode("samples/square.mp4", frames=4)
    answer = video.ask("What colour is the square?", max_new_tokens=1)
    with demo.stream() as stream:
        hints = {demo: "VideoQA.load", video: "threads may", stream: "threads may"}
        for each, hint in (*hints.items(), (answer, "answer.text")):
            with pytest.raises(TypeError, match=f"{type(each).__name__} objects cannot be pickled or copied: .*{hint}"):
                copied(each)
    assert copied(answer.report) and copied(evoprune.Cache("cache"))


class Unprintable(os.PathLike):
    """An object whose `repr` raises, and whose path is bytes."""

    def __repr__(self):
        raise ZeroDivisionError

    def __fspath__(self):
        return b"samples/square.mp4"


def test_odd_arguments_are_refused_in_a_sentence(demo, tmp_path):
    odd = Unprintable()
    for call, says in {
        lambda: demo.encode(odd): "the input is of class Unprintable, which is not supported",
        lambda: demo.ask(odd, "What?"): "the input is of class Unprintable, ",
        lambda: evoprune.VideoQA.load("demo", budget=odd): "budget is of class Unprintable, not",
        lambda: evoprune.Cache(None): "the cache folder is None, not a path",
        lambda: evoprune.Cache("a\0b"): "the cache folder is .*, not a path",
        lambda: evoprune.Cache("a\ud800b"): "the cache folder is .*, not a path",
        lambda: evoprune.Cache(tmp_path, limit_bytes="2 GiB"): "limit_bytes is '2 GiB', not a whole number",
    }.items():
        with pytest.raises(evoprune.UsageError, match=says):
            call()
    for name in ("a\0b", "a\ud800b"):
        with pytest.raises(evoprune.VideoError, match=r"'a.*is not a valid file name"):
            demo.encode(name)


@pytest.mark.parametrize(
    ("function", "kinds"),
    [
        (evoprune.VideoQA.load, (ModelOptions, PruneOptions)),
        (evoprune.VideoQA, (PruneOptions,)),
        (evoprune.VideoQA.encode, (SamplingOptions,)),
        (evoprune.VideoQA.stream, (StreamOptions,)),
        (evoprune.VideoQA.find, (FindOptions,)),
        (evoprune.EncodedInputs.ask, (GenerationOptions,)),
        (evoprune.EvoPrune, (evoprune.EvoPrune,)),
    ],
)
def test_help_names_every_option(function, kinds):
    names = [field.name for kind in kinds for field in fields(kind)]
    assert [name for name in names if not re.search(rf"\b{name}\b", function.__doc__)] == []


NETWORK = torch.nn.Linear(2, 2)
MISTAKES = {
    "unknown option 'bugdet'; did you mean budget": lambda: evoprune.EvoPrune(bugdet=0.5),
    "unknown option 'bugdet'; did you mean budget[?]": lambda: evoprune.apply(None, bugdet=0.5),
    "unknown option 'fsp'; did you mean fps": lambda: evoprune.VideoQA.load("demo").encode("a", fsp=2),
    r"VideoQA.load\('demo'\) loads one": lambda: evoprune.VideoQA("demo"),
    "VideoQA does not take a Linear; to prune a model you loaded: evoprune.EvoPrune": lambda: evoprune.VideoQA(NETWORK),
    "model is a Linear, not a name; to prune a model you loaded": lambda: evoprune.VideoQA.load(NETWORK),
    "class Linear is not a setting; .*EvoPrune.budget=0.1..model.": lambda: evoprune.EvoPrune(NETWORK),
    "class Linear is not a setting; pass the settings first": lambda: evoprune.EvoPrune(NETWORK, budget=0.1),
    "class Linear is not a setting; pass the settings": lambda: evoprune.EvoPrune(model=NETWORK),
    "takes 1 positional argument": lambda: evoprune.apply(NETWORK, 0.1),
    "budget None is not a share.*full, high, balanced or fast": lambda: evoprune.EvoPrune(None),
    "budget None .*full, high, balanced, fast": lambda: evoprune.VideoQA.load(budget=None),
    "auto works only with VideoQA": lambda: evoprune.EvoPrune("auto"),
    "an object of class int cannot be pruned; supported": lambda: evoprune.remove(3),
    r"class str cannot be pruned; to load a model that prunes: evoprune.VideoQA.load\('Qwen/x'": lambda: evoprune.apply(
        "Qwen/x"
    ),
    "progress is True, not a function or None": lambda: evoprune.VideoQA.load(progress=True),
    "seed is 1[0-9]{30}, which does not fit into 64 bits": lambda: evoprune.EvoPrune(seed=10**30),
    "unknown dtype 'float64'": lambda: evoprune.VideoQA.load(dtype=torch.float64),
}


@pytest.mark.parametrize("says", MISTAKES)
def test_a_mistake_is_named_in_a_line_with_what_would_be_right(says):
    with pytest.raises((TypeError, evoprune.EvopruneError)) as caught:
        MISTAKES[says]()
    text = "; ".join(str(caught.value).split("\nhint: "))
    assert re.search(says, text) and "in_features" not in text and "\n" not in text


def test_a_model_that_prunes_already(demo):
    for given in (demo, demo.session, demo.loaded):
        with pytest.raises(evoprune.ModelError, match=f"class {type(given).__name__} cannot be pruned") as caught:
            evoprune.EvoPrune()(given)
        assert caught.value.hint.startswith("a VideoQA prunes already; set its budget: evoprune.VideoQA.load(")
    model = tiny_model()
    with pytest.raises(evoprune.ModelError) as caught:
        evoprune.EvoPrune()(evoprune.EvoPrune()(model))
    assert caught.value.hint == "pass the model itself"


def test_calling_what_answers_questions(demo):
    inputs = demo.encode("samples/square.mp4", frames=4)
    with demo.stream() as stream:
        called = {"qa.ask(path, question)": demo, "chat.ask(question)": inputs.chat()}
        for right, given in [*called.items(), ("video.ask(question)", inputs), ("video.ask(question)", stream)]:
            with pytest.raises(TypeError, match="object is not callable; did you mean ") as caught:
                given("samples/square.mp4", question="What?")
            assert str(caught.value).endswith(f" {right}?")


ENCODED = [  # arguments of `encode`, and the error message
    *[((path,), {}, "(input is None, which is not supported|no input)") for path in (None, [])],
    ((torch.zeros(2, 3, 4, 4),), {}, "of shape .*2, 3, 4, 4.* is not a video"),
    ((["a.mp4", 3],), {}, "an input is 3, which is not supported"),
    (("a.mp4",), {"cache": True}, "cache is True, not a Cache"),
    (("a.mp4",), {"name": 3}, "name is 3, not a string"),
    (("a.mp4",), {"progress": "x"}, "progress is 'x', not a function"),
]


@pytest.mark.parametrize(("arguments", "options", "says"), ENCODED, ids=str)
def test_arguments_of_encode_are_what_they_should_be(demo, arguments, options, says):
    with pytest.raises(evoprune.UsageError, match=says):
        demo.encode(*arguments, **options)


def test_torchs_own_names_of_dtypes_and_devices_are_welcome():
    for dtype in ("fp32", "float32", torch.float32, "torch.float32"):
        assert ModelOptions(dtype=dtype, device=torch.device("cpu")) == ModelOptions(dtype="fp32", device="cpu")
    assert [ModelOptions(dtype=x).dtype for x in (torch.bfloat16, "float16")] == ["bf16", "fp16"]


def test_objects_say_in_a_line_what_they_are(demo):
    assert repr(demo.loaded) == "<LoadedModel 'demo' in fp32 on cpu>"
    assert repr(demo.session) == "<Session 'demo' in fp32 on cpu: method 'evoprune', budget balanced, seed 0>"
    model = tiny_model()
    run = evoprune.apply(model, budget="fast")
    assert repr(run) == "<PrunedModel: evoprune at budget fast, active>" and repr(run.settings).startswith("EvoPrune(")
    run.remove()
    assert repr(run) == "<PrunedModel: evoprune at budget fast, not active>"
    # A method that prunes nothing always shows budget 1.0.
    assert "method 'none', budget 1.0, " in repr(evoprune.VideoQA.load("demo", method="none", budget=0.1))
    pruned = evoprune.EvoPrune(method="none", budget=0.1)(model)
    assert repr(pruned) == "<PrunedModel: none at budget 1, not active>"


@pytest.mark.parametrize(
    "video", ["clip.mp4", Path("clip.mp4"), ["a.mp4", "b.mp4"], "samples", b"bytes", np.zeros((2, 28, 28, 3))]
)
def test_a_question_before_its_video_is_called_swapped(demo, video):
    calls = {
        "qa.ask(path, question)": lambda: demo.ask("What happens?", video),
        "qa.find(path, query)": lambda: demo.find("a red circle", video),
        "processor_inputs": lambda: evoprune.processor_inputs("demo", "What happens?", video),
    }
    for right, call in calls.items():
        with pytest.raises(VideoError, match="the question and the input are swapped") as caught:
            call()
        assert right in caught.value.hint
    with pytest.raises(VideoError, match=r"^no such file: clip\.mp4\nhint"):
        demo.encode("clip.mp4")


def test_a_traceback_of_an_expected_error_ends_at_the_public_call(demo, monkeypatch):
    def depth() -> int:
        with pytest.raises(VideoError) as caught:
            demo.encode("gone.mp4")
        return len(caught.traceback)

    short = depth()
    monkeypatch.setenv("EVOPRUNE_DEBUG", "1")
    assert short == 2 < depth()  # this function and the wrapper of the public call
    monkeypatch.setenv("EVOPRUNE_DEBUG", "off")
    assert depth() == short


def test_a_question_is_a_text(demo):
    video = demo.encode("samples/square.mp4", frames=4)
    for question in (3, None, b"What?", ["What?"]):
        with pytest.raises(evoprune.UsageError, match="not a string"):
            video.ask(question)
    with pytest.raises(evoprune.UsageError, match="on_thoughts is 3, not a function or None"):
        video.ask("What?", on_thoughts=3)


@pytest.mark.parametrize(
    ("code", "modules"),
    [
        ("import evoprune; dir(evoprune)", ("torch", "numpy", "transformers")),
        ("import evoprune.session.options", ("torch", "numpy", "transformers")),
        pytest.param(
            "import evoprune; video = evoprune.VideoQA.load('demo').encode('samples/square.mp4', frames=4)\n"
            "assert video.ask('What?', max_new_tokens=1).text",
            ("transformers", "torch._dynamo", "torch._inductor", "sympy"),
            marks=pytest.mark.full,
        ),
    ],
    ids=["package", "options", "answer"],
)
def test_what_is_imported(code, modules):
    """Importing any of these modules takes longer than generating a short answer."""
    code += f"\nimport sys; print([m for m in {modules} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


WRONG = {
    ModelOptions: [
        ("load_format", "gguf", "unknown load format 'gguf'"),
        ("dtype", "fp64", "unknown dtype 'fp64'"),
        ("quantize", "int2", "unknown quantization 'int2'"),
        ("model", 3, "model is 3, not a string or a path"),
        ("offline", 1, "offline is 1, not True or False"),
    ],
    PruneOptions: [
        *[("budget", value, f"budget {value!r} is not a share") for value in (0, "lots", None)],
        ("method", "magic", "unknown pruning method 'magic'"),
        ("method", 3, "method is 3, not a string"),
        ("seed", "x", "seed is 'x', not a whole number"),
    ],
    SamplingOptions: [
        *[(name, value, f"{name.removesuffix('_s')} is {value}") for name, value in (
            ("fps", 0), ("fps", float("nan")), ("frames", 0), ("start_s", float("nan")), ("end_s", float("inf")), ("frame_rate", 0),
            ("max_frames", 1))],
        ("max_visual_tokens", 0, "max_visual_tokens is 0"),
        ("start_s", "1:30", "start_s is '1:30', not a number"),
        ("frames", True, "frames is True, not a whole number or None"),
    ],
    GenerationOptions: [
        *[(name, value, f"{name} is {value}") for name, value in (
            ("max_new_tokens", 0), ("temperature", -0.1), ("top_p", 0.0), ("top_k", -1), ("repetition_penalty", 0.0),
            ("repetition_penalty", float("inf")), ("temperature", float("nan")), ("top_p", 1.1))],
        ("max_new_tokens", 2.5, "max_new_tokens is 2.5, not a whole number"),
        ("system", 3, "system is 3, not a string or None"),
        *[("stop", value, f"stop is {value!r}, not a string") for value in (3, [1], b"a", {"a"})],
        *[("stop", value, "stop is an empty text") for value in ("", ["a", ""])],
        ("schema", 3, "schema is 3, not a JSON Schema"),
        ("regex", 3, "regex is 3, not a string or None"),
        *[("logprobs", value, f"logprobs is {value}") for value in (-1, 21, 1.5)],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "name", "value", "message"), [(kind, *row) for kind, rows in WRONG.items() for row in rows]
)
def test_a_bad_value_is_refused(kind, name, value, message):
    with pytest.raises(UsageError) as caught:
        kind(**{name: value})
    assert caught.value.message.startswith(message) and caught.value.hint


def test_numbers_of_numpy_are_welcome():
    assert SamplingOptions(fps=np.float32(2), frames=None) and GenerationOptions(np.int64(3))
    assert ModelOptions(Path("a/model")).model == "a/model"
    with pytest.raises(UsageError, match="fps and frames cannot be combined"):
        SamplingOptions(fps=1.0, frames=4)


def test_a_preset_keeps_its_name():
    fast = PruneOptions("fast")
    assert fast == replace(fast, seed=0) == pickle.loads(pickle.dumps(fast)) and fast.config().budget.name == "fast"
    assert fast != PruneOptions(0.1) and record_of([fast], ("budget",))["budget"] == fast.budget == "fast"
    assert PruneOptions(0.1) == PruneOptions("0.1") == PruneOptions("10%") and PruneOptions("full").budget == 1.0
    assert PruneOptions("auto").budget == "auto"


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


@pytest.mark.parametrize("wrong", ["0", "-1", "257", "two", "1.5", "", 0, "²"], ids=repr)
def test_what_is_no_number_of_threads(wrong):
    with pytest.raises(UsageError, match="not a number of threads") as caught:
        ModelOptions(threads=wrong)
    assert caught.value.hint == "use auto, or 1 to 256"
