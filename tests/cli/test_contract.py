"""The contract of the command line: exit code, what is on stdout and on stderr, with and without a terminal.

`CASES` run inside this process, each in every way that it can be looked at; `PROCESSES` need a process of their own.
"""

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import termios
import time
import tomllib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from evoprune_cli.terminal import Terminated
from tests.cli.screen import Screen, visible
from tests.video.files import numbered_frames, spoil, write_video

ROOT = Path(__file__).parents[2]
CLIP, QUESTION, ANSWER = "samples/square.mp4", "What colour is the square?", "green"
ASK = ("ask", CLIP, QUESTION)
BATCH = ("batch", CLIP, "-Q", QUESTION, "-m", "demo", "--overwrite", "-o", "{tmp}/answers.jsonl")


@dataclass(frozen=True)
class Case:
    """A command and what must come of it.

    Attributes:
        args: the command line.
        code: its exit code.
        says: what stderr must hold; if the command fails, as part of its two lines. "" for a stderr that stays empty.
        out: what stdout must be if it does not fail; None for anything.
        stdin: what is piped in; None if stdin must not be read. `at_terminal`: it is a terminal instead.
        env: variables to set. `encoding`: of stdout and stderr.
        breaks: a function, and what it raises instead of doing its work.
        stage: that the JSON error names.
        lines: of JSON, where that is asked for.
        ways: ways to run it, of `pipe`, `terminal` (stderr is one), `narrow` (with 50 columns) and `json` (with --json).
    """

    args: tuple[str, ...]
    code: int = 0
    says: str = ""
    out: str | None = f"{ANSWER}\n"
    stdin: str | None = None
    at_terminal: bool = False
    env: dict[str, str] = field(default_factory=dict)
    encoding: str = "utf-8"
    breaks: tuple[str, BaseException] | None = None
    stage: str | None = None
    lines: int = 1
    ways: tuple[str, ...] = ("pipe", "terminal", "json")


def fails(code: int, says: str, *args: str, **more) -> Case:
    return Case(args, code, says, **more)


def out_of_memory(stage: str, function: str, problem: BaseException, says: str | None = None) -> Case:
    return Case(ASK, 5, says or f"out of memory in {stage}", breaks=(function, problem), stage=stage)


