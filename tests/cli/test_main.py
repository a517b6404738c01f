"""The contract of the command line: exit codes, stdout and stderr, with and without a terminal; hostile input."""

import importlib
import json
import os
import py_compile
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from evoprune import __version__
from evoprune_cli import main, mistakes
from evoprune_cli.terminal import Terminated, encodable
from tests.cli.screen import visible
from tests.quantized import parameters
from tests.video.files import numbered_frames, spoil, write_video

ROOT = Path(__file__).parents[2]
CLIP, QUESTION, ANSWER = "samples/square.mp4", "What colour is the square?", "green"
ASK = ("ask", CLIP, QUESTION)
BATCH = ("batch", CLIP, "-Q", QUESTION, "-m", "demo", "--overwrite", "-o", "{tmp}/answers.jsonl")


@dataclass(frozen=True)
class Case:
    """A command and its expected result.

    Attributes:
        args: the command line.
        code: the exit code.
        says: text that stderr must contain; if the command fails, one of the two lines must contain it. "" means an empty stderr.
        out: expected stdout if the command succeeds, or None to accept anything.
        stdin: piped input, or None if the command must not read stdin.
        at_terminal: whether stdin is a terminal instead of a pipe.
        env: environment variables to set.
        encoding: encoding of stdout and stderr.
        breaks: a function to patch, and the exception that it raises instead of doing its work.
        stage: the stage in the JSON error.
        lines: number of JSON lines, in JSON mode.
        ways: ways to run the command: `pipe`, `terminal` (stderr is a terminal), `narrow` (50 columns) and `json` (with --json).
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
    "answer and stats": Case(ASK, says="first token", ways=EVERYWHERE),
    "quiet": Case((*ASK, "-q")),
    "both sides": Case((*ASK, "--compare"), says="compare", out=f"pruned: {ANSWER}\nfull: {ANSWER}\n", ways=EVERYWHERE),
    "stdin stays unread beside -Q": Case(("ask", CLIP, "-Q", QUESTION, "-q")),
    "no colour": Case(ASK, says="first token", env={"NO_COLOR": "1"}, ways=SCREEN),
    "dumb terminal": Case(ASK, says="first token", env={"TERM": "dumb"}, ways=("terminal",)),
    "columns by the environment": Case(ASK, says="first token", env={"COLUMNS": "44"}, ways=("terminal",)),
    "ASCII": Case(("ask", "{tmp}/grün.mp4", QUESTION), says="gr\\xfcn.mp4", encoding="ascii"),
    "warning": Case(("ask", "{foreign}", QUESTION, "-q"), says="warning: the demo model", out=None),
    "random weights": Case(
        (*ASK, "--load-format", "dummy", "-n", "2", "-q"),
        says="warning: the weights are random",
        out=None,
        ways=EVERYWHERE,
    ),
    "newline in a name": Case(("ask", "{tmp}/new\nline.mp4", QUESTION), says="new?line.mp4", ways=("pipe", "narrow")),
    "a name that is no text": Case(("ask", "{tmp}/caf\udce9.mp4", QUESTION, "-q")),
    "batch": Case(BATCH, says="1 of 1 row answered: 0:", out="", ways=EVERYWHERE),
    "damaged video": Case(
        ("ask", "{tmp}/damaged.mp4", QUESTION, "-q"), says="warning: damaged.mp4 is damaged (2 of its packets", out=None
    ),
    "video that was cut off": Case(
        ("ask", "{tmp}/cut.mp4", QUESTION, "-q"), says="warning: cut.mp4 breaks off at 0:0", out=None
    ),
    "overlay": Case(("inspect", CLIP, "--overlay", "{tmp}/overlay.png"), out=None, ways=EVERYWHERE),
    # 1: a bug
    "bug": Case(ASK, 1, "ZeroDivisionError", breaks=("evoprune_cli.ask._check_inputs", ZeroDivisionError("1/0"))),
    "bug in inspect": Case(("inspect", CLIP), 1, "KeyError", breaks=("evoprune_cli.inspect.asdict", KeyError(1))),
    "bug in batch": Case(
        BATCH, 1, "KeyError", breaks=("evoprune.batch.output.Sources.remaining", KeyError(1)), ways=EVERYWHERE
    ),
    # 2: usage
    "unknown command": fails(2, "what", "what"),
    "a video for a command": fails(2, "to ask about a video: evoprune ask", CLIP, QUESTION),
    "no video": fails(2, "INPUT", "ask"),
    "no number of threads": fails(2, "'many' is not a number of threads", *BATCH, "--threads", "many", ways=EVERYWHERE),
    "a word for a number": fails(
        2, "invalid value for '--frames': not a valid integer\n", *ASK, "--frames", "abc", ways=PIPE
    ),
    "flag without its value": fails(2, "see evoprune ask --help", "ask", CLIP, "-Q", ways=("pipe", "terminal")),
    "options after --": fails(2, "put options before it", "ask", "--", CLIP, QUESTION, "-q", ways=PIPE),
    "empty further question": fails(2, "empty", *ASK, "-Q", "", lines=2),
    "question is no text": fails(2, "UTF-8", "ask", CLIP, "caf\udce9"),
    "no question at a terminal": fails(2, "or -i for a prompt", "ask", CLIP, at_terminal=True),
    "no question in stdin": fails(2, "stdin is empty", "ask", CLIP, stdin="\n"),
    "video from stdin, and no question": fails(2, "stdin is the video", "ask", "-"),
    "a cache and a video to inspect": fails(2, "does not apply to a video", "inspect", CLIP, "--clear-cache"),
    "automatic budget of times": fails(
        2, "auto works only with VideoQA and with commands that ask or evaluate", "profile", "-b", "auto", ways=PIPE
    ),
    # 3: video
    "missing video": fails(3, "no such file: no/such.mp4", "ask", "no/such.mp4", QUESTION, stage="read"),
    "nothing for a video": fails(3, "no such file: ''", "ask", "", QUESTION),
    "a device": fails(3, "- reads one from standard input", "ask", "/dev/null", QUESTION),
    "control characters": fails(
        3, "no such file: no?[31m?such.mp4", "ask", "no\x1b[31m\nsuch.mp4", QUESTION, ways=("pipe", "terminal")
    ),
    "missing video in ASCII": fails(3, "gr\\xfcn", "ask", "no/grün.mp4", QUESTION, encoding="ascii"),
    # 4: model
    "model of the environment": fails(4, "no/such model", *ASK, env={"EVOPRUNE_MODEL": "no/such model"}),
    "random weights without a tokenizer": fails(
        4, "evoprune profile", *ASK, "-m", "Qwen/Qwen2.5-VL-3B-Instruct", "--load-format", "dummy", stage="load"
    ),
    "random weights of unknown dimensions": fails(
        4, "no bundled config for nobody/nothing", *ASK, "-m", "nobody/nothing", "--load-format", "dummy"
    ),
    # 5: out of memory
    "weights do not fit": out_of_memory(
        "load", "evoprune.session.loading.model.load_weights", CPU_FULL, says="the weights of demo"
    ),
    "frames do not fit": out_of_memory("read", "evoprune.video.sandbox.channel.mmap.mmap", OSError(12, "no memory")),
    "pictures do not fit": out_of_memory("preprocess", "evoprune.vision.preprocess.pixel_patches", CPU_FULL),
    "tower does not fit": out_of_memory("encode", "evoprune.session.encoding.encode_rows", CUDA_FULL),
    "prompt does not fit": out_of_memory("prefill", "evoprune.language.generate.LanguageModel.prefill", CUDA_FULL),
    "nothing fits": fails(5, "memory", *ASK, breaks=("evoprune_cli.ask._check_inputs", MemoryError())),
    # stopped from outside
    "interrupted while loading": Case(
        ASK, 130, "", breaks=("evoprune.session.loading.model.load_weights", KeyboardInterrupt())
    ),
    "terminated while reading": Case(ASK, 143, "", breaks=("evoprune.video.frames.stream_frames", Terminated())),
    "interrupted scan": Case(
        ("inspect", CLIP, "--scan"), 130, "", breaks=("evoprune.video.frames.scan", KeyboardInterrupt())
    ),
}


# By default two of three cases run, in one way each; with -m full all cases run in all their ways.
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
    spoil(ROOT / CLIP, folder / "damaged.mp4", {40, 50})
    whole = write_video(folder / "whole.mp4", numbered_frames(60), container_options={"movflags": "faststart"})
    (folder / "cut.mp4").write_bytes(whole.read_bytes()[: whole.stat().st_size * 3 // 4])
    return folder


@pytest.mark.few(30)
@pytest.mark.parametrize(("case", "way"), WAYS)
def test_contract(cli, clips, foreign, monkeypatch, case, way):
    for name, value in case.env.items():
        monkeypatch.setenv(name, value)
    if case.breaks:
        monkeypatch.setattr(case.breaks[0], _raiser(case.breaks[1]))
    columns = {"terminal": 100, "narrow": 50}.get(way)
    args = [
        *(word.replace("{tmp}", str(clips)).replace("{foreign}", str(foreign)) for word in case.args),
        *(["--json"] if way == "json" else []),
    ]
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
    loose = () if columns else ("error:", "hint:", "warning:")  # one line each, for programs that read them
    assert all(len(line) <= widest for line in shown if not line.startswith(loose)), shown
    shown = unfolded(shown) if columns and case.code else shown
    if way == "json":
        _check_json(case, result)
    elif case.code:
        assert result.out == ""
    elif case.out is not None:
        assert result.out == case.out
    if case.code in (130, 143):
        assert shown == (["Stopped."] if case.code == 130 and way != "json" else [])
    elif case.code:
        assert len(shown) == 2 and shown[0].startswith("error: ") and shown[1].startswith("hint: "), shown
        assert case.says in "\n".join(shown)
    elif way == "json" and not case.says.startswith("warning"):
        assert shown == []
    else:
        assert case.says in "\n".join(shown) if case.says else shown == []


def unfolded(lines: list[str]) -> list[str]:
    """Join each line with its indented continuation lines."""
    whole = []
    for line in lines:
        if line.startswith("     "):
            whole[-1] += f" {line.strip()}"
        else:
            whole.append(line)
    return whole


def _raiser(problem: BaseException):
    def broken(*_, **__):
        vars(problem).clear()  # of attributes that commands have added
        raise problem.with_traceback(None)

    return broken


def _check_json(case: Case, result) -> None:
    """Check that there is one JSON line per question, whatever happens, or one for an inspection."""
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
        if case.encoding == "utf-8":  # JSON escapes characters differently
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


@pytest.mark.parametrize(
    ("value", "prints"), [("yes", True), ("TRUE", True), ("on", True), ("false", False), ("No", False)]
)
def test_words_for_yes_and_no_in_the_environment(cli, monkeypatch, value, prints):
    monkeypatch.setenv("EVOPRUNE_DEBUG", value)
    assert ("Traceback" in cli("ask", "no/such.mp4", QUESTION).err) == prints


@pytest.mark.parametrize("variable", ["EVOPRUNE_DEBUG", "EVOPRUNE_PLAIN"])
@pytest.mark.parametrize("args", [("methods", "--json"), ("ask", "no/such.mp4", QUESTION, "--json")])
def test_other_words_in_the_environment_are_refused(cli, monkeypatch, variable, args):
    monkeypatch.setenv(variable, "maybe")
    result = cli(*args)
    assert result.code == 2 and result.record["error"]["type"] == "usage"
    assert result.err == f"error: {variable} is 'maybe', neither yes nor no\nhint: {variable}=1 or {variable}=0\n"


@pytest.mark.parametrize("wrapped", [ImportError, SystemError])
@pytest.mark.parametrize(("signal_", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_that_an_extension_module_turned_into_another_error(cli, monkeypatch, wrapped, signal_, code):
    problem = wrapped("initialization failed")
    problem.__cause__ = ImportError("initialization failed")
    problem.__cause__.__context__ = signal_()
    monkeypatch.setattr("evoprune_cli.ask._check_inputs", _raiser(problem))
    result = cli(*ASK)
    assert (result.code, result.out, result.err) == (code, "", "Stopped.\n" if code == 130 else "")
    assert cli(*ASK, "--quiet").err == ""


@pytest.mark.parametrize(("signal_", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_while_a_class_is_defined(cli, monkeypatch, signal_, code):
    class Attribute:
        def __set_name__(self, owner, name):
            raise signal_

    monkeypatch.setattr("evoprune_cli.ask._check_inputs", lambda *_: type("Owner", (), {"name": Attribute()}))
    result = cli(*ASK)
    assert (result.code, result.out, result.err) == (code, "", "Stopped.\n" if code == 130 else "")
    assert cli(*ASK, "--quiet").err == ""


def test_what_ends_too_early_is_no_interruption(cli, monkeypatch):
    monkeypatch.setattr("evoprune_cli.ask._check_inputs", _raiser(EOFError("it ends")))
    result = cli(*ASK, "--json")
    assert result.code == 1 == result.record["error"]["code"] and "error: EOFError: it ends" in result.err


def test_a_damaged_compiled_module_is_named(cli, monkeypatch, tmp_path):
    (tmp_path / "halved.py").write_text("number = 1\n")
    compiled = Path(py_compile.compile(tmp_path / "halved.py"))
    compiled.write_bytes(compiled.read_bytes()[:-4])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("evoprune_cli.ask._check_inputs", lambda *_: importlib.import_module("halved"))
    result = cli(*ASK)
    assert result.code == 2 and f"a compiled Python module is damaged: {compiled}" in result.err


@pytest.mark.few(1)
@pytest.mark.parametrize("output", ["batch -Q What? -m demo -o out.jsonl", "inspect --overlay out.png"])
def test_a_current_folder_that_is_gone_is_named(tmp_path, output):
    gone = "import os, sys; os.mkdir('gone'); os.chdir('gone'); os.rmdir('../gone'); from evoprune_cli.main import run; run()"
    command, *options = output.split()
    words = [sys.executable, "-P", "-c", gone, command, str(ROOT / CLIP), *options]  # -P: like the installed command
    done = subprocess.run(
        words, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert (
        done.returncode == 2
        and done.stderr == "error: the current folder no longer exists\nhint: change to another folder\n"
    )


@pytest.mark.parametrize("command", ["ask", "batch", "eval", "inspect", "profile"])
def test_the_short_help_fits_on_a_screen_and_names_the_full_one(cli, command):
    short, full = (cli(command, flag).out.splitlines() for flag in ("--help", "--help-all"))
    assert len(short) <= 50 < len(full) and all(len(line) <= 80 for line in short)
    assert short[-1] == f"All options: evoprune {command} --help-all"
    assert any("--dtype" in line for line in full) and not any("--dtype" in line for line in short)


def test_help_keeps_names_of_options_whole_on_narrow_terminals(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    out = cli("ask", "--help-all").out
    assert "--max-visual-tokens N\n" in out
    assert all(len(line) <= 40 for line in out.splitlines() if not line.startswith(("  evoprune", "  echo")))


@pytest.mark.parametrize("command", ["", "ask", "batch", "eval", "find", "watch"])
def test_help_is_wrapped_and_not_cut_on_narrow_terminals(cli, monkeypatch, command):
    wide = cli(*command.split(), "--help").out
    monkeypatch.setenv("COLUMNS", "40")
    narrow = cli(*command.split(), "--help").out
    assert all(len(line) <= 40 for line in narrow.splitlines() if not line.startswith("  export"))
    assert "..." not in narrow.replace("]...", "").replace("}...", "")
    narrow, wide = (re.sub(r"\\\n|\s", "", text) for text in (narrow, wide))
    assert narrow == wide


def test_help_and_what_is_wrong_with_inputs_need_no_torch():
    names = ("ask", "batch", "watch", "eval", "tune", "inspect", "profile", "verify", "methods")
    helps = [("--help",), ("--version",), *((name, "--help-all") for name in names)]
    wrong = [("ask", "gone.mp4", "x"), ("ask", CLIP, "x", "--end", "0"), ("inspect", "gone.mp4")]
    wrong.append(("ask", CLIP, "x", "--subtitles", "gone.srt"))
    program = f"""
