"""Errors about wrong names of options and attributes say what to use instead."""

import asyncio
import copy
import inspect
import pickle
import re
import subprocess
import sys
from dataclasses import fields

import pytest

import evoprune
from evoprune import batch
from evoprune.hf import EvoPrune
from evoprune.language import GenerationOptions
from evoprune.session import FindOptions, ModelOptions, PruneOptions, StreamOptions, load_model
from evoprune.suggestions import NOT_OPTIONS, OTHER_NAMES
from evoprune.util import OPTION
from evoprune.video import SamplingOptions

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
Qa, Inputs, Stream = evoprune.VideoQA, evoprune.EncodedInputs, evoprune.VideoStream


@pytest.fixture(scope="module")
def qa():
    return Qa.load("demo", budget=0.25)


@pytest.mark.parametrize(
    ("function", "name", "says"),
    [
        # the same option under another library's name
        (Qa.load, "device_map", "did you mean device?"),
        (Qa.load, "torch_dtype", "did you mean dtype?"),
        (Qa.load, "load_in_8bit", "did you mean quantize='int8'?"),
        (Qa.load, "model_name", "did you mean model?"),
        (Qa.load, "local_files_only", "did you mean offline?"),
        (Qa.ask, "max_tokens", "did you mean max_new_tokens?"),
        (Inputs.ask, "max_completion_tokens", "did you mean max_new_tokens?"),
        (evoprune.Chat.ask, "stop_sequences", "did you mean stop?"),
        (Stream.ask, "response_format", "did you mean schema?"),
        (Qa.ask, "json_schema", "did you mean schema?"),
        (Qa.ask, "do_sample", "did you mean temperature=1?"),
        (Qa.ask, "video", "did you mean inputs?"),
        (Qa.ask, "prompt", "did you mean question?"),
        (Qa.encode, "video", "did you mean path?"),
        (Qa.encode, "nframes", "did you mean frames?"),
        (Qa.encode, "video_fps", "did you mean fps?"),
        (Qa.encode, "start", "did you mean start_s?"),
        (Qa.find, "max_results", "did you mean top?"),
        (Qa.stream, "window", "did you mean window_s?"),
        (evoprune.read_frames, "num_frames", "did you mean frames?"),
        (evoprune.read_ahead, "num_frames", "did you mean frames?"),
        (evoprune.processor_inputs, "num_frames", "did you mean frames?"),
        (evoprune.apply, "keep_ratio", "did you mean budget?"),
        (evoprune.EvoPrune, "keep_ratio", "did you mean budget?"),
        (evoprune.encode, "keep_ratio", "did you mean budget?"),
        (load_model, "quantization", "did you mean quantize?"),
        # a spelling mistake
        (Qa.ask, "max_new_token", "did you mean max_new_tokens?"),
        (Qa.ask, "sede", "did you mean seed?"),
        (Inputs.chat, "sytem", "did you mean system?"),
        (batch.answers, "cahce", "did you mean cache?"),
        (Qa, "bugdet", "did you mean budget?"),
        # an option of another function
        (Qa.ask, "budget", "set budget in VideoQA.load"),
        (Qa.ask, "keep_ratio", "set budget in VideoQA.load"),
        (Qa.ask, "fps", "set fps in VideoQA.encode"),
        (Qa.ask, "cache", "set cache in VideoQA.encode"),
        (Qa.ask, "num_frames", "set frames in VideoQA.encode"),
        (Qa.encode, "budget", "set budget in VideoQA.load"),
        (Qa.encode, "max_tokens", "set max_new_tokens in VideoQA.ask"),
        (Qa.encode, "threads", "set threads in VideoQA.load"),
        (Qa.stream, "method", "set method in VideoQA.load"),
        (Qa.load, "temperature", "set temperature in VideoQA.ask"),
        (Qa.load, "max_frame", "set max_frames in VideoQA.encode"),
        (Qa.load, "window_s", "set window_s in VideoQA.stream"),
        (Inputs.chat, "max_tokens", "set max_new_tokens in VideoQA.ask"),
        (evoprune.read_ahead, "budget", "set budget in VideoQA.load"),
        # no such option anywhere
        (Qa.ask, "stream", "iterate over the answer"),
        (Qa.ask, "n", "another seed"),
        (Qa.ask, "messages", "chat(messages=...)"),
        (Qa.load, "trust_remote_code", "False is the only choice"),
        (Qa.load, "xyzzy", "known: model, progress, ahead, revision"),
    ],
)
def test_an_unknown_option_is_answered_by_the_right_way(function, name, says):
    with pytest.raises(TypeError) as raised:
        function(**{name: 1})  # before Python itself misses the other arguments
    message = str(raised.value)
    assert message.startswith(f"unknown option {name!r}; ") and says in message and "\n" not in message


