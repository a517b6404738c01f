"""Front ends name the options that they accept; each option does what it says in each of them, or is refused.

The tests cross every option with every front end, with a value that is not the default. Everything that a front end reports (its
records, and its lines on stderr) is compared with a run without the option.
"""

import functools
import inspect
import json
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

import evoprune
from evoprune.language import GenerationOptions
from evoprune.session import FindOptions, ModelOptions, PipelineOptions, PruneOptions, StreamOptions
from evoprune.signatures import takes
from evoprune.util import OPTION
from evoprune.video import SamplingOptions, probe
from evoprune_cli import options as opt
from evoprune_cli.main import app
from tests.contract.running import command, materials, running
from tests.speech import LoudModel, stand_in, write_sounding

NAMES = [each.name for kind in PipelineOptions.KINDS for each in fields(kind)]
KIND = {each.name: kind for kind in PipelineOptions.KINDS for each in fields(kind)}
COMMANDS = typer.main.get_command(app).commands
# The Python functions with options, each with arguments that are never looked at, because the options are checked first.
FUNCTIONS: dict[str, Callable] = {
    "VideoQA": lambda **given: evoprune.VideoQA(None, **given),
    "VideoQA.load": lambda **given: evoprune.VideoQA.load("none", **given),
    "VideoQA.encode": lambda **given: evoprune.VideoQA.encode(None, "none", **given),
    "VideoQA.ask": lambda **given: evoprune.VideoQA.ask(None, "none", "?", **given),
    "VideoQA.stream": lambda **given: evoprune.VideoQA.stream(None, **given),
    "VideoQA.find": lambda **given: evoprune.VideoQA.find(None, "none", "?", **given),
    "EncodedInputs.ask": lambda **given: evoprune.EncodedInputs.ask(None, "?", **given),
    "Chat.ask": lambda **given: evoprune.Chat.ask(None, "?", **given),
    "processor_inputs": lambda **given: evoprune.processor_inputs("none", "none", "?", **given),
    "read_ahead": lambda **given: evoprune.read_ahead("none", "none", **given),
    "read_frames": lambda **given: evoprune.read_frames("none", **given),
}


def accepted(name: str) -> set[str]:
    """Return the options that a Python function names in its signature."""
    function = evoprune
    for part in name.split("."):
        function = getattr(function, part)
    return {*inspect.signature(function).parameters} & {*NAMES}


def test_each_option_is_named_by_a_command_and_by_a_python_function():
    in_commands = {name for each in COMMANDS.values() for name in each.callback.names}
    in_python = {name for function in FUNCTIONS for name in accepted(function)}
    assert in_commands == in_python == {*NAMES} and len(NAMES) == len({*NAMES})


def test_a_front_end_cannot_name_an_unknown_option():
    with pytest.raises(ValueError, match="no option is called 'speed'"):
        opt.command("fps", "speed", short="fps")
    with pytest.raises(ValueError, match="no option is called 'fps'"):
        takes(evoprune.EvoPrune, names=["budget", "fps"])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_python_function_refuses_options_that_it_does_not_name(function):
    for name in {*NAMES} - accepted(function) - {"model"}:
        with pytest.raises(TypeError, match=name):
            FUNCTIONS[function](**{name: None})


# The value of each option.


@dataclass
class Case:
    """A value of an option, and what it changes.

    Attributes:
        value: The value as a Python function gets it.
        shows: Names of fields, at least one of which must change. If a value is given for a name, fields of this name must have it.
        given: Other options that this option needs. The run without the option gets them too.
        says: A pattern in the error that the value causes, at least on some machines or with some models.
        clip: The input.
    """

    value: Any
    shows: dict[str, Any] = field(default_factory=dict)
    given: dict[str, Any] = field(default_factory=dict)
    says: str = ""
    clip: str = "samples/square.mp4"