import sys
from evoprune_cli.main import run
def heavy(*names):
    return [name for name in names if name in sys.modules]
for words in {[*helps, *wrong]}:
    sys.argv = ["evoprune", *words]
    try:
        run()
    except SystemExit as stop:
        late = heavy("torch", "transformers") if words in {wrong} else heavy("torch", "transformers", "numpy", "av")
        print(stop.code or 0, late, file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    ends = [line for line in done.stderr.splitlines() if not line.startswith(("error", "hint"))]
    assert ends[: len(helps)] == ["0 []"] * len(helps) and len(ends) == len(helps) + len(wrong), done.stderr
    assert all(end in ("2 []", "3 []") for end in ends[len(helps) :]), done.stderr


def test_what_was_found_before_an_inspection_failed(cli):
    record = cli("inspect", CLIP, "-m", "samples", "--json").record
    assert record["video"]["codec"] == "h264" and "plan" not in record


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


# Interrupts itself at two consecutive imports. The first is the Nth since the program's own code started.
INTERRUPTED_TWICE = """
import os, runpy, signal, sys
first = int(sys.argv.pop(1))
begun = False
count = 0
def hook(event, details):
    global begun, count
    if event == "exec" and details[0].co_filename.endswith("evoprune_cli/__main__.py"):
        begun = True
    if event == "import" and begun:
        count += 1
        if count in (first, first + 1):
            os.kill(os.getpid(), signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(hook)
runpy.run_module("evoprune_cli", run_name="__main__", alter_sys=True)
"""


@pytest.mark.skipif(os.name != "posix", reason="signals of Unix")
@pytest.mark.parametrize("first", [1, 2, 3, 10, 60, 150])
def test_two_ctrl_c_at_once_while_the_command_line_is_imported(first):
    command = [sys.executable, "-c", INTERRUPTED_TWICE, str(first), "methods"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, b"", b"")


@pytest.mark.skipif(os.name != "posix", reason="shells of Unix")
def test_ctrl_c_ends_the_loop_of_a_shell_too(tmp_path):
    """A shell loop continues after a program that handles the signal and exits with a code of its own."""
    begins = "import sys, signal, os; sys.argv = ['evoprune', 'ask']; from evoprune_cli import main; "
    interrupted = (
        "main.run = lambda: os.kill(os.getpid(), signal.SIGINT); from evoprune_cli.__main__ import start; start()"
    )
    loop = f'for i in 1 2; do {shlex.quote(sys.executable)} -c "{begins}{interrupted}"; echo "code $?"; done'
    done = subprocess.run(["bash", "-c", loop], capture_output=True, text=True, timeout=60, start_new_session=True)
    assert done.stdout == "code 130\ncode 130\n"  # the shell's exit code for this signal
    one = subprocess.run([sys.executable, "-c", begins + interrupted], capture_output=True, timeout=60)
    assert (one.returncode, one.stderr) == (-signal.SIGINT, b"")


# Hostile or mistaken input: each case ends soon, with its exit code and two lines.


SQUARE = str(ROOT / "samples/square.mp4")
QUICK = ("-m", "demo", "-n", "1", "--frames", "4", "-q")


@pytest.fixture
def soon():
    """Each case ends within half a minute, even on a busy machine; most take less than a second."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


# --- rows of a batch ---
def row(**more) -> str:
    return json.dumps({"video": SQUARE, "question": "What?"} | more) + "\n"


def answer(text: str) -> str:
    """Return a row whose answer is this JSON text."""
    return row(answer=0).replace('"answer": 0', f'"answer": {text}')


ROWS = {
    # input: exit code, text in stderr
    "an infinite answer": (answer("[1, -Infinity]"), 2, "line 1: -Infinity is not a valid JSON number"),
    "a number too large": (answer("1e999"), 2, "line 1: the number 1e999 is too large"),
    "a whole number of 5,000 digits": (answer("9" * 5000), 2, "line 1: Exceeds the limit"),
    "a deep answer": (answer("[" * 900 + "]" * 900), 2, "it is nested more than 100 levels deep"),
    "a deep line": ("[" * 10**5, 2, "it is nested more than 100 levels deep"),
    "NUL in a name": (row(id=1) + row(video="a\0b"), 2, "line 2: no file can have the name 'a"),
    "half a surrogate in a name": (row(id=1) + row(subtitles="\ud800"), 2, "line 2: no file can have the name"),
    "UTF-16": (row().encode("utf-16"), 2, "give a JSONL or CSV file, saved as UTF-8"),
    "an escape in a name": (row(video="a\x1b[31m\u202e"), 3, "a?[31m?"),
    "a byte order mark": ("\ufeff" + row(), 0, ""),
    "a deep answer that can be passed on": (answer("[" * 90 + "]" * 90), 0, ""),
    "half a surrogate": (row(answer="\ud800"), 0, ""),
}


@pytest.mark.few(4)
@pytest.mark.parametrize(("content", "code", "says"), ROWS.values(), ids=ROWS)
def test_rows(cli, soon, tmp_path, content, code, says):
    (tmp_path / "rows").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = cli("batch", "--from", tmp_path / "rows", *QUICK, "-o", tmp_path / "out.jsonl")
    assert (result.code, says in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and "\x1b" not in result.err
    assert code or len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_input_without_an_end(cli, soon, monkeypatch, tmp_path):
    monkeypatch.setattr("evoprune.files.MAX_BYTES", 2**20)
    for command in (("batch", "--from", "/dev/zero", "-o", tmp_path / "out.jsonl"), ("eval", "--data", "/dev/zero")):
        result = cli(*command, *QUICK)
        assert result.code == 2 and "/dev/zero is larger than 1 MiB" in result.err
    result = cli("tune", SQUARE, "--questions", "/dev/zero", "-m", "demo")
    assert result.code == 2 and "--questions /dev/zero is larger than 1 MiB" in result.err


# --- questions ---
STDIN = {
    # stdin: exit code, text in stderr
    "a byte order mark": (b"\xef\xbb\xbfWhat?\r\n", 0, ""),
    "nothing but a byte order mark": (b"\xef\xbb\xbf", 2, "stdin is empty"),
    "UTF-16": ("What?".encode("utf-16-le"), 2, "not valid text"),
    "1 MB": (b"What is it? " * 90_000, 2, "does not fit into the 4,096 tokens of this model's context"),
    "5 MB": (b"What is it? " * 450_000, 2, "more than 4,194,304 characters"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(("content", "code", "says"), STDIN.values(), ids=STDIN)
def test_questions_from_stdin(cli, soon, monkeypatch, tmp_path, content, code, says):
    (tmp_path / "question").write_bytes(content)
    with open(tmp_path / "question", encoding="utf-8") as file:
        monkeypatch.setattr("tests.cli.conftest.Stdin", lambda *_: file)
        result = cli("ask", SQUARE, *QUICK)
    assert (result.code, says in result.err) == (code, True), result.err
    if not code:
        assert result.out == cli("ask", SQUARE, "What?", *QUICK).out


# --- output on terminals ---
@pytest.fixture
def says(monkeypatch):
    """Make the model answer with a text."""

    def answer_with(text: str) -> None:
        monkeypatch.setattr("evoprune.language.answer.stream_text", lambda *_: iter([text]))

    return answer_with


NASTY = "a\x1b[31mb\x9b2Jc\rd\u202ee\tf\ng\u00e9\u3000\U0001f468\u200d\U0001f469"


def test_answers_are_not_obeyed_by_a_terminal(cli, says, monkeypatch):
    says(NASTY)
    assert cli("ask", SQUARE, "What?", *QUICK).out == NASTY + "\n"  # a pipe gets it unchanged
    monkeypatch.setattr("evoprune_cli.terminal.encodable", _as_on_a_terminal)
    shown = "a\\x1b[31mb\\x9b2Jc\\rd\\u202ee\tf\ng\u00e9\u3000\U0001f468\u200d\U0001f469\n"
    assert cli("ask", SQUARE, "What?", *QUICK).out == shown


def _as_on_a_terminal(text, stream=None):
    if stream is not None:
        stream.isatty = lambda: True
    return encodable(text, stream)


def test_json_has_escapes_for_what_cannot_be_seen(cli, says):
    says(NASTY)
    out = cli("ask", SQUARE, "What\u202e\u2028?", *QUICK, "--json").out
    assert json.loads(out)["answer"] == NASTY and json.loads(out)["question"] == "What\u202e\u2028?"
    assert not set(out) & set("\x1b\x9b\u202e\u2028\r") and "\u00e9\u3000" in out


# --- streams ---


REDIRECTED = {
    # shell, with {} for the program: exit code, stdout, text in the two lines of stderr
    "stdout closed": ("{} ask samples/square.mp4 What? -q >&-", 2, "", "stdout is closed"),
    "stdout closed, help": ("{} --help >&-", 2, "", "stdout is closed"),
    "disk full": ("{} inspect samples/square.mp4 --json >/dev/full", 2, "", "error: cannot write the output: No space"),
    "disk full, JSON": ("{} ask samples/square.mp4 What? -q --json >/dev/full", 2, "", "No space left"),
    "disk full, an unknown flag": ("{} ask samples/square.mp4 What? --json --none >/dev/full", 2, "", "No space left"),
    "reader of the answer gone": (
        "{} ask samples/square.mp4 'What happens?' -q | true; exit ${PIPESTATUS[0]}",
        0,
        "",
        None,
    ),
    "reader of the help gone": ("{} --help | true; exit ${PIPESTATUS[0]}", 0, "", None),
    "reader of the errors gone": (
        "{} ask no/such.mp4 What? 2>&1 >/dev/null | true; exit ${PIPESTATUS[0]}",
        3,
        "",
        None,
    ),
    "C locale": (
        "LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} ask '{grün}' 'What colour is the square?' -q",
        0,
        "green\n",
        None,
    ),
}


@pytest.mark.few(1)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("line", "code", "out", "says"), REDIRECTED.values(), ids=REDIRECTED)
def test_where_the_output_goes(clips, line, code, out, says):
    if "LC_ALL" in line and not sys.prefix.isascii():
        pytest.skip("torch cannot be imported from such a path in this locale")
    line = line.replace("{}", f"{shlex.quote(sys.executable)} -m evoprune_cli").replace(
        "{grün}", str(clips / "grün.mp4")
    )
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, out), done.stderr
    assert len(done.stderr.splitlines()) == 2 and says in done.stderr if says else done.stderr == ""


@pytest.mark.few(1)
@pytest.mark.parametrize("sign", [">", ">>"])
@pytest.mark.parametrize("command", ["ask samples/square.mp4 What?", "ask no/such.mp4 What?", "methods"])
def test_a_full_disk_leaves_no_half_line(tmp_path, command, sign):
    """A limit on the file size accepts the first part of a line, like a disk that is almost full."""
    path = tmp_path / "log"
    path.write_text("x" * 699 + "\n")
    (tmp_path / "samples").symlink_to(ROOT / "samples")
    limited = (
        "import resource, signal, sys; from evoprune_cli.main import run; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (900, 900)); sys.argv[0] = 'evoprune'; run()"
    )
    line = f"{shlex.quote(sys.executable)} -B -c {shlex.quote(limited)} {command} --json {sign} {path}"
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True, env=env)
    assert path.read_text() == ("" if sign == ">" else "x" * 699 + "\n")
    assert done.returncode == 2 and "cannot write the output: File too large" in done.stderr


def test_other_streams_may_be_closed(tmp_path):
    """No file that is opened later takes their place."""
    command = f'"{sys.executable}" -m evoprune_cli --version <&- 2>&- >"{tmp_path}/out"'
    assert subprocess.run(["bash", "-c", command], cwd=ROOT).returncode == 0
    assert (tmp_path / "out").read_text() == f"evoprune {__version__}\n"


# --- signals while an error is being reported ---
@pytest.mark.parametrize(("again", "code"), [(KeyboardInterrupt, 130), (Terminated, 143)])
def test_a_signal_during_the_report(cli, monkeypatch, again, code):
    def interrupted(*_):
        raise again

    monkeypatch.setattr(main.terminal, "print_error", interrupted)
    result = cli("ask", "no/such.mp4", "What?", *QUICK)
    assert (result.code, result.out, result.err) == (code, "", "")


PROGRAM = """
import os, signal, sys
from evoprune_cli import __main__, main
def stop(*_, **__): os.kill(os.getpid(), signal.Signals[sys.argv[1]])
if sys.argv[2] == "exit":
    import atexit
    atexit.register(stop)
    main.app = lambda **_: 0
else:
    main.app = stop
    main._outcome = lambda kept=main._outcome: (kept(), stop())[0]
signal.signal(signal.SIGINT, signal.default_int_handler)
__main__.start()
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("when", ["exit", "twice"])
@pytest.mark.parametrize(("how", "code"), [("SIGINT", -signal.SIGINT), ("SIGTERM", 143), ("SIGHUP", 143)])
def test_signals_at_the_very_end(how, code, when):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


@pytest.mark.few(1)
@pytest.mark.parametrize("how", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_is_ignored_stays_so(how):
    """As in the background of a shell script, and with nohup."""
    program = PROGRAM.replace("signal.SIGINT, signal.default_int_handler", f"signal.{how}, signal.SIG_IGN")
    done = subprocess.run([sys.executable, "-c", program, how, "exit"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_terminal_leaves_no_copy_of_stdin(tmp_path):
    command = [sys.executable, "-m", "evoprune_cli", "ask", "-", "What?", "--json"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, **pipes) as process:
        process.stdin.write(b"video")
        process.stdin.flush()
        until = time.monotonic() + 30
        while not list(tmp_path.glob("evoprune-*/stdin")) and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGHUP)
        process.wait()
        record = json.loads(process.stdout.read())
    assert process.returncode == 143 and record["error"]["type"] == "terminated" and not list(tmp_path.iterdir())


# --- the cache ---
@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle"])
def test_entries_of_the_cache_that_are_no_files(cli, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    ask = ("ask", SQUARE, "What?", *QUICK, "--cache", "--json")
    first = cli(*ask).record
    (entry,) = tmp_path.iterdir()
    entry.unlink()
    {
        "pipe": lambda: os.mkfifo(entry),
        "folder": lambda: entry.mkdir(),
        "device": lambda: entry.symlink_to("/dev/zero"),
        "circle": lambda: entry.symlink_to(entry.name),
    }[kind]()
    again = cli(*ask).record
    assert (again["cache"], again["answer"]) == ("miss", first["answer"])
    assert ("cache_not_written" in again["warnings"]) == (kind == "folder")
    assert Path("/dev/zero").is_char_device()


@pytest.mark.parametrize("kind", parameters("int8"))
def test_weights_that_cannot_be_stored_are_reported(cli, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    (tmp_path / "weights").write_text("a file")
    ask = ("ask", SQUARE, "What?", *QUICK, "--quantize", kind, "--store-quantized")
    failed = cli(*ask, "--json")
    assert "weights_not_stored" in failed.record["warnings"]
    (tmp_path / "weights").unlink()
    text = "warning: the quantized weights are not kept on disk, so every start quantizes them again."
    assert text in " ".join(failed.err.split()) and text not in " ".join(cli(*ask).err.split())


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("man", "evoprune --help"),
        ("help aks", "did you mean evoprune ask?"),
        ("model", "evoprune models"),
        ("modles", "evoprune models"),
        ("version", "evoprune --version"),
        ("-V", "evoprune --version"),
        ("run clip.mp4", "evoprune ask"),
        ("chat", "evoprune ask video.mp4 -i"),
        ("list", "evoprune methods"),
        ("serve", "vLLM"),
        ("insepct", "did you mean evoprune inspect?"),
        ("Ask", "did you mean evoprune ask?"),
        ("aks", "did you mean evoprune ask?"),
        ("gone.mp4 What?", "to ask about a video: evoprune ask"),
        ("zebra", "see evoprune --help"),
    ],
)
def test_what_is_typed_in_the_place_of_a_command_leads_to_one(cli, line, hint):
    result = cli(*line.split())
    error, hinted = result.err.splitlines()
    assert result.code == 2 and error.startswith("error: no such ") and hinted.startswith("hint: ") and hint in hinted
    assert "Did you mean" not in error


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("ask a.mp4 Why? --answer-fast", "did you mean --budget fast? see evoprune ask --help-all"),
        ("ask a.mp4 Why? --buget=0.1", "did you mean --budget? "),
        ("ask a.mp4 Why? -fps 2", "did you mean --fps? "),
        ("--verison", "did you mean --version?"),
        ("ask --version", "evoprune --version"),
        ("ask a.mp4 Why? --num-frames 3", "did you mean --frames? "),
        ("ask a.mp4 Why? --load-in-4bit", "did you mean --quantize int4? "),
        ("ask a.mp4 Why? --every 5s", "--every is an option of evoprune watch; "),
        ("batch --keyframes", "did you mean --seek keyframes? "),
        ("find a.mp4 dog --max-results 3", "did you mean --top? "),
        ("methods --jsn", "did you mean --json? "),
        ("ask a.mp4 Why? --xyzzy", "see evoprune ask --help-all"),
    ],
)
def test_an_unknown_option_leads_to_the_right_one(cli, line, hint):
    result = cli(*line.split())
    error, hinted = result.err.splitlines()
    assert result.code == 2 and error.startswith("error: no such option: -") and "Possible" not in error
    assert hinted.startswith(f"hint: {hint}")


def test_a_long_option_with_one_dash_is_named(cli):
    """The parser reads -budget 0.1 as -b udget and another word."""
    for words in (("-budget", "0.1"), ("-budget=0.1",)):
        result = cli("ask", CLIP, "What?", *words)
        assert result.code == 2 and f"hint: did you mean -{words[0]}? long options have two dashes" in result.err
    assert "long options" not in cli("ask", "gone.mp4", "What?", "--", "-budget").err


@pytest.mark.parametrize("line", ["ask --json", "watch --json", "aks --json", "ask a.mp4 Why? --jsn --json"])
def test_the_error_of_a_line_without_a_question_has_no_fields_of_an_answer(cli, line):
    record = cli(*line.split()).record
    assert record == {
        "schema": "evoprune/answer@1",
        "question": None,
        "answer": None,
        "finish_reason": "error",
        "error": {
            "code": 2,
            "type": "usage",
            "stage": None,
            **{each: record["error"][each] for each in ("message", "hint")},
        },
    }


@pytest.mark.parametrize("command", ["ask", "batch", "eval", "find", "tune", "watch"])
def test_a_missing_argument_has_an_example(cli, command):
    result = cli(command)
    assert result.code == 2 and len(result.err.splitlines()) == 2
    example = re.search(rf"evoprune {command} \S+.*", result.err.splitlines()[1])[0]
    assert "--help" not in example and cli(*shlex.split(example)[1:], "--help").code == 0


@pytest.mark.parametrize(("line", "same"), [("help", "--help"), ("help ask", "ask --help")])
def test_help_is_a_word_too(cli, line, same):
    result = cli(*line.split())
    assert result.code == 0 and result.out and result == cli(*same.split())


def test_every_hint_about_a_command_names_one_that_there_is():
    known = set(main.BUILT_IN)
    named = [word for hint in mistakes.COMMAND_HINTS.values() for word in re.findall(r"evoprune ([a-z]+)", hint)]
    assert named and set(named) <= known and not known & mistakes.COMMAND_HINTS.keys()


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("command", "near"),
    [
        ("ask samples/sqare.mp4 What?", "samples/square.mp4"),
        ("ask samples/Square.MP4 What?", "samples/square.mp4"),
        ("ask samples/square.mkv samples/pan.mp4 What?", "samples/square.mp4"),
        ("batch samples/sqare.mp4 -Q What -m demo -o -", "samples/square.mp4"),
        ("batch --from samples/question.jsonl -m demo -o -", "samples/questions.jsonl"),
        ("eval --data samples/question.jsonl", "samples/questions.jsonl"),
        ("watch samples/sqare.mp4 -Q What", "samples/square.mp4"),
        ("watch samples/square.mp4 --questions samples/question.jsonl", "samples/questions.jsonl"),
        ("inspect samples/sqare.mp4", "samples/square.mp4"),
        ("tune samples/sqare.mp4 -m demo", "samples/square.mp4"),
        ("verify samples/sqare.mp4", "samples/square.mp4"),
        ("ask samples/square.mp4 What? --subtitles samples/question.jsonl", "samples/questions.jsonl"),
        ("ask samples/square.mp4 What? -m sampels", "samples"),
        ("ask sample/square.mp4 What?", "samples/square.mp4"),
        ("inspect square.mp4", "samples/square.mp4"),
        ("ask samples/square.mp4 What? -m dmeo", "demo"),
        ("inspect -m Demo", "demo"),
        ("batch samples/square.mp4 -Q What -o - -m demoscenes", "demo-scenes"),
    ],
)
def test_a_misspelt_file_has_the_near_name_in_the_hint(cli, command, near):
    result = cli(*command.split())
    assert result.code in (2, 3, 4) and f"hint: did you mean {near}? " in result.err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("rtsp://me:sesame@host/x", 'live video: evoprune watch rtsp://host/x -Q "What happens?"'),
        ("udp://host:9", 'live video: evoprune watch udp://host:9 -Q "What happens?"'),
        ("htp://host/x.mp4", "download it first; only http:// and https:// URLs are read directly"),
        ("www.example.com/clip.mp4", "web addresses start with https://: https://www.example.com/clip.mp4"),
    ],
)
def test_addresses_that_are_not_read_say_what_is(cli, given, hint):
    for words in ((given, "What?"), ("samples/square.mp4", given, "What?")):
        result = cli("ask", *words)
        assert result.code == 3 and result.err.endswith(f"hint: {hint}\n")


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("inspect dmeo", "demo is a model: evoprune inspect -m demo"),
        ("verify demo-scenes", "demo-scenes is a model: evoprune verify -m demo-scenes"),
        (
            "profile Qwen/Qwen3-VL-4B-Instruct",
            "Qwen/Qwen3-VL-4B-Instruct is a model: evoprune profile -m Qwen/Qwen3-VL-4B-Instruct",
        ),
        ("ask demo What?", 'demo is a model: evoprune ask video.mp4 "What happens?" -m demo'),
    ],
)
def test_a_model_in_the_place_of_a_video(cli, line, hint):
    result = cli(*line.split())
    assert result.code == 3 and result.err.endswith(f"\nhint: {hint}\n")