def test_each_flag_of_the_command_line_leads_to_its_option():
    functions = {
        Qa.load: (ModelOptions, PruneOptions),
        Qa.encode: (SamplingOptions,),
        Qa.ask: (GenerationOptions,),
        Qa.stream: (StreamOptions,),
        Qa.find: (FindOptions,),
    }
    tried = 0
    for function, kinds in functions.items():
        for option in (option for kind in kinds for option in fields(kind)):
            flags = [
                part for flag in option.metadata[OPTION].flags for part in flag.split("/") if part.startswith("--")
            ]
            for name in {flag.removeprefix("--").replace("-", "_") for flag in flags} - {option.name}:
                tried += 1
                with pytest.raises(TypeError, match=f"did you mean {option.name}[?]"):
                    function(**{name: 1})
    assert tried > 3


def test_suggestions_are_names_that_exist():
    functions = [Qa.load, Qa.encode, Qa.ask, Qa.stream, Qa.find, evoprune.Cache, EvoPrune, Qa]
    names = {name for function in functions for name in inspect.signature(function).parameters}
    targets = {target.partition("=")[0] for targets in OTHER_NAMES for target in targets.split()}
    assert targets <= names
    for function in functions:
        assert not NOT_OPTIONS.keys() & inspect.signature(function).parameters.keys()


def test_too_many_positional_arguments_are_counted_without_self():
    with pytest.raises(
        TypeError, match=r"VideoQA.load\(\) takes 1 positional argument \(model\); give the others by name"
    ):
        Qa.load("demo", 0.1)
    with pytest.raises(TypeError, match=r"VideoQA.ask\(\) takes 2 positional arguments \(inputs, question\); give the"):
        Qa.ask(None, CLIP, QUESTION, 3)
    with pytest.raises(
        TypeError, match=r"VideoQA.stream\(\) takes no positional arguments; give all arguments by name"
    ):
        Qa.stream(None, CLIP)


def test_names_of_other_libraries_lead_to_public_ones(qa):
    for name in ("load", "from_pretrained", "LLM"):
        with pytest.raises(AttributeError, match=r"did you mean evoprune.VideoQA.load\?"):
            getattr(evoprune, name)
    with pytest.raises(AttributeError, match=r"did you mean VideoQA\?"):
        _ = evoprune.videoQA
    assert not hasattr(evoprune, "__path_of_nothing__")
    with pytest.raises(AttributeError, match=r"no attribute 'from_pretrained'; did you mean VideoQA.load\(model\)\?"):
        _ = Qa.from_pretrained
    with pytest.raises(AttributeError, match=r"did you mean qa.encode\(path\).chat\(\)\?"):
        _ = qa.chat
    with pytest.raises(AttributeError, match=r"did you mean encode\?"):
        _ = qa.encod
    answer = qa.ask(CLIP, QUESTION)
    with pytest.raises(AttributeError, match=r"did you mean answer.report.to_json\(\)\?"):
        answer.json()
    with pytest.raises(AttributeError, match=r"did you mean answer.text.strip\?"):
        answer.strip()
    assert answer.report.answer is None, "an error reads nothing"
    assert f"{answer:>7}|{answer}" == "  green|green"


def test_objects_and_packages_suggest_the_attribute_that_was_meant(qa):
    video = qa.encode(CLIP, frames=4)
    near = {
        "ask": (video, "aks"),
        "report": (video, "raport"),
        "undo": (video.chat(), "undoo"),
        "add": (qa.stream(), "ad"),
        "tokens": (video.report, "token"),
        "clear": (evoprune.Cache(), "clean"),
        "budget": (EvoPrune(budget=0.5), "bugdet"),
        "features": (video.encoded, "feature"),
        "start_s": (evoprune.Moment("a dog", 0.0, 1.0, 0.5, 0.9), "strat_s"),
        "answers": (batch, "answer"),
        "available": (evoprune.methods, "avalable"),
        "RowReader": (batch, "rowreader"),
        "VideoQA": (evoprune, "videoqa"),
        "evoprune.batch.answers": (qa, "batch"),
    }
    for right, (thing, wrong) in near.items():
        with pytest.raises(AttributeError, match=rf"has no attribute '{wrong}'; did you mean {right}\?"):
            getattr(thing, wrong)
    answer = video.ask(QUESTION)
    given = {"qa": qa, "video": video, "answer": answer, "report": answer.report, "evoprune": evoprune}
    for wrong in [
        "qa.budget",
        "qa.method",
        "qa.seed",
        "qa.tokenizer",
        "qa.processor",
        "qa.model",
        "qa.options",
        "qa.config",
        "qa.settings",
        "qa.name",
        "qa.answers",
        "video.tokens",
        "video.warnings",
        "video.kept",
        "answer.kept",
        "answer.time",
        "answer.tokens",
        "answer.warnings",
        "answer.response",
        "answer.confidence",
        "report.kept",
        "report.times",
        "report.text",
        "evoprune.probe",
        "evoprune.version",
    ]:
        with pytest.raises(AttributeError, match="did you mean ") as caught:
            eval(wrong, given)
        eval(re.search(r"did you mean (.*)\?$", str(caught.value))[1], given)  # the suggestion exists
    with pytest.raises(AttributeError, match=r"did you mean video.ask\(question\)\?"):
        video.generate(QUESTION)
    with pytest.raises(
        AttributeError, match=r"did you mean model.generate inside `with evoprune.EvoPrune\(budget=0.1\)"
    ):
        _ = EvoPrune(budget=0.5).generate
    report = pickle.loads(pickle.dumps(copy.deepcopy(video.report)))
    assert report == video.report and not hasattr(report, "__array__")


