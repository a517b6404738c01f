"""`evoprune ask --interactive`, at a terminal: a prompt on stderr, answers on stdout, and what Ctrl-C and Ctrl-D do."""

import fcntl
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from tests.cli.screen import Screen, visible

ROOT = Path(__file__).parents[2]
CLIP, QUESTION, MORE = "samples/square.mp4", "What colour is the square?", "Which way does the square move?"
ASK = ("ask", CLIP, "--interactive")


def test_questions_are_typed(cli):
    alone = [cli("ask", CLIP, question, "-q").out for question in (QUESTION, MORE)]
    result = cli(*ASK, "-q", stdin=f"{QUESTION}\n\n   \n{MORE}", terminal=True)
    assert (result.code, result.out) == (0, "".join(alone)) and result.err == "> " * 5 + "\n"
    assert cli(*ASK, "-q", stdin="", terminal=True).out == ""


def test_questions_of_the_command_line_come_first(cli):
    result = cli("ask", CLIP, QUESTION, "-Q", MORE, "--interactive", stdin=f"{QUESTION}\n", terminal=True)
    assert result.out.splitlines()[0] == result.out.splitlines()[2] == "green" and len(result.out.splitlines()) == 3
    assert result.err.count("; first token ") == 3 and result.err.count("> ") >= 2


@pytest.mark.full
def test_a_line_of_stats_an_answer_and_all_of_them_on_request(cli):
    brief, full = (cli(*ASK, *flags, stdin=f"{QUESTION}\n{MORE}\n", terminal=True).err for flags in ((), ("-v",)))
    assert brief.count("; first token ") == 2 and "prefill" not in brief
    assert full.count("\nprefill") == 2 and full.count("\nversions") == 2
    both = cli(*ASK, "--compare", stdin=f"{QUESTION}\n", terminal=True).err
    assert "pruned: 63 tokens read (36 visual)" in both and "full: 171 tokens read (144 visual)" in both


@pytest.mark.few(1)
@pytest.mark.parametrize("end", ["exit", "quit", " QUIT ", "/exit", "q"])
def test_words_that_end_it(cli, end):
    result = cli(*ASK, stdin=f"{QUESTION}\n{end}\n{MORE}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n")


@pytest.mark.few(1)
@pytest.mark.parametrize("line", ["-b 0.1", "--compare", "  -n 5", "--"])
def test_a_line_that_looks_like_an_option_is_not_asked(cli, line):
    result = cli(*ASK, "-q", stdin=f"{line}\n- {QUESTION}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n")
    assert f"error: {line.split()[0]} looks like an option" in result.err and "hint: options belong to" in result.err


def test_it_greets_and_has_help(cli):
    result = cli(*ASK, stdin="/help\n/foo\n/set-budget 0.1\n?\n", terminal=True)
    assert "Ask about square.mp4. /help for help" in result.err.partition("> ")[0] and result.out == ""
    assert result.err.count("q or Ctrl-D: the end") == 2 and "there is no command /foo" in result.err
    assert "there is no command /set-budget" in result.err


def test_json_lines(cli):
    out = cli(*ASK, "--json", "--compare", stdin=f"{QUESTION}\n{MORE}\n", terminal=True).out
    records = [json.loads(line) for line in out.splitlines()]
    assert [r["question"] for r in records] == [QUESTION, MORE] and all(r["compare"]["answer"] for r in records)
    assert records[1]["time_ms"]["encode"] == 0


def test_warnings_come_once(cli, tiny_folder):
    flags = ("-m", tiny_folder, "--load-format", "dummy", "-n", "2", "-q")
    result = cli(*ASK, *flags, stdin=f"{QUESTION}\n{MORE}\n", terminal=True)
    assert result.err.count("warning: the weights") == 1 and result.out.count("\n") >= 2
    assert result.err.count("warning: the answer may be incomplete") == 2


@pytest.mark.full
def test_a_question_that_cannot_be_asked_does_not_end_it(cli):
    result = cli(*ASK, "-q", stdin=f"caf\udce9\n{QUESTION}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n") and "error: the question or the system prompt" in result.err
    first, second = cli(*ASK, "--json", stdin=f"caf\udce9\n{QUESTION}\n", terminal=True).out.splitlines()
    assert json.loads(first)["error"]["code"] == 2 and json.loads(second)["answer"] == "green"


@pytest.mark.parametrize("args", [ASK, ("ask", CLIP, QUESTION, "--interactive"), ("ask", "-", "--interactive")])
def test_only_at_a_terminal(cli, args):
    result = cli(*args)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error.startswith("error: --interactive reads questions from a terminal") and "-Q" in hint