ANY = object()  # a value that is not checked
HOT = {"temperature": 2.0}
SAID = {"subtitles": "spoken.srt"}
CASES = {
    "model": Case("demo-scenes", {"id": "demo-scenes", "model": "demo-scenes"}),
    "revision": Case("old", says="no revision 'old'"),
    "device": Case("cuda:99", says="cuda|CUDA"),
    "dtype": Case("bf16", {"dtype": "bf16"}),
    "quantize": Case("int8", {"quantize": "int8", "weights_bytes": ANY}),
    "store_quantized": Case(True, {"stored": ANY}, {"quantize": "int8"}),
    "load_format": Case("dummy", {"load_format": "dummy", "weights": "random"}),
    "engine": Case("transformers", {"engine": "transformers"}, says="is run by transformers"),
    "offline": Case(True, given={"model": "none/none"}, says="network access is disabled"),
    "threads": Case(2, {"threads": 2}),
    "budget": Case(0.5, {"budget": 0.5}),
    "method": Case("random", {"method": "random"}),
    "seed": Case(3, {"kept_per_pair": ANY, "score": ANY, "seed": 3, "overlay": ANY}, {"method": "random"}),
    "fps": Case(1.0, {"frames": 6, "tokens": ANY, "stderr": ANY, "live_share": ANY}),
    "frames": Case(4, {"frames": 4, "tokens": ANY, "live_share": ANY}),
    "start_s": Case(2.0, {"start_s": 2.0, "stderr": ANY, "live_share": ANY}),
    "end_s": Case(-2.0, {"end_s": 4.0, "stderr": ANY, "live_share": ANY}),
    "max_frames": Case(4, {"frames": 4, "tokens": ANY, "live_share": ANY}),
    "max_visual_tokens": Case(
        40, {"visual_tokens_in": ANY, "visual_tokens": ANY, "tokens": ANY, "stderr": ANY, "live_share": ANY}
    ),
    "frame_rate": Case(4.0, {"fps": 4.0, "tokens": ANY, "stderr": ANY, "live_share": ANY}, clip="frames"),
    "decoder": Case("decord", {"decoder": "decord"}, says="decord"),
    "seek": Case(
        "keyframes",
        {"seek": "keyframes", "kl": ANY, "accuracy": ANY, "overlay": ANY},
        {"frames": 2},
        clip="samples/three.mp4",
    ),
    "subtitles": Case("spoken.srt", {"lines": 1}),
    "max_subtitle_tokens": Case(2, {"lines_in_prompt": 0}, SAID),
    "speech": Case("speech", {"heard": ANY}, clip="sound.mp4"),
    "max_new_tokens": Case(1, {"max_new_tokens": 1}),
    "temperature": Case(2.0, {"temperature": 2.0}),
    "top_p": Case(0.5, {"top_p": 0.5}, HOT),
    "top_k": Case(5, {"top_k": 5}, HOT),
    "repetition_penalty": Case(1.5, {"repetition_penalty": 1.5}),
    "system": Case("Say nothing.", {"prompt": ANY}),
    "think": Case("on", {"think": "on"}, says="does not support thinking"),
    "stop": Case(["e"], {"stop": ["e"]}),
    "logprobs": Case(2, {"logprobs": ANY}),
    "schema": Case({"type": "integer"}, {"schema": ANY}),
    "regex": Case("[0-9]", {"regex": "[0-9]"}),
    "choices": Case(["green", "red"], {"choices": ANY}),
    "choice_score": Case("mean", {"choice_score": "mean"}, {"choices": ["green", "red"]}),
    "window_s": Case(2.0, {"windows": 3}),
    "memory_s": Case(2.0, {"thinned": ANY}, {"window_s": 1.0}),
    "memory_tokens": Case(30, {"thinned": ANY}, {"window_s": 1.0}),
    "top": Case(1, {"top": 1}),
    "min_score": Case(1.0, {"moments": ANY}),
    "segment_s": Case(2.0, {"stderr": ANY}),
    "total_tokens": Case(40, {"stderr": ANY}),
    "prompt": Case("Is it {}?", {"score": ANY}, {"min_score": 0.0}),
    "yes": Case("green", {"score": ANY}, {"min_score": 0.0}),
    "no": Case("green", {"score": ANY}, {"min_score": 0.0}),
}


