"""Input that is made to do harm, or by mistake, on the command line: each case ends soon, with its exit code and two lines."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evoprune import __version__
from evoprune_cli import main
from evoprune_cli.terminal import Terminated, encodable

ROOT = Path(__file__).parents[2]
CLIP = str(ROOT / "samples/square.mp4")
QUICK = ("-m", "demo", "-n", "1", "--frames", "4", "-q")


@pytest.fixture(autouse=True)
def soon():
    """Each case ends within half a minute, also on a busy machine; most take less than a second (`--durations=0`)."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 30


# --- rows of a batch ---


def row(**more) -> str:
    return json.dumps({"video": CLIP, "question": "What?"} | more) + "\n"


def answer(text: str) -> str:
    """A row whose answer is this text of JSON."""
    return row(answer=0).replace('"answer": 0', f'"answer": {text}')


ROWS = {
    # input: exit code, what stderr says
    "an answer that is NaN": (row() + answer("NaN").replace("What", "Why"), 2, "line 2: NaN is no number of JSON"),
    "an infinite answer": (answer("[1, -Infinity]"), 2, "line 1: -Infinity is no number of JSON"),
    "a number too large": (answer("1e999"), 2, "line 1: the number 1e999 is too large"),
    "a whole number of 5,000 digits": (answer("9" * 5000), 2, "line 1: Exceeds the limit"),
    "a deep answer": (answer("[" * 900 + "]" * 900), 2, "it is nested deeper than 100 levels"),
    "a deep line": ("[" * 10**5, 2, "it is nested deeper than 100 levels"),
    "NUL in a question": (row(question="a\0b"), 2, "line 1: question is not valid text"),
    "NUL in a name": (row(video="a\0b"), 3, "no such file"),
    "nothing but NUL": ("\0" * 99, 2, "the first line must name the columns"),
    "UTF-16": (row().encode("utf-16"), 2, "is not UTF-8"),
    "Latin-1": (row().encode() + b'{"video": "\xe9"}', 2, "is not UTF-8"),
    "an escape in a name": (row(video="a\x1b[31m\u202e"), 3, "a?[31m?"),
    "two byte order marks": ("\ufeff\ufeff" + row(), 2, "the first line"),
    "a byte order mark": ("\ufeff" + row(), 0, ""),
    "a byte order mark and CRLF": (f"\ufeffvideo,question\r\n{CLIP},What?\r\n", 0, ""),
    "a deep answer that can be passed on": (answer("[" * 90 + "]" * 90), 0, ""),
    "half a surrogate": (row(answer="\ud800"), 0, ""),
}


@pytest.mark.few(4)
@pytest.mark.parametrize(("content", "code", "says"), ROWS.values(), ids=ROWS)
def test_rows(cli, tmp_path, content, code, says):
    (tmp_path / "rows").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = cli("batch", "--from", tmp_path / "rows", *QUICK, "-o", tmp_path / "out.jsonl")
    assert (result.code, says in result.err) == (code, True), result.err
    assert "Traceback" not in result.err and "\x1b" not in result.err
    assert code or len((tmp_path / "out.jsonl").read_text().splitlines()) == 1


def test_a_deep_output_is_no_record(cli, tmp_path):
    (tmp_path / "out.jsonl").write_text("[" * 10**5)
    result = cli("batch", CLIP, "-Q", "What?", *QUICK, "-o", tmp_path / "out.jsonl", "--resume")
    assert result.code == 2 and "line 1 is no record" in result.err


