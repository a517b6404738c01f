"""Test `evoprune watch`: live video on the command line, questions while it runs, and how it ends."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import av
import pytest

from evoprune.video.readers.live import LiveReader
from evoprune_cli.ask import Conversation
from tests.cli.conftest import ROOT
from tests.video.files import numbered_frames, write_video
from tests.video.streaming import streams

CLIP, QUESTION, MORE = str(ROOT / "samples" / "square.mp4"), "What colour is the square?", "How many shapes are there?"
ASKED = ("-Q", QUESTION)
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")} | {"OMP_NUM_THREADS": "1"}


def records(out: str) -> list[dict]:
    return [json.loads(line) for line in out.splitlines()]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    clip = write_video(tmp_path_factory.mktemp("served") / "clip.ts", numbered_frames(60, 112, 168), fps=10)
    with streams(clip) as (url, _):
        yield url


def test_at_the_end_of_a_file(cli):
    result = cli("watch", CLIP, *ASKED, "-q")
    assert (result.code, result.out, result.err) == (0, "green\n", "")


@pytest.mark.full
def test_again_and_again(cli):
    """The last window ends with the source."""
    result = cli("watch", CLIP, *ASKED, "-Q", MORE, "--every", "2s", "--window", "8s", "--pace", "file", "--json")
    found = records(result.out)
    assert result.code == 0 and [each["question"] for each in found] == [QUESTION, MORE] * (len(found) // 2)
    ends = [each["stream"]["end_s"] for each in found[::2]]
    assert ends == sorted(set(ends)) and ends[-1] == 6.0 and len(ends) >= 3
    assert all(end >= 2.0 * number for number, end in enumerate(ends, 1))
    assert all(each["stream"]["tokens"] == each["tokens"]["visual"] for each in found)
    assert all(each["video"]["path"] == CLIP for each in found) and found[0]["time_ms"]["encode"] > 0


@pytest.fixture(scope="module")
def untagged(tmp_path_factory):
    """A clip that the demo model knows, in a format without tags, over http."""
    path = tmp_path_factory.mktemp("untagged") / "clip.ts"
    with av.open(CLIP) as source, av.open(str(path), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                target.mux(packet)
    with streams(path) as (url, _):
        yield url


@pytest.mark.full
@pytest.mark.parametrize("source", ["whole", "file"])
def test_what_can_wait_is_asked_about_at_every_moment(cli, untagged, source):
    """A source that can wait is read faster than it plays, and each answer sees exactly the frames before its moment."""
    name = CLIP if source == "file" else f"{untagged}/whole.ts"
    result = cli("watch", name, *ASKED, "-Q", MORE, "--every", "1s", "--window", "2s", "--json")
    ends = [each["stream"]["end_s"] for each in records(result.out)]
    assert ends == [moment for moment in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0) for _ in range(2)]
    assert "left out" not in result.err and {each["stream"]["skipped"] for each in records(result.out)} == {0}


@pytest.mark.full
def test_a_moment_without_new_frames_is_left_out_aloud(cli, tmp_path):
    clip = write_video(tmp_path / "rare.mkv", numbered_frames(4), pts=[0.0, 3.0, 6.0, 6.5])
    how = ("--window", "2s", "--timeout", "3s")  # waits that long for the file to grow
    result = cli("watch", clip, *ASKED, "--every", "1s", *how, "--json")
    assert [each["stream"]["end_s"] for each in records(result.out)] == [0.5, 3.5, 7.0]
    assert "2 answers skipped, from 0:02.0 to 0:03.0: no frame has arrived" in result.err


def test_no_answer_is_left_out_between_two_frames(cli):
    """If questions come more often than frames, they are asked at every frame, with one warning."""
    result = cli("watch", CLIP, *ASKED, "--every", "0.1s", "--window", "2s", "--fps", "1", "--json", "-q")
    assert [each["stream"]["end_s"] for each in records(result.out)] == [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]
    assert result.err == "warning: one frame is sampled every 1 s (--fps), so -Q is not asked more often\n"


@pytest.mark.full
def test_frames_that_come_late_are_no_slow_answers(cli, tmp_path):
    clip = write_video(tmp_path / "rare.mkv", numbered_frames(4), pts=[0.0, 0.5, 3.5, 4.0])
    result = cli("watch", clip, "--pace", "file", *ASKED, "--every", "1s", "--window", "2s", "-q")
    assert result.code == 0 and "meanwhile" not in result.err
    assert "warning: 2 answers skipped, from 0:02.0 to 0:03.0: no frame " in result.err


@pytest.mark.full
def test_what_does_not_wait_says_which_answers_were_left_out(cli, untagged, monkeypatch):
    def slow(self, question, *args):
        time.sleep(2.2)
        return real(self, question, *args)

    real = Conversation._ask_and_print
    monkeypatch.setattr(Conversation, "_ask_and_print", slow)
    result = cli("watch", CLIP, "--pace", "file", *ASKED, "--every", "1s", "--window", "2s")
    assert (
        result.code == 0
        and "skipped, " in result.err
        and "the video continued during the previous answer" in result.err
    )


def test_an_answer_has_its_time_on_stderr_alone(cli):
    result = cli("watch", CLIP, *ASKED, "--every", "3s", "--no-stats")
    assert result.out == "green\ngreen\n" and [line for line in result.err.splitlines() if "up to" in line] == [
        "up to 0:03.0:",
        "up to 0:06.0:",
    ]


def test_a_format_without_tags_makes_no_answer_worthless(cli, untagged):
    result = cli("watch", f"{untagged}/whole.ts", *ASKED, "-q")
    assert result.out == "green\n" and "meaningless" not in result.err and "does not show whether" in result.err
    assert cli("watch", CLIP, *ASKED, "-q").err == ""


def test_questions_from_a_pipe(cli, tmp_path):
    lines = [{"question": QUESTION, "id": "a"}, {"question": " "}, ["no"], {"question": MORE, "id": 7}]
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + "broken {\n\n")
    result = cli("watch", CLIP, "--questions", path, "--json")
    found = records(result.out)
    assert result.code == 6 and [each["error"] and each["error"]["code"] for each in found] == [None, 2, 2, None, 2]
    assert [found[0]["id"], found[3]["id"]] == ["a", "7"] and found[0]["answer"]
    assert result.err.count("hint:") == 3


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a named pipe")
def test_questions_that_come_after_the_end_of_the_video_are_answered(cli, tmp_path):
    pipe = tmp_path / "questions"
    os.mkfifo(pipe)

    def ask():
        with pipe.open("w") as file:
            time.sleep(2)
            file.write(json.dumps({"question": QUESTION}) + "\n")

    asking = threading.Thread(target=ask)
    asking.start()
    result = cli("watch", CLIP, "--questions", pipe)
    asking.join()
    assert (result.code, result.out) == (0, "green\n") and "the video has ended" in result.err


@pytest.mark.parametrize("identity", ["\ud800", {"a": 1}, True, 1.5])
def test_an_id_is_text_or_a_whole_number(cli, tmp_path, identity):
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps({"question": QUESTION, "id": identity}) + "\n")
    result = cli("watch", CLIP, "--questions", path, "--json")
    assert result.code == 6 and [each["error"]["code"] for each in records(result.out)] == [2]
    result.out.encode()


def test_the_prompt(cli):
    result = cli("watch", CLIP, stdin=f"{QUESTION}\n/help\n{MORE}\nq\n", terminal=True, columns=100)
    assert result.code == 0 and result.out.splitlines()[0] and len(result.out.splitlines()) == 2
    assert "Ask about the video so far" in result.err and result.err.count("> ") >= 4
    assert re.search(r"\d seen(, [\d,]+ tokens)?.*lag", result.err) or "ended" in result.err


def test_the_prompt_remembers(cli, tiny_folder):
    flags = ("-m", tiny_folder, "--dtype", "fp32", "-n", "3", "--json")
    lines = f"{QUESTION}\n{MORE}\n/undo\n/new\n{MORE}\n"
    result = cli("watch", CLIP, *flags, stdin=lines, terminal=True)
    assert [record["conversation"]["turns"] for record in records(result.out)] == [0, 1, 0]
    assert f"removed: {MORE}" in result.err and "Questions are independent" not in result.err
    single = cli("watch", CLIP, *flags, "--history", "off", stdin=f"{QUESTION}\n/undo\n", terminal=True)
    assert records(single.out)[0]["conversation"] is None and "nothing to undo: questions are independent" in single.err
    assert "independent: the demo models know only single questions" in cli("watch", CLIP, stdin="", terminal=True).err


@pytest.mark.full
def test_the_status_line_is_for_terminals(cli):
    on_terminal = cli("watch", CLIP, *ASKED, "--pace", "file", "--window", "2s", columns=80)
    assert "lag 0." in on_terminal.err and "frames" in on_terminal.err and on_terminal.out == "green\n"
    assert max(len(line) for line in on_terminal.err.split("\r") if "lag" in line) < 90
    for result in (cli("watch", CLIP, *ASKED), cli("watch", CLIP, *ASKED, "-q", columns=80)):
        assert "lag" not in result.err and result.out == "green\n"


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((CLIP,), "no questions, and stdin is not a terminal"),
        ((CLIP, "--every", "3s"), "--every needs a question"),
        ((CLIP, *ASKED, "--every", "soon"), "is not a time"),
        ((CLIP, *ASKED, "--history", "on"), "--history applies only to questions at a prompt"),
        ((CLIP, *ASKED, "--window", "0"), "--window is 0"),
        ((CLIP, "-Q", " "), "the question is empty"),
        (("-", "--questions", "-"), "both the video and the questions"),
        ((CLIP, *ASKED, "--method", "fastv"), "cannot prune a stream"),
        ((CLIP, "--questions", "gone.jsonl"), "no such file: gone.jsonl"),
    ],
)
def test_what_makes_no_sense(cli, args, says):
    result = cli("watch", *args, "--json")
    assert result.code == 2 and says in result.record["error"]["message"] and "hint: " in result.err


def test_a_question_without_its_flag(cli):
    result = cli("watch", CLIP, QUESTION)
    assert result.code == 2 and 'hint: put -Q before a question: evoprune watch SOURCE -Q "' in result.err


@pytest.mark.parametrize(
    ("name", "timeout", "answers", "says"),
    [("stall", "3s", 1, "nothing came from"), ("nothing", "10s", 0, "cannot read")],
)
def test_sources_that_fail(cli, served, name, timeout, answers, says):
    """Questions about the part before the failure are answered, then the error follows."""
    result = cli("watch", f"{served}/{name}.ts", *ASKED, "--timeout", timeout, "--reconnects", "0", "--json")
    found = records(result.out)
    assert result.code == 3 and says in result.err and len(found) == answers + 1
    assert found[-1]["error"]["code"] == 3 and [bool(each["answer"]) for each in found] == [True] * answers + [False]


def test_a_password_is_in_no_output(cli, served):
    result = cli("watch", served.replace("//", "//me:sesame@") + "/secret.ts", *ASKED, "--reconnects", "0", "--json")
    assert result.code == 0 and "sesame" not in result.out + result.err and result.record["answer"]


def test_a_pipe_that_is_interrupted():
    """stdin is the video, and stays open."""
    process = subprocess.Popen(
        [sys.executable, "-m", "evoprune_cli", "watch", "-", *ASKED, "--every", "1s", "--window", "1s", "-q", "--json"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=ENVIRONMENT,
        cwd=ROOT,
        # In background test runs the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    clip = (ROOT / "samples" / "vanish.webm").read_bytes()
    threading.Thread(target=lambda: (process.stdin.write(clip), process.stdin.flush()), daemon=True).start()
    record = json.loads(process.stdout.readline())
    assert record["answer"] and record["video"]["path"] == "standard input"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
    assert b"Traceback" not in process.stderr.read()
    process.stdin.close()


@pytest.mark.parametrize(("where", "reason"), [("_ask_and_print", "interrupt"), ("_finish", "stop")])
def test_ctrl_c_in_an_answer_ends_what_nobody_types(cli, monkeypatch, where, reason):
    """Before the first token, and while the record is printed: one record of that question, and none of the next."""

    def interrupted(self, *args):
        if where == "_finish":
            real(self, *args)
        raise KeyboardInterrupt

    real = getattr(Conversation, where)
    monkeypatch.setattr(Conversation, where, interrupted)
    result = cli("watch", CLIP, *ASKED, "-Q", MORE, "--json")
    assert result.code == 130 and result.record["question"] == QUESTION and result.record["finish_reason"] == reason


@pytest.mark.full
def test_ctrl_c_stops_an_answer_and_at_the_prompt_everything(keyboard, endless):
    screen, process = keyboard("watch", CLIP, "--pace", "file", "-m", endless, "-n", "3000", "-t", "1", "-q")
    screen.wait_for("> ")
    screen.press(b"What happens?\n")
    assert process.stdout.read(1)
    screen.press(b"\x03")
    screen.wait_for("> ", 2)
    screen.press(b"\x03")
    assert process.wait(60) == -signal.SIGINT and "Traceback" not in screen.finish()


def test_a_frame_that_is_early_by_a_rounding_error_holds_nothing_up(cli, tmp_path, monkeypatch):
    """The frame at 15 s has a time just below it, so it is held back until the question at 15 s has been asked."""
    path = write_video(tmp_path / "slow.ts", numbered_frames(22, 112, 168), fps=1)
    timed = LiveReader.timed
    early = 15 - 2**-49
    monkeypatch.setattr(
        LiveReader, "timed", lambda self: ((early if at == 15 else at, each) for at, each in exact(timed(self)))
    )
    monkeypatch.setattr("evoprune.video.sandbox.isolation.POSSIBLE", False)
    result = cli("watch", str(path), *ASKED, "--every", "5s", "--json")
    assert result.code == 0 and [each["stream"]["end_s"] for each in records(result.out)][:3] == [4.5, 9.5, 14.5]


def exact(frames):
    """Round the times of frames to whole seconds."""
    return ((float(round(at)), each) for at, each in frames)


@pytest.mark.parametrize("name", ["gone.jsonl", "."])
def test_a_file_of_questions_is_checked_before_weights_are_read(cli, monkeypatch, name):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    result = cli("watch", CLIP, "--questions", name)
    assert result.code == 2 and name in result.err and "hint: to read stdin" in result.err