def test_each_option_has_a_case():
    assert {*CASES} == {*NAMES}
    for name, case in CASES.items():
        (default,) = (each.default for each in fields(KIND[name]) if each.name == name)
        assert case.value != default and (case.shows or case.says), name


# What commands report.

Q = "What colour is the square?"
RUNS = {
    "ask": ["{clip}", Q, "--json"],
    "ask --via": ["{clip}", Q, "--json", "--via", "{server}"],
    "batch": ["{clip}", "-Q", Q, "-o", "out/rows.jsonl"],
    "batch --via": ["{clip}", "-Q", Q, "-o", "out/rows.jsonl", "--via", "{server}"],
    "find": ["{clip}", "a green square", "--json", "-o", "out/found.jsonl"],
    "watch": ["{clip}", "-Q", Q, "--json"],
    "inspect": ["{clip}", "--json"],
    "inspect --overlay": ["{clip}", "--json", "--overlay", "out/overlay.png"],
    "eval": ["--data", "row.jsonl", "-b", "0.5", "--json", "-o", "out/run"],
    "tune": ["{clip}", "-Q", Q, "-b", "0.5", "--time-limit", "60", "--json"],
    "profile": ["--frames", "2", "--size", "56x56", "--repeat", "1", "--warmup", "0", "-b", "0.5", "--format", "json"],
    "verify": ["{clip}", "--quick", "--json"],
}
# Front ends that answer so quickly that all of their options are tried in the usual test run.
QUICK = ("inspect", "VideoQA.encode", "read_frames", "read_ahead")
# Fields that differ from run to run, or that repeat others.
IGNORED = re.compile(
    r"(\]|^result)\.id$|(^|\.)(created_utc|time_ms|rate|startup|(batch|settings)\.files|inputs|cache|samples|matmul|ratio|rounds|digest|\w*_ms|"
    r"\w*seconds|(peak|own|mapped|available)_bytes|used_if_free_bytes|enough|first_token|frontier)(\.|\[|$)"
)