PIPE, SCREEN, EVERYWHERE = ("pipe",), ("terminal", "narrow"), ("pipe", "terminal", "narrow")
CUDA_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")
CPU_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory")
CASES = {
    # 0: done
    "answer and stats": Case(ASK, says="first token", ways=("pipe", "terminal", "narrow")),
    "quiet": Case((*ASK, "-q")),
    "both sides": Case(
        (*ASK, "--compare"),
        says="compare",
        out=f"pruned: {ANSWER}\nfull: {ANSWER}\n",
        ways=("pipe", "terminal", "narrow"),
    ),
    "no stats": Case((*ASK, "--no-stats"), ways=PIPE),
    "stats beside JSON": Case((*ASK, "--json", "--stats"), says="first token", out=None, ways=("pipe", "narrow")),
    "everything": Case((*ASK, "-v"), says="versions", ways=("pipe", "narrow")),
    "several questions": Case((*ASK, "-Q", QUESTION, "-q"), out=f"{ANSWER}\n" * 2, lines=2),
    "question from stdin": Case(("ask", CLIP, "-q"), stdin=f"{QUESTION}\n"),
    "stdin stays unread beside -Q": Case(("ask", CLIP, "-Q", QUESTION, "-q")),
    "no colour": Case(ASK, says="first token", env={"NO_COLOR": "1"}, ways=SCREEN),
    "dumb terminal": Case(ASK, says="first token", env={"TERM": "dumb"}, ways=("terminal",)),
    "columns by the environment": Case(ASK, says="first token", env={"COLUMNS": "44"}, ways=("terminal",)),
    "ASCII": Case(("ask", "{tmp}/grün.mp4", QUESTION), says="gr\\xfcn.mp4", encoding="ascii"),
    "warning": Case(("ask", "{tmp}/foreign.mp4", QUESTION, "-q"), says="warning: the demo model", out=None),
    "warning in ASCII": Case(
        ("ask", "{tmp}/foreign.mp4", QUESTION, "-q"), says="warning:", out=None, encoding="ascii", ways=SCREEN
    ),
    "random weights": Case(
        (*ASK, "--load-format", "dummy", "-n", "2", "-q"),
        says="warning: the weights are random",
        out=None,
        ways=("pipe", "terminal", "narrow"),
    ),
    "newline in a name": Case(("ask", "{tmp}/new\nline.mp4", QUESTION), says="new?line.mp4", ways=("pipe", "narrow")),
    "spaces and quotes in a name": Case(("ask", '{tmp}/it\'s "a" clip.mp4', QUESTION), says='it\'s "a" clip.mp4'),
    "a name that is no text": Case(("ask", "{tmp}/caf\udce9.mp4", QUESTION, "-q")),
    "batch": Case(BATCH, says="1 of 1 row answered: 0:", out="", ways=EVERYWHERE),
    "quiet batch": Case((*BATCH, "-q"), out="", ways=EVERYWHERE),
    "damaged video": Case(
        ("ask", "{tmp}/damaged.mp4", QUESTION, "-q"), says="warning: damaged.mp4 is damaged (2 of its packets", out=None
    ),
    "video that was cut off": Case(
        ("ask", "{tmp}/cut.mp4", QUESTION, "-q"), says="warning: cut.mp4 breaks off at 0:0", out=None
    ),
    "machine": Case(("inspect",), out=None),
    "video": Case(("inspect", CLIP, "--scan"), out=None),
    "overlay": Case(("inspect", CLIP, "--overlay", "{tmp}/overlay.png"), out=None, ways=EVERYWHERE),
    "help": Case(("--help",), out=None, ways=("pipe", "narrow")),
    "help of ask": Case(("ask", "-h"), out=None, ways=("pipe", "narrow")),
    "help of batch": Case(("batch", "-h"), out=None, ways=("pipe", "narrow")),
    "help of inspect": Case(("inspect", "--help"), out=None, ways=("pipe", "narrow")),
    "version": Case(("--version",), out=None, ways=PIPE),
    # 1: a bug
    "bug": Case(ASK, 1, "ZeroDivisionError", breaks=("evoprune_cli.ask._check_inputs", ZeroDivisionError("1/0"))),
    "bug in inspect": Case(("inspect", CLIP), 1, "KeyError", breaks=("evoprune_cli.inspect.asdict", KeyError(1))),
    "bug in batch": Case(
        BATCH, 1, "KeyError", breaks=("evoprune.batch.output.remaining", KeyError(1)), ways=EVERYWHERE
    ),
    # 2: usage
    "unknown command": fails(2, "what", "what"),
    "almost a command": fails(2, "Did you mean 'ask'", "aks", CLIP, QUESTION),
    "a video for a command": fails(2, "to ask about a video: evoprune ask", CLIP, QUESTION),
    "no video": fails(2, "INPUT", "ask"),
    "unknown flag": fails(2, "--fpss", "ask", CLIP, QUESTION, "--fpss", "2"),
    "unknown flag of inspect": fails(2, "see evoprune inspect --help", "inspect", CLIP, "--fpss", "2"),
    "a word for a number": fails(
        2, "Invalid value for '--frames': not a valid integer\n", *ASK, "--frames", "abc", ways=PIPE
    ),
    "flag without its value": fails(2, "see evoprune ask --help", "ask", CLIP, "-Q", ways=("pipe", "terminal")),
    "question not quoted": fails(2, "quote the question", "ask", CLIP, "What", "happens?"),
    "too many videos to inspect": fails(2, "unexpected extra words: b.mp4", "inspect", CLIP, "b.mp4"),
    "options after --": fails(2, "put options before it", "ask", "--", CLIP, QUESTION, "-q", ways=PIPE),
    "batch of nothing": fails(2, "no videos", "batch", *BATCH[4:], ways=EVERYWHERE),
    "batch without an output": fails(2, "no output", *BATCH[:-2], ways=EVERYWHERE),
    "batch without a model": fails(2, "EVOPRUNE_MODEL", *BATCH, "-m", "", ways=EVERYWHERE),
    "batch into nowhere": fails(2, "cannot write no/such", *BATCH, "-o", "no/such/answers.jsonl", ways=EVERYWHERE),
    "unknown flag of batch": fails(2, "see evoprune batch --help", *BATCH, "--fpss", "2", ways=EVERYWHERE),
    "empty question": fails(2, "empty", "ask", CLIP, "  "),
    "empty further question": fails(2, "empty", *ASK, "-Q", "", lines=2),
    "question is no text": fails(2, "UTF-8", "ask", CLIP, "caf\udce9"),
    "no question at a terminal": fails(2, "or -i for a prompt", "ask", CLIP, at_terminal=True),
    "no question in stdin": fails(2, "stdin is empty", "ask", CLIP, stdin="\n"),
    "video from stdin, and no question": fails(2, "stdin is the video", "ask", "-"),
    "nobody to type questions": fails(2, "from a terminal", *ASK, "--interactive"),
    "a cache and a video to inspect": fails(2, "not about a video", "inspect", CLIP, "--clear-cache"),
    "budget zero": fails(2, "budget '0'", *ASK, "-b", "0"),
    "budget word": fails(2, "budget 'tiny'", *ASK, "-b", "tiny"),
    "budget nan": fails(2, "budget 'nan'", *ASK, "-b", "nan"),
    "automatic budget": Case((*ASK, "-b", "auto"), says="-b auto:"),
    "automatic budget of a method without": fails(
        2, "cannot let the content decide the budget", *ASK, "-b", "auto", "--method", "pool"
    ),
    "automatic budget of scores": Case((*ASK, "-b", "auto:inflection", "--method", "mmr"), says="-b auto:inflection:"),
    "automatic budget of scores of a method without": fails(2, "has no scores", *ASK, "-b", "auto:inflection"),
    "automatic budget of times": fails(
        2, "auto works with VideoQA, and with commands that ask or evaluate", "profile", "-b", "auto", ways=PIPE
    ),
    "automatic budget in a comparison of a method without": fails(
        2, "has no scores", "eval", "--data", "samples/questions.jsonl", "-b", "auto:inflection", ways=PIPE
    ),
    "budget of the environment": fails(2, "budget '7'", *ASK, env={"EVOPRUNE_BUDGET": "7"}),
    "unknown method": fails(2, "magic", *ASK, "--method", "magic"),
    "method argument without value": fails(2, "NAME=VALUE", *ASK, "--method-arg", "first"),
    "unknown method argument": fails(2, "speed", *ASK, "--method-arg", "speed=1"),
    "bad method argument": fails(2, "first", *ASK, "--method-arg", "first=x"),
    "impossible method argument": fails(2, "allocation", *ASK, "--method-arg", "allocation=x"),
    "fps and frames": fails(2, "fps and frames", *ASK, "--fps", "1", "--frames", "2"),
    "fps is no number": fails(2, "--fps", *ASK, "--fps", "many"),
    "zero frames": fails(2, "frames", *ASK, "--frames", "0"),
    "negative fps": fails(2, "fps", *ASK, "--fps", "-1"),
    "bad time": fails(2, "soon", *ASK, "--start", "soon"),
    "bad time to inspect": fails(2, "soon", "inspect", CLIP, "--end", "soon"),
    "no tokens allowed": fails(2, "visual tokens", *ASK, "--max-visual-tokens", "0"),
    "unknown decoder": fails(2, "vlc", *ASK, "--decoder", "vlc"),
    "no new tokens": fails(2, "--max-new-tokens is 0", *ASK, "-n", "0"),
    "negative temperature": fails(2, "temperature", *ASK, "-t", "-1"),
    "unknown device": fails(2, "abacus", *ASK, "--device", "abacus"),
    "unknown dtype": fails(2, "fp1", *ASK, "--dtype", "fp1"),
    "unknown load format": fails(2, "gguf", *ASK, "--load-format", "gguf"),
    "scan of nothing": fails(2, "--scan", "inspect", "--scan"),
    "overlay of nothing": fails(2, "--overlay needs a video", "inspect", "--overlay", "a.png"),
    "overlay of no known kind": fails(2, "has '.jpg'", "inspect", CLIP, "--overlay", "a.jpg", ways=EVERYWHERE),
    "overlay without an ending": fails(2, "has no ending", "inspect", CLIP, "--overlay", "overlay"),
    "overlay into nowhere": fails(
        2, "cannot write no/such/a.gif", "inspect", CLIP, "--overlay", "no/such/a.gif", ways=EVERYWHERE
    ),
    "overlay by an unknown method": fails(2, "magic", "inspect", CLIP, "--overlay", "{tmp}/a.png", "--method", "magic"),
    "overlay for a question": fails(
        2, "reads the question, and an overlay", "inspect", CLIP, "--overlay", "{tmp}/a.png", "--method", "dart"
    ),
    "overlay of a missing video": fails(3, "no such file: a.mp4", "inspect", "a.mp4", "--overlay", "{tmp}/a.png"),
    # 3: video
    "missing video": fails(3, "no such file: no/such.mp4", "ask", "no/such.mp4", QUESTION, stage="read"),
    "missing video, several questions": fails(3, "no/such", "ask", "no/such.mp4", "-Q", "a", "-Q", "b", lines=2),
    "missing video of a batch": fails(3, "no such file: a.mp4", "batch", "a.mp4", *BATCH[2:], ways=EVERYWHERE),
    "a text file": fails(3, "LICENSE is not a video: it is a text file", "ask", "LICENSE", QUESTION, stage="read"),
    "a text file to inspect": fails(3, "LICENSE is not a video: it is a text file", "inspect", "LICENSE", stage="read"),
    "missing video to inspect": fails(3, "no such file: no/such.mp4", "inspect", "no/such.mp4", stage="read"),
    "question before video": fails(3, "videos and pictures come first", "ask", QUESTION, CLIP),
    "nothing for a video": fails(3, "no such file: ''", "ask", "", QUESTION),
    "not a video": fails(3, "LICENSE", "ask", "LICENSE", QUESTION),
    "empty file": fails(3, "is empty", "ask", "{tmp}/empty.mp4", QUESTION),
    "folder without images": fails(3, "no images", "ask", "tests/cli", QUESTION),
    "a device": fails(3, "- reads one from standard input", "ask", "/dev/null", QUESTION),
    "a url": fails(3, "yt-dlp", "ask", "https://example.org/a.mp4", QUESTION),
    "start beyond the end": fails(3, "6 s", *ASK, "--start", "1:00"),
    "end before start": fails(3, "start 3", *ASK, "--start", "3", "--end", "2"),
    "control characters": fails(
        3, "no such file: no?[31m?such.mp4", "ask", "no\x1b[31m\nsuch.mp4", QUESTION, ways=("pipe", "terminal")
    ),
    "missing video in ASCII": fails(3, "gr\\xfcn", "ask", "no/grün.mp4", QUESTION, encoding="ascii"),
    # 4: model
    "no such model": fails(4, "no/such model", *ASK, "-m", "no/such model", stage="load"),
    "model of the environment": fails(4, "no/such model", *ASK, env={"EVOPRUNE_MODEL": "no/such model"}),
    "folder without a model": fails(4, "config.json", *ASK, "-m", "samples"),
    "folder without a model for a batch": fails(4, "config.json", *BATCH, "-m", "samples", ways=EVERYWHERE),
    "folder without a model to inspect for": fails(4, "config.json", "inspect", CLIP, "-m", "samples", stage="load"),
    "model not in the cache": fails(4, "nobody/nothing", *ASK, "-m", "nobody/nothing", "--offline"),
    "random weights without a tokenizer": fails(
        4,
        "evoprune profile",
        *ASK,
        "-m",
        "Qwen/Qwen2.5-VL-3B-Instruct",
        "--load-format",
        "dummy",
        stage="load",
        breaks=("evoprune.session.loading.model.random_model", AssertionError("weights were made")),
    ),
    "random weights of unknown dimensions": fails(
        4, "no bundled config for nobody/nothing", *ASK, "-m", "nobody/nothing", "--load-format", "dummy"
    ),
    # 5: out of memory
    "weights do not fit": out_of_memory(
        "load", "evoprune.session.loading.model.load_weights", CPU_FULL, says="the weights of demo"
    ),
    "frames do not fit": out_of_memory("read", "evoprune.video.sandbox.channel.mmap.mmap", OSError(12, "no memory")),
    "pictures do not fit": out_of_memory("preprocess", "evoprune.session.encoding.pixel_patches", CPU_FULL),
    "tower does not fit": out_of_memory("encode", "evoprune.session.encoding.encode_rows", CUDA_FULL),
    "prompt does not fit": out_of_memory("prefill", "evoprune.session.prompting.prefill", CUDA_FULL),
    "nothing fits": fails(5, "memory", *ASK, breaks=("evoprune_cli.ask._check_inputs", MemoryError())),
    "weights do not fit in a batch": Case(
        BATCH,
        5,
        "the weights of demo",
        breaks=("evoprune.session.loading.model.load_weights", CPU_FULL),
        ways=EVERYWHERE,
    ),
    # stopped from outside
    "interrupted while loading": Case(
        ASK, 130, "", breaks=("evoprune.session.loading.model.load_weights", KeyboardInterrupt())
    ),
    "terminated while reading": Case(ASK, 143, "", breaks=("evoprune.video.frames.stream_frames", Terminated())),
    "batch interrupted while loading": Case(
        BATCH,
        130,
        "to go on: ",
        breaks=("evoprune.session.loading.model.load_weights", KeyboardInterrupt()),
        ways=EVERYWHERE,
    ),
    "interrupted scan": Case(
        ("inspect", CLIP, "--scan"), 130, "", breaks=("evoprune.video.frames.scan", KeyboardInterrupt())
    ),
}
# Two of three cases run by default, each in one of its ways; all in all of them with -m full.
WAYS = [
    pytest.param(
        case, way, id=f"{name}-{way}", marks=[pytest.mark.full] * (number % 3 == 2 or turn != number % len(case.ways))
    )
    for number, (name, case) in enumerate(CASES.items())
    for turn, way in enumerate(case.ways)
]


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of clips with difficult names."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("grün", "new\nline", 'it\'s "a" clip', "caf\udce9"):
        shutil.copy(ROOT / CLIP, folder / f"{name}.mp4")
    (folder / "empty.mp4").touch()
    write_video(folder / "foreign.mp4", np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8), fps=6)
    spoil(ROOT / CLIP, folder / "damaged.mp4", {40, 50})
    whole = write_video(folder / "whole.mp4", numbered_frames(60), container_options={"movflags": "faststart"})
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    return folder