def test_a_name_that_no_file_is_like_gets_none(cli):
    assert "did you mean" not in cli("ask", "nothing.mp4", "What?").err
    assert "did you mean" not in cli("ask", "samples/b.mp4", "What?").err  # a common extension is no similarity


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "args",
    [
        ("ask", "samples/square.mp4", "What?"),
        ("batch", "samples/square.mp4", "-Q", "What?", "-o", "out.jsonl"),
        ("find", "samples/square.mp4", "a square"),
        ("watch", "samples/square.mp4", "-Q", "What?"),
        ("eval", "--data", "samples/questions.jsonl"),
        ("profile",),
        ("verify",),
        ("inspect",),
    ],
    ids=lambda args: args[0],
)
def test_a_model_that_is_nowhere_is_an_error_before_torch_is_imported(args):
    program = "import sys; sys.modules['torch'] = None; from evoprune_cli.__main__ import start; start()"
    command = [sys.executable, "-c", program, *args, "-m", "./nodir"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 4 and done.stdout == ""
    assert done.stderr.startswith("error: './nodir' is neither a folder here nor a hub id\nhint: ")


@pytest.mark.parametrize(
    "line",
    [
        "ask gone.mp4",
        "ask gone.mp4 What?",
        "ask samples/square.mp4 What? --schema gone.json",
        "ask samples/square.mp4 What? -m gone.gguf",
        "ask samples/square.mp4 What? -m gone/model.gguf",
        "batch gone.mp4 -Q What? -m demo -o -",
        "batch --from gone.jsonl -m demo -o -",
        "find gone.mp4",
        "find gone.mp4 dog",
        "watch gone.mp4",
        "watch gone.mp4 -Q What?",
        "watch samples/square.mp4 --questions gone.txt",
        "eval --data gone.jsonl",
        "tune gone.mp4 -m demo",
        "tune samples/square.mp4 -m demo --questions gone.txt",
        "inspect gone.mp4",
        "verify gone.mp4",
        "profile gone.mp4",
    ],
)
def test_every_command_names_a_missing_file_in_the_same_words(cli, line):
    result = cli(*line.split())
    (name,) = re.findall(r"gone\S*", line)
    first, hint = result.err.splitlines()
    assert first == f"error: no such file: {name}" and hint.startswith("hint: ") and result.code in (2, 3, 4)


def test_unknown_variables_are_named(cli, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_BUGDET", "fast")
    monkeypatch.setenv("EVOPRUNE_API_KEY", "secret")
    warning = "warning: EVOPRUNE_BUGDET is not a variable of evoprune (did you mean EVOPRUNE_BUDGET?)\n"
    for command in ("--version", "methods"):
        result = cli(command)
        assert result.code == 0 and result.err == warning and "secret" not in result.out