def leaves(value: Any, at: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and value of each field of a JSON value that has no fields itself."""
    if isinstance(value, list) and all(isinstance(each, dict) and "name" in each for each in value):
        value = {each["name"]: each for each in value}  # sorted by time
    if isinstance(value, dict) and value:
        for name, each in value.items():
            yield from leaves(each, f"{at}.{name}" if at else name)
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for number, each in enumerate(value):
            yield from leaves(each, f"{at}[{number}]")
    else:
        yield at, value


def typed(name: str, value: Any, command_name: str) -> list[str]:
    """Return the words that set an option on the command line."""
    (parameter,) = (each for each in COMMANDS[command_name.split()[0]].params if each.name == name)
    flag = parameter.opts[-1]
    if value is True:
        return [flag]
    if isinstance(value, dict):
        value = json.dumps(value)
    if isinstance(value, list):
        value = ",".join(value)
    return [f"{flag}={value}"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """Create the inputs, and a speech model that writes a line for each loud part."""
    made = materials(tmp_path_factory.mktemp("options"))
    write_sounding(made / "sound.mp4", 6, [(1, 2), (3, 5)])
    with pytest.MonkeyPatch.context() as patches:
        stand_in(patches, made / "speech")
        yield made


SEEN: dict[tuple, tuple[int, dict[str, Any]]] = {}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    """Serve the demo model. Yields the server's URL."""
    pytest.importorskip("starlette", reason="the server is not installed")
    from tests.plugins.serve.serving import serving

    with serving(demo(), tmp_path_factory.mktemp("server")) as running_server:
        yield running_server.url


def observed(
    folder: Path, name: str, clip: str, options: dict[str, Any], server: str = ""
) -> tuple[int, dict[str, Any]]:
    """Run a command with options. Returns its exit code, and all fields that it reports, by path."""
    key = name, clip, json.dumps(options)
    if key not in SEEN:
        LoudModel.calls.clear()
        shutil.rmtree(folder / "cache", ignore_errors=True)
        with running(folder):
            row = {"video": clip, "question": Q, "answer": "green"}
            Path("row.jsonl").write_text(json.dumps(row), encoding="utf-8")
            words = [word for option, value in options.items() for word in typed(option, value, name)]
            if name in ("batch", "profile") and "model" not in options:
                words += ["-m", "demo"]
            code, out, err = command(
                *name.split()[:1], *(word.format(clip=clip, server=server) for word in RUNS[name]), *words
            )
            found = {
                "stdout": [json.loads(line) for line in out.splitlines()],
                "files": {file.stem: contents(file) for file in sorted(Path("out").rglob("*")) if file.is_file()},
                "stderr": err,
                "stored": any(file.is_file() for file in (folder / "cache").rglob("*")),
                "threads": torch.get_num_threads(),
                "heard": len(LoudModel.calls),
            }
        SEEN[key] = code, {path: value for path, value in leaves(found) if not IGNORED.search(path)}
    return SEEN[key]


def contents(file: Path) -> Any:
    if file.suffix == ".json":
        return json.loads(file.read_text(encoding="utf-8"))
    if file.suffix == ".jsonl":
        return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return hash(file.read_bytes())


# Options that need another case with one command.
URL = "http://127.0.0.1:9/clip.mp4"
HEARD = {"speech": "speech"}
OTHER_CASES = {
    ("inspect", "offline"): Case(True, says="offline", clip=URL),
    ("inspect --overlay", "offline"): Case(True, says="offline", clip=URL),
    **{
        (f"{name} --via", option): replace(CASES[option], shows={}, says="chose when it was started")
        for name in ("ask", "batch")
        for option in ModelOptions.LOADING
    },
    **{
        (f"{name} --via", option): Case(CASES[option].value, says=says)
        for name in ("ask", "batch")
        for option, says in {"model": "serves demo, not demo-scenes", "speech": "a speech model, not a folder"}.items()
    },
    ("find", "max_subtitle_tokens"): Case(2, {"score": ANY}, HEARD | {"min_score": 0.0}, clip="sound.mp4"),
    ("find", "speech"): Case("speech", {"moments": ANY}, clip="sound.mp4"),
    ("eval", "speech"): Case("speech", {"tflop_3b_prefill": ANY}, clip="sound.mp4"),
    ("eval", "max_subtitle_tokens"): Case(2, {"tflop_3b_prefill": ANY}, HEARD, clip="sound.mp4"),
    ("find", "seek"): Case("exact", {"seek": "exact"}),
    ("verify", "engine"): Case("transformers", {"largest_error": ANY}),
}
# Options that by nature leave no trace in what a front end reports. The tests check that they change nothing else.
UNTRACED = {
    ("inspect --overlay", "engine"): "the language model is loaded, but does not run",
    ("inspect --overlay", "decoder"): "both decoders read the same frames; ask records the decoder of the same plan",
    ("VideoQA.find", "top"): "the clip has a single moment; tests/moments/test_search.py has several",
    ("processor_inputs", "decoder"): "both decoders read the same frames; VideoQA.encode records the decoder",
    ("read_frames", "decoder"): "both decoders read the same frames; VideoQA.encode records the decoder",
    ("read_ahead", "store_quantized"): "the model's options have it, but only loading stores weights",
    ("read_ahead", "speech"): "transcribed in the background; tests/session/test_speech.py waits for it",
    ("read_ahead", "subtitles"): "frames do not depend on subtitles, which are read when the input is opened",
    ("read_ahead", "max_subtitle_tokens"): "frames do not depend on subtitles, which are read when the input is opened",
}
NOISY = {"stdout", "0"}
WITH_OVERLAY = ("seed", "seek", "decoder", "engine", "threads", "store_quantized")  # have no effect without --overlay


# Fields that options of a kind never change.
OTHERS = {
    PruneOptions: r"\.(sampling|video|model)\.",
    SamplingOptions: r"\.(generation|model)\.",
    GenerationOptions: r"\.(sampling|video|pruning|model)\.",
    StreamOptions: r"\.(generation|video|model)\.",
    FindOptions: r"\.(sampling|video|model)\.",
}


def crossed() -> list[Any]:
    return [
        pytest.param(name, option, marks=() if name in QUICK else pytest.mark.full, id=f"{name} {option}")
        for name in RUNS
        for option in COMMANDS[name.split()[0]].callback.names
        if not (name == "inspect" and option in WITH_OVERLAY)
    ]


@pytest.mark.parametrize(("name", "option"), crossed())
def test_an_option_of_a_command_does_what_it_says(request, folder, name, option):
    server = request.getfixturevalue("server") if "--via" in name else ""
    case = OTHER_CASES.get((name, option), CASES[option])
    given = {each: value for each, value in case.given.items() if each in COMMANDS[name.split()[0]].callback.names}
    code, after = observed(folder, name, case.clip, given | {option: case.value}, server)
    said = re.search(case.says, "".join(map(str, after.values()))) if case.says else None
    if said or not case.shows:
        assert said, after
        return
    _, before = observed(folder, name, case.clip, given, server)
    assert code in (0, 6, 7), after["stderr"]
    paths = sorted(before.keys() | after.keys())
    changed = {path: after.get(path) for path in paths if before.get(path) != after.get(path)}
    check_changes(name, option, case, changed)


def check_changes(name: str, option: str, case: Case, changed: dict[str, Any]) -> None:
    """Check that the changed fields, with their values, include one that the option should change, and no unrelated ones."""
    shown = [(part, value) for path, value in changed.items() for part in re.split(r"[.\[\]]+", path)]
    if (name, option) in UNTRACED:
        assert {part for part, _ in shown} <= {
            "result",
            "model",
            "settings",
            "files",
            "out/run/settings",
            option,
        } | NOISY, changed
    else:
        assert any(part in case.shows and case.shows[part] in (ANY, value) for part, value in shown), changed
    for path in changed:
        assert KIND[option] not in OTHERS or not re.search(OTHERS[KIND[option]], path), path
        if echoed := re.search(r"(generation|settings)\.(\w+)", path):
            assert option.startswith(echoed[2].removesuffix("_score").rstrip("s")) or echoed[2] == option, path


def test_outputs_record_all_options_but_these():
    """Otherwise, `--resume` would keep an answer that was made with another value. Rows record their own span."""
    kinds = {*KIND.values()}
    unrecorded = {each.name for kind in kinds for each in fields(kind) if not each.metadata[OPTION].changes_answers}
    assert unrecorded == {"device", "threads", "offline", "store_quantized", *SamplingOptions.SPAN}


# What Python functions return.


def record(answer: evoprune.Answer) -> dict[str, Any]:
    str(answer)  # generates it
    return json.loads(answer.report.to_json())


def watched(clip: str, options: dict[str, Any]) -> dict[str, Any]:
    frames, times_s = evoprune.read_frames(clip, fps=4)
    with demo().stream(**options) as stream:
        for frame, time_s in zip(frames, times_s, strict=True):
            stream.add(frame, time_s)
        return record(stream.ask(Q))


def read_early(clip: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `read_ahead` plans, and whether it reads the frames that `encode` wants with the same options."""
    names = SamplingOptions.FILES
    wanted = SamplingOptions(**{name: value for name, value in options.items() if name in names})
    with evoprune.read_ahead(clip, **options) as ahead:
        assert ahead.model.options == ModelOptions(**{n: v for n, v in options.items() if n not in names})
        plan = ahead.model.plan(probe(clip, folder_fps=wanted.frame_rate), wanted)
        reading = ahead.take(plan)
        assert reading is not None
        reading.close()
        return {"model": vars(ahead.model.options), "plan": repr(plan), "heard": len(LoudModel.calls)}


@functools.cache
def demo() -> evoprune.VideoQA:
    return evoprune.VideoQA.load("demo")


def seen_in_python(name: str, clip: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return everything that can be seen of a call of a Python function, by path."""
    LoudModel.calls.clear()
    made = {"result": returned(name, clip, options), "threads": torch.get_num_threads(), "heard": len(LoudModel.calls)}
    made["stored"] = any(file.is_file() for file in Path("cache").rglob("*"))
    return dict(leaves(made))


_usual: dict[str, dict[str, Any]] = {}


def usually_seen(name: str, clip: str, options: dict[str, Any]) -> dict[str, Any]:
    """Return what `seen_in_python` returned the first time for these arguments, because many options are compared with it."""
    key = repr((name, clip, sorted(options.items())))
    if key not in _usual:
        _usual[key] = seen_in_python(name, clip, dict(options))
    return _usual[key]


def returned(name: str, clip: str, options: dict[str, Any]) -> Any:
    """Call a Python function with options and return what can be seen of the result, as JSON values."""
    match name:
        case "VideoQA":
            return record(evoprune.VideoQA(demo().loaded, **options).ask(clip, Q))
        case "VideoQA.load":
            return record(evoprune.VideoQA.load(**options).ask(clip, Q))
        case "VideoQA.encode":
            return record(demo().encode(clip, **options).ask(Q))
        case "VideoQA.ask":
            return record(demo().ask(clip, Q, **options))
        case "EncodedInputs.ask":
            return record(demo().encode(clip).ask(Q, **options))
        case "Chat.ask":
            return record(demo().encode(clip).chat().ask(Q, **options))
        case "VideoQA.stream":
            return watched(clip, options)
        case "VideoQA.find":
            return {"moments": [vars(each) for each in demo().find(clip, "a green square", **options)]}
        case "processor_inputs":
            made = evoprune.processor_inputs(options.pop("model", "demo"), clip, Q, **options)
            return {each: [*value.shape, value.double().sum().item()] for each, value in made.items()}
        case "read_ahead":
            return read_early(clip, options)
        case "read_frames":
            usual = {} if "fps" in options else {"frames": 3}
            frames, times_s = evoprune.read_frames(clip, **usual | options)
            return {"shape": [*frames.shape], "times": times_s.tolist()}


SHAPES = {
    each: ANY
    for each in ("input_ids", "pixel_values_videos", "second_per_grid_ts", "shape", "times", "plan", "moments")
}
PYTHON_CASES: dict[tuple[str, str], Case] = {
    (name, option): replace(CASES[option], shows=CASES[option].shows | SHAPES)
    for name in ("processor_inputs", "read_ahead", "read_frames", "VideoQA.find")
    for option in accepted(name)
    if option in CASES and CASES[option].shows
} | {
    ("Chat.ask", "system"): Case("Say nothing.", says="one system prompt"),
    ("read_ahead", "device"): Case("cuda:99", {"device": "cuda:99"}),  # looks for it when the model is loaded
}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        pytest.param(name, option, marks=() if name in QUICK else pytest.mark.full, id=f"{name} {option}")
        for name in FUNCTIONS
        for option in NAMES
        if option in accepted(name)
    ],
)
def test_an_option_of_a_python_function_does_what_it_says(folder, name, option):
    case = PYTHON_CASES.get((name, option), CASES[option])
    given = {each: value for each, value in case.given.items() if each in accepted(name)}
    with running(folder):
        before = usually_seen(name, case.clip, given) if case.shows else {}
        try:
            after = seen_in_python(name, case.clip, given | {option: case.value})
        except evoprune.EvopruneError as problem:
            assert case.says and re.search(case.says, str(problem))
            return
        assert case.shows
    paths = [path for path in sorted(before.keys() | after.keys()) if not IGNORED.search(path)]
    changed = {path: after.get(path) for path in paths if before.get(path) != after.get(path)}
    check_changes(name, option, case, changed)