def test_a_package_that_is_called_suggests_its_function():
    for package, right in ((evoprune.methods, "evoprune.methods.available()"), (batch, "evoprune.batch.answers")):
        with pytest.raises(TypeError, match=rf"^'module' object is not callable; did you mean {re.escape(right)}\?$"):
            package()
        eval(right, {"evoprune": evoprune})


def test_attributes_that_resemble_nothing_get_no_suggestion(qa):
    video = qa.encode(CLIP, frames=4)
    for thing, name in ((video, "metadata"), (qa, "threads"), (qa, "instead"), (video.ask(QUESTION), "colour")):
        with pytest.raises(AttributeError, match=f"has no attribute '{name}'$"):
            getattr(thing, name)


def test_an_attribute_error_inside_a_property_is_not_hidden(qa):
    answer = qa.ask(CLIP, QUESTION)
    answer.report = None
    with pytest.raises(AttributeError, match="'NoneType' object has no attribute"):
        _ = answer.thoughts


def test_a_model_can_be_used_in_a_with_statement_and_after_it():
    with Qa.load("demo", budget=0.25, ahead=CLIP) as qa:
        assert qa.ask(CLIP, QUESTION).text == "green"
    assert qa.ask(CLIP, QUESTION).text == "green"
    with Qa.load("demo", ahead=CLIP) as qa:
        pass
    assert qa.encode(CLIP).ask(QUESTION).text == "green"


def test_several_questions_and_choices_in_one_string_are_refused_with_the_right_code(qa):
    video = qa.encode(CLIP)
    for ask in (lambda questions: qa.ask(CLIP, questions), video.ask, video.chat().ask):
        with pytest.raises(evoprune.UsageError) as raised:
            ask(["What digit is it?", QUESTION])
        questions, assignment, code = [QUESTION], *raised.value.hint.partition(": ")[2].split("; ")
        assert assignment == "video = qa.encode(path)" and eval(code, {"video": video, "questions": questions}) == [
            "green"
        ]
    with pytest.raises(evoprune.UsageError) as raised:
        video.ask([{"role": "user", "content": QUESTION}])
    assert ".chat(messages=" in raised.value.hint
    with pytest.raises(evoprune.UsageError, match=r"did you mean choices=\['red', 'green'\]\?"):
        video.ask(QUESTION, choices="red, green")
    with pytest.raises(evoprune.UsageError, match="use a list"):
        video.ask(QUESTION, choices={"red", "green"})


def test_questions_can_be_asked_from_asyncio(qa):
    video = qa.encode(CLIP)

    async def ask() -> str:
        return await asyncio.to_thread(lambda: video.ask(QUESTION).text)

    assert asyncio.run(ask()) == "green"


def test_a_suggestion_imports_no_torch():
    code = (
        "import sys, evoprune\n"
        "for wrong in (lambda: evoprune.load, lambda: evoprune.read_frames('a', max_tokens=3),\n"
        "              lambda: evoprune.read_ahead('a', budget=0.1)):\n"
        "    try:\n        wrong()\n    except (AttributeError, TypeError) as problem:\n        print(problem)\n"
        "print('torch' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert [line.partition("; ")[2] for line in out[:3]] == [
        "did you mean evoprune.VideoQA.load?", "set max_new_tokens in VideoQA.ask", "set budget in VideoQA.load or EvoPrune",
    ] and out[3] == "False"  # fmt: skip


@pytest.mark.parametrize("name", ["batch", "bench", "methods", "session", "video"])
def test_a_documented_package_is_an_attribute_before_it_is_imported(name):
    assert evoprune.__getattr__(name).__name__ == f"evoprune.{name}"