def test_input_without_an_end(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("evoprune.batch.rows.MAX_BYTES", 2**20)
    for command in (("batch", "--from", "/dev/zero", "-o", tmp_path / "out.jsonl"), ("eval", "--data", "/dev/zero")):
        result = cli(*command, *QUICK)
        assert result.code == 2 and "/dev/zero has more than 1 MiB" in result.err


# --- questions ---

QUESTIONS = {
    # stdin: exit code, what stderr says
    "a byte order mark": (b"\xef\xbb\xbfWhat?\r\n", 0, ""),
    "nothing but a byte order mark": (b"\xef\xbb\xbf", 2, "stdin is empty"),
    "UTF-16": ("What?".encode("utf-16-le"), 2, "not valid text"),
    "NUL": (b"a\0b", 2, "not valid text"),
    "Latin-1": (b"caf\xe9", 2, "not valid text"),
    "1 MB": (b"What is it? " * 90_000, 2, "does not fit into the 4,096 tokens of this model's context"),
    "50 KB": (b"What is it? " * 1500, 2, " do not fit into the 4,096 tokens of this model's context"),
    "5 MB": (b"What is it? " * 450_000, 2, "more than 4,194,304 characters"),
}


@pytest.mark.few(2)
@pytest.mark.parametrize(("content", "code", "says"), QUESTIONS.values(), ids=QUESTIONS)
def test_questions_from_stdin(cli, monkeypatch, tmp_path, content, code, says):
    (tmp_path / "question").write_bytes(content)
    with open(tmp_path / "question", encoding="utf-8") as file:
        monkeypatch.setattr("tests.cli.conftest.Stdin", lambda *_: file)
        result = cli("ask", CLIP, *QUICK)
    assert (result.code, says in result.err) == (code, True), result.err
    if not code:
        assert result.out == cli("ask", CLIP, "What?", *QUICK).out


# --- what terminals are shown ---


@pytest.fixture
def says(monkeypatch):
    """Makes the model answer with a text."""

    def answer_with(text: str) -> None:
        monkeypatch.setattr("evoprune.session.answering.stream_text", lambda *_: iter([text]))

    return answer_with


NASTY = "a\x1b[31mb\x9b2Jc\rd\u202ee\tf\ng\u00e9\u3000\U0001f468\u200d\U0001f469"


def test_answers_are_not_obeyed_by_a_terminal(cli, says, monkeypatch):
    says(NASTY)
    assert cli("ask", CLIP, "What?", *QUICK).out == NASTY + "\n"  # in a pipe it stays what it is
    monkeypatch.setattr("evoprune_cli.terminal.encodable", _as_on_a_terminal)
    shown = "a\\x1b[31mb\\x9b2Jc\\rd\\u202ee\tf\ng\u00e9\u3000\U0001f468\u200d\U0001f469\n"
    assert cli("ask", CLIP, "What?", *QUICK).out == shown


def _as_on_a_terminal(text, stream=None):
    if stream is not None:
        stream.isatty = lambda: True
    return encodable(text, stream)


def test_json_has_escapes_for_what_cannot_be_seen(cli, says):
    says(NASTY)
    out = cli("ask", CLIP, "What\u202e\u2028?", *QUICK, "--json").out
    assert json.loads(out)["answer"] == NASTY and json.loads(out)["question"] == "What\u202e\u2028?"
    assert not set(out) & set("\x1b\x9b\u202e\u2028\r") and "\u00e9\u3000" in out


# --- streams ---

REDIRECTED = {
    # shell: exit code, what stderr says
    "ask >&-": ("ask samples/square.mp4 What? -q", 2, "stdout is closed"),
    "ask --json >&-": ("ask samples/square.mp4 What? -q --json", 2, "stdout is closed"),
    "batch >&-": ("batch samples/square.mp4 -Q What? -m demo -o -", 2, "stdout is closed"),
    "eval >&-": ("eval --data samples/questions.jsonl", 2, "stdout is closed"),
    "help >&-": ("--help", 2, "stdout is closed"),
    "an unknown flag >/dev/full": ("ask samples/square.mp4 What? --json --none", 2, "No space left"),
    "help >/dev/full": ("--help", 2, "No space left"),
}


@pytest.mark.few(1)
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize(("words", "code", "says"), REDIRECTED.values(), ids=REDIRECTED)
def test_output_that_goes_nowhere(request, words, code, says):
    end = request.node.callspec.id.split(">")[1]
    done = subprocess.run(
        ["bash", "-c", f'"{sys.executable}" -m evoprune_cli {words} >{end}'], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == code and says in done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr


def test_other_streams_may_be_closed(tmp_path):
    """And no file that is opened takes their place."""
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
@pytest.mark.parametrize(("how", "code"), [("SIGINT", -signal.SIGINT), ("SIGTERM", 143)])
def test_signals_at_the_very_end(how, code, when):
    done = subprocess.run([sys.executable, "-c", PROGRAM, how, when], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", "")


def test_a_signal_that_is_ignored_stays_so():
    """As in the background of a shell script."""
    program = PROGRAM.replace("signal.default_int_handler", "signal.SIG_IGN")
    done = subprocess.run([sys.executable, "-c", program, "SIGINT", "exit"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_ctrl_c_at_any_time(tmp_path):
    """A real process, from its start to its end; both Ctrl-C and a second one soon after."""
    for tenth in range(30):
        for again_s in (None, 0.001, 0.1):
            command = [sys.executable, "-m", "evoprune_cli", "ask", CLIP, "What?", *QUICK]
            with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
                try:
                    _, err = run.communicate(timeout=0.15 + tenth / 10)
                except subprocess.TimeoutExpired:
                    run.send_signal(signal.SIGINT)
                    if again_s is not None:
                        try:
                            run.wait(again_s)
                        except subprocess.TimeoutExpired:
                            run.send_signal(signal.SIGINT)
                    _, err = run.communicate(timeout=60)
            assert run.returncode in (0, -signal.SIGINT), (tenth, err)
            # Python itself reports what comes before the first line of the program.
            assert "Traceback" not in err or "site" in err, (tenth, err)


# --- the cache ---


@pytest.mark.few(1)
@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "circle"])
def test_entries_of_the_cache_that_are_no_files(cli, monkeypatch, tmp_path, kind):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path))
    ask = ("ask", CLIP, "What?", *QUICK, "--cache", "--json")
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