def test_failures_before_the_first_question(cli):
    assert cli("ask", "no/such.mp4", "--interactive", terminal=True).code == 3
    record = cli("ask", CLIP, "--interactive", "-m", "samples", "--json", terminal=True).record
    assert record["error"]["code"] == 4 and record["finish_reason"] == "error"


@pytest.fixture(scope="module")
def endless(tiny_folder, tmp_path_factory):
    """A model that never ends its turn."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(tiny_folder, folder)
    settings = json.loads((folder / "generation_config.json").read_text()) | {"eos_token_id": []}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def keyboard():
    """`keyboard(*args, stdout)`: the command at a terminal of its own; its screen and its process."""
    started = []

    def at_it():
        signal.signal(signal.SIGINT, signal.default_int_handler)
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    def start(*args, stdout=subprocess.PIPE):
        screen = Screen(100)
        process = subprocess.Popen(
            [sys.executable, "-m", "evoprune_cli", *map(str, args)],
            bufsize=0,  # what is in the pipe is all there is to read
            stdin=screen.end,
            stdout=screen.end if stdout is None else stdout,
            stderr=screen.end,
            cwd=ROOT,
            env={k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")}
            | {"OMP_NUM_THREADS": "1", "TERM": "xterm", "PYTHONUTF8": "1"},
            start_new_session=True,
            preexec_fn=at_it,
        )
        os.close(screen.end)
        started.append(process)
        return screen, process

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.full
def test_ctrl_d_ends_it_and_answers_alone_reach_a_pipe(keyboard):
    screen, process = keyboard(*ASK, "-q")
    screen.wait_for("> ")
    screen.press(f"{QUESTION}\n".encode())
    assert process.stdout.readline() == b"green\n"
    screen.wait_for("> ", 2)
    screen.press(b"\x1b[A\n")  # the arrow upwards: readline's history
    assert process.stdout.readline() == b"green\n"
    screen.wait_for("> ", 3)
    screen.press(b"\x04")
    assert process.wait(60) == 0 and process.stdout.read() == b""
    lines = visible(screen.finish())
    assert lines[0] == f"> {QUESTION}" and lines[-1].startswith(">")


def stop_an_answer(screen, process) -> None:
    """Asks at a prompt, and presses Ctrl-C as soon as the answer begins."""
    while select.select([process.stdout], [], [], 0)[0]:  # what is left of the answer before
        os.read(process.stdout.fileno(), 2**16)
    screen.press(b"What happens?\n")
    assert process.stdout.read(1)
    screen.press(b"\x03")


@pytest.mark.full
def test_ctrl_c_stops_an_answer_and_then_the_conversation(keyboard, endless):
    screen, process = keyboard(*ASK, "-m", endless, "-n", "30000", "-t", "1", "--seed", "5", "-q")
    for turn in (1, 2):
        screen.wait_for("> ", turn)
        stop_an_answer(screen, process)
    screen.wait_for("> ", 3)
    screen.press(b"half a question\x03")  # once it only clears the line
    screen.wait_for("Ctrl-D ends the conversation")
    screen.wait_for("> ", 4)
    stop_an_answer(screen, process)
    screen.wait_for("> ", 5)
    screen.press(b"\x03")
    screen.wait_for("> ", 6)
    screen.press(b"\x03")
    assert process.wait(60) == -signal.SIGINT
    assert process.stdout.read().endswith(b"\n") and "Traceback" not in screen.finish()


@pytest.mark.full
def test_records_of_answers_that_were_stopped(keyboard, endless):
    screen, process = keyboard("ask", CLIP, QUESTION, "--interactive", "-m", endless, "-n", "30000", "--json")
    screen.wait_for(re.escape("\x1b[?25h"), 2)  # the second spinner has given the cursor back: there is a first word
    time.sleep(0.2)
    screen.press(b"\x03")
    record = json.loads(process.stdout.readline())
    assert record["question"] == QUESTION and record["finish_reason"] == "interrupt" and record["answer"]
    screen.wait_for("> ")
    screen.press(b"\x04")
    assert process.wait(60) == 0 and process.stdout.read() == b""
    screen.finish()


@pytest.mark.full
def test_answers_and_prompts_on_one_terminal(keyboard):
    screen, process = keyboard(*ASK, stdout=None)
    screen.wait_for("> ")
    screen.press(f"{QUESTION}\n".encode())
    screen.wait_for("total .*> ")
    screen.press(b"\x04")
    assert process.wait(60) == 0
    lines = visible(screen.finish())
    assert lines[1:3] == [f"> {QUESTION}", "green"] and "; first token " in lines[3]