@pytest.mark.few(44)
@pytest.mark.parametrize(("case", "way"), WAYS)
def test_contract(cli, clips, monkeypatch, case, way):
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    if case.breaks:
        monkeypatch.setattr(case.breaks[0], _raiser(case.breaks[1]))
    columns = {"terminal": 100, "narrow": 50}.get(way)
    args = [*(word.replace("{tmp}", str(clips)) for word in case.args), *(["--json"] if way == "json" else [])]
    result = cli(*args, stdin=case.stdin, terminal=case.at_terminal, columns=columns, encoding=case.encoding)
    shown = visible(result.err) if columns else result.err.splitlines()

    assert result.code == case.code, result.err
    assert "Traceback" not in result.err and "\x1b" not in result.out
    if columns is None or case.env.get("TERM") == "dumb":
        assert "\x1b" not in result.err
    elif shown:  # errors and warnings are coloured, stats dim
        assert bool(re.search(r"\x1b\[(3\d|2m)", result.err)) == ("NO_COLOR" not in case.env)
    if case.encoding == "ascii":
        assert result.out.isascii() and result.err.isascii()
    widest = min(columns or 80, int(case.env.get("COLUMNS", 80)), 80)
    loose = () if columns else ("error:", "hint:", "warning:")  # one line each for programs that read them
    assert all(len(line) <= widest for line in shown if not line.startswith(loose)), shown
    shown = unfolded(shown) if columns and case.code else shown
    if way == "json":
        _check_json(case, result)
    elif case.code:
        assert result.out == ""
    elif case.out is not None:
        assert result.out == case.out
    if case.code in (130, 143):
        assert case.says in "\n".join(shown) if case.says else shown == []
    elif case.code:
        assert len(shown) == 2 and shown[0].startswith("error: ") and shown[1].startswith("hint: "), shown
        assert case.says in "\n".join(shown)
    elif way == "json" and not case.says.startswith("warning"):
        assert shown == []
    else:
        assert case.says in "\n".join(shown) if case.says else shown == []


def unfolded(lines: list[str]) -> list[str]:
    """Each line with those that go on with it, which are indented."""
    whole = []
    for line in lines:
        if line.startswith("     "):
            whole[-1] += f" {line.strip()}"
        else:
            whole.append(line)
    return whole


def _raiser(problem: BaseException):
    def broken(*_, **__):
        raise problem.with_traceback(None)

    return broken


def _check_json(case: Case, result) -> None:
    """One line for every question, whatever comes of it; or for an inspection."""
    records = [json.loads(line) for line in result.out.splitlines()]
    assert result.out.endswith("\n") and len(records) == case.lines
    for record in records:
        if case.args[0] == "inspect":
            assert record["schema"] == "evoprune/inspect@1" and "question" not in record and "answer" not in record
        else:
            assert record["schema"] == "evoprune/answer@1"
            assert record["finish_reason"] == {0: "stop", 130: "interrupt", 143: "interrupt"}.get(case.code, "error")
        if case.code == 0:
            assert record["error"] is None
            continue
        assert record.get("answer") is None
        assert record["error"].keys() == {"code", "type", "stage", "message", "hint"}
        assert record["error"]["code"] == case.code
        assert case.stage in (None, record["error"]["stage"])
        if case.encoding == "utf-8":  # in JSON characters are escaped otherwise
            assert case.says in f"{record['error']['message']}\n{record['error']['hint']}"


@pytest.mark.parametrize("code", [1, 3])
def test_a_traceback_only_where_it_is_asked_for(cli, monkeypatch, code):
    if code == 1:
        monkeypatch.setattr("evoprune_cli.ask._check_inputs", _raiser(ZeroDivisionError("1/0")))
    args = ASK if code == 1 else ("ask", "no/such.mp4", QUESTION)
    by_flag = cli(*args, "--debug")
    monkeypatch.setenv("EVOPRUNE_DEBUG", "1")
    for result in (by_flag, cli(*args)):
        assert result.code == code and result.out == ""
        assert result.err.startswith("Traceback") and result.err.splitlines()[-2].startswith("error: ")
    monkeypatch.setenv("EVOPRUNE_DEBUG", "0")
    assert "Traceback" not in cli(*args).err


def test_no_command_is_answered_with_the_help_as_an_error(cli):
    result = cli()
    assert (result.code, result.out) == (2, "") and result.err.startswith("Usage: evoprune")
    assert result.err == cli("--help").out


def test_what_was_found_before_an_inspection_failed(cli):
    record = cli("inspect", CLIP, "-m", "samples", "--json").record
    assert record["video"]["codec"] == "h264" and "plan" not in record


@dataclass(frozen=True)
class Process:
    """A command in a process of its own, what happens to it there, and what must come of it."""

    args: tuple[str, ...]
    code: int
    out: str = ""
    err: str = ""
    event: str | None = None
    env: dict[str, str] = field(default_factory=dict)


ENDLESS = ("ask", CLIP, QUESTION, "-m", "{endless}", "-n", "30000", "-t", "1", "--seed", "5")
C_LOCALE = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
PROCESSES = {
    "video from stdin": Process(("ask", "-", QUESTION, "-q"), 0, f"{ANSWER}\n"),
    "C locale": Process(("ask", "{grün}", QUESTION), 0, f"{ANSWER}\n", "first token", env=C_LOCALE),
    "Ctrl-C while it answers": Process(ENDLESS, -signal.SIGINT, "\n", "generate", "ctrl-c"),
    "terminated while it answers": Process(ENDLESS, 143, "\n", "generate", "terminate"),
    "interrupted early": Process((*ENDLESS, "--json"), -signal.SIGINT, '"finish_reason":"interrupt"', "", "interrupt"),
    "reader of the answer gone": Process(("ask", CLIP, "Describe the video.", "-q"), 0, event="close stdout"),
    "disk full": Process(("inspect", CLIP, "--json"), 2, "", "error: cannot write the output: No space", "full"),
    "reader of the help gone": Process(("--help",), 0, event="close stdout"),
    "reader of the version gone": Process(("--version",), 0, event="close stdout"),
    "reader of the errors gone": Process(("ask", "no/such.mp4", QUESTION), 3, event="close stderr"),
}


def marks_of(case: Process) -> list:
    """Those that are stopped by Ctrl-C or cannot write."""
    return [] if case.event in ("ctrl-c", "full") else [pytest.mark.full]


@pytest.fixture(scope="module")
def endless(tiny_folder, tmp_path_factory):
    """A model that never ends its turn: no token has the number that would."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": []}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def _at_the_keyboard(terminal: bool) -> None:
    """In a process about to start: it hears Ctrl-C, although the tests may run where that is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if terminal:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # or Ctrl-C is a mere letter


@pytest.mark.few(1)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=name, marks=marks_of(case)) for name, case in PROCESSES.items()]
)
def test_processes(case, clips, endless):
    names = {"{endless}": str(endless), "{grün}": str(clips / "grün.mp4")}
    screen = Screen(100) if case.event == "ctrl-c" else None
    with (
        open(ROOT / CLIP if "-" in case.args else os.devnull, "rb") as stdin,
        open("/dev/full" if case.event == "full" else os.devnull, "wb") as full,
    ):
        process = subprocess.Popen(
            [sys.executable, "-m", "evoprune_cli", *(names.get(word, word) for word in case.args)],
            stdin=screen.end if screen else stdin,
            stdout=full if case.event == "full" else subprocess.PIPE,
            stderr=screen.end if screen else subprocess.PIPE,
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")}
            | {"OMP_NUM_THREADS": "1"}
            | case.env,
            start_new_session=True,
            preexec_fn=partial(_at_the_keyboard, screen is not None),
        )
    match case.event:
        case "interrupt":
            while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text():
                assert process.poll() is None
                time.sleep(0.01)
            process.send_signal(signal.SIGINT)
        case "terminate":
            assert process.stdout.read(1)  # the answer has begun
            process.terminate()
        case "ctrl-c":
            assert process.stdout.read(1)
            screen.press(b"\x03")
        case "close stdout":
            process.stdout.close()
        case "close stderr":
            process.stderr.close()
    if screen:
        os.close(screen.end)
        out, err = process.stdout.read(), "\n".join(visible(screen.finish())).encode()
    else:
        out, err = (
            b"" if stream is None or stream.closed else stream.read() for stream in (process.stdout, process.stderr)
        )
    code = process.wait(120)
    assert code == case.code, err.decode()
    assert b"Traceback" not in err and b"\x1b" not in err and (err.isascii() or not case.env)
    assert b"\x1b" not in out or case.args[: len(ENDLESS)] == ENDLESS  # who says just anything may say that, too
    assert case.err.encode() in err and (case.err or not err)
    if code == 0:
        assert out.decode() == case.out
    else:  # an answer that was cut short, the JSON record, or nothing
        assert case.out in out.decode() and out[-1:] in (b"", b"\n")


@pytest.mark.parametrize("where", ["raise KeyboardInterrupt", "exec('raise KeyboardInterrupt')"])
@pytest.mark.parametrize("way", ["module", "script"])
def test_interrupted_while_the_command_line_is_imported(tmp_path, way, where):
    (tmp_path / "typer.py").write_text(where)
    module, _, name = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["evoprune"].partition(
        ":"
    )
    script = f"from {module} import {name}; {name}()"  # as pip writes it
    done = subprocess.run(
        [sys.executable, *(["-m", "evoprune_cli"] if way == "module" else ["-c", script])],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(os.name != "posix", reason="shells of Unix")
def test_ctrl_c_ends_the_loop_of_a_shell_too(tmp_path):
    """A shell goes on with the next round after a program that handled the signal and ended with a code of its own."""
    begins = "import sys, signal, os; sys.argv = ['evoprune', 'ask']; from evoprune_cli import main; "
    interrupted = (
        "main.run = lambda: os.kill(os.getpid(), signal.SIGINT); from evoprune_cli.__main__ import start; start()"
    )
    loop = f'for i in 1 2; do {shlex.quote(sys.executable)} -c "{begins}{interrupted}"; echo "code $?"; done'
    done = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout == "code 130\ncode 130\n"  # what a shell calls the end by this signal
    one = subprocess.run([sys.executable, "-c", begins + interrupted], capture_output=True, timeout=60)
    assert (one.returncode, one.stderr) == (-signal.SIGINT, b"")
