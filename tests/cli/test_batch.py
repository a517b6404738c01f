"""`evoprune batch`: records in a file, every row once whatever happens, and what is refused before any weights are read."""

import csv
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest
import torch

from evoprune import video_qa
from evoprune.batch.output import RecordFile
from evoprune.language.static import best_of
from evoprune_cli import batch
from evoprune_cli.terminal import Terminated
from tests.cli.screen import visible
from tests.video.subtitled import ASS, SRT, write_subtitled

ROOT = Path(__file__).parents[2]
CLIPS = ["samples/square.mp4", "samples/three.mp4"]
QUESTIONS = ["What happens?", "How many shapes are there?"]
CUT = "4 answers may be incomplete: -n (max_new_tokens) allows no more tokens"  # all of a test's rows have few
ASKED = [word for question in QUESTIONS for word in ("-Q", question)]


@pytest.fixture
def run(cli, tiny_folder, tmp_path):
    """`evoprune batch` on the tiny model, with `-o` somewhere in `tmp_path`, unless `args` say otherwise."""

    def call(*args, **settings):
        quick = ("-m", tiny_folder, "-n", "2", "--frames", "4", "-o", tmp_path / "out.jsonl")
        return cli("batch", *map(str, (*quick, *args)), **settings)

    return call


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def records(path: Path) -> list[dict]:
    content = path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content.split(b"\n")[:-1]]


def test_a_pattern_that_matches_nothing(run):
    assert "a pattern that matches nothing" in run("no*such.mp4", *ASKED).err
    assert run("nosuch.mp4", *ASKED).err.endswith("hint: check the path\n")


def test_a_text_file_among_videos(run, out):
    result = run(CLIPS[0], "LICENSE", "-Q", QUESTIONS[0])
    assert result.code == 6 and "failed: LICENSE is not a video: it is a text file" in result.err
    assert [record["error"] and record["error"]["type"] for record in records(out)] == [None, "video"]


def breaking(monkeypatch, at: int, problem: BaseException):
    """Makes the `at`-th token fail: the first of the `at`-th question with `-n 1`."""
    chosen = []

    def fails(*args):
        chosen.append(1)
        if len(chosen) == at:
            raise problem.with_traceback(None)
        return best_of(*args)

    monkeypatch.setattr("evoprune.language.generate.best_of", fails)


def test_a_record_for_every_question_about_every_video(run, cli, out, tiny_folder):
    result = run(*CLIPS, *ASKED)
    assert (result.code, result.out) == (0, "") and result.err.startswith("4 of 4 rows answered: 0:")
    made = records(out)
    assert [(r["video"]["path"], r["question"]) for r in made] == [(clip, q) for clip in CLIPS for q in QUESTIONS]
    assert len({r["id"] for r in made}) == 4 and [r["time_ms"]["encode"] > 0 for r in made] == [True, False] * 2
    alone = cli("ask", CLIPS[0], *ASKED, "-m", tiny_folder, "-n", "2", "--frames", "4", "--json").out.splitlines()
    for ours, theirs in zip(made, map(json.loads, alone), strict=False):
        assert ours.keys() == theirs.keys() and ours["schema"] == "evoprune/answer@1"
        for name in ("question", "answer", "finish_reason", "video", "sampling", "pruning", "tokens", "model", "error"):
            assert ours[name] == theirs[name], name


def rows_file(folder: Path, form: str) -> Path:
    """Rows about the sample clips, under names relative to the file."""
    fields = ["id", "video", "question", "start", "options"]
    lines = [
        ["a", "clips/square.mp4", "What, then?", "", ""],
        ["b", "clips/three.mp4", "Which?", "1", "red|blue"],
        ["", "clips/square.mp4", "Who?", "", ""],
    ]
    (folder / "clips").symlink_to(ROOT / "samples")
    path = folder / f"rows.{form}"
    with open(path, "w", newline="") as file:
        if form == "csv":
            csv.writer(file).writerows([fields, *lines])
            return path
        for line in lines:
            row = {name: cell for name, cell in zip(fields, line, strict=True) if cell}
            if "options" in row:
                row["options"] = row["options"].split("|")
            file.write(json.dumps(row) + "\n")
    return path


@pytest.mark.few(1)
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_rows_from_a_file_and_from_stdin(run, out, tmp_path, monkeypatch, form):
    path = rows_file(tmp_path, form)
    assert run("--from", path, "--end", "3").code == 0
    made = records(out)
    assert [r["id"] for r in made][::2] == ["a", "b"] and [r["video"]["path"][6:] for r in made] == [
        "square.mp4",
        "square.mp4",
        "three.mp4",
    ]
    assert [(r["sampling"]["start_s"], r["sampling"]["end_s"]) for r in made] == [(0, 3), (0, 3), (1, 3)]
    assert "\nA. red\nB. blue\n" in made[2]["question"] and made[2]["batch"]["row"]["options"] == ["red", "blue"]
    content = path.read_bytes()
    monkeypatch.chdir(tmp_path)  # from stdin, names are relative to where we are
    result = run("--from", "-", "--end", "3", "-o", "-", stdin=content)
    assert [json.loads(line)["id"] for line in result.out.splitlines()] == [r["id"] for r in made]


def test_to_stdout(run):
    result = run(*CLIPS, *ASKED, "-o", "-")
    assert result.code == 0 and len(result.out.splitlines()) == 4 and result.err.startswith("4 of 4 rows answered")
    result = run(*CLIPS, "gone.mp4", *ASKED, "-o", "-")
    assert result.code == 6 and len(result.out.splitlines()) == 6 and "--resume" not in result.err


def test_model_from_the_environment(cli, tiny_folder, monkeypatch, out):
    monkeypatch.setenv("EVOPRUNE_MODEL", str(tiny_folder))
    assert cli("batch", CLIPS[0], "-Q", "What?", "-n", "1", "-o", out).code == 0
    assert records(out)[0]["model"]["id"] == str(tiny_folder)


def no_weights(monkeypatch):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))


@pytest.mark.parametrize(
    ("args", "says", "code"),
    [
        ((), "no videos", 2),
        ((*CLIPS, "What is here?"), "put -Q before each question", 2),
        ((*CLIPS, "-", *ASKED), "no video from stdin", 2),
        ((*CLIPS, CLIPS[0], *ASKED), "'samples/square.mp4' is there twice", 2),
        ((*CLIPS, *ASKED, *ASKED), "'What happens?' is there twice", 2),
        (
            ("gone.mp4", *CLIPS, CLIPS[0], "-Q", ""),
            f"{CLIPS[0]!r} is there twice; '': question is empty; no such file: g",
            2,
        ),
        (("tests/cli", *ASKED), "neither videos nor images in the folder tests/cli", 2),
        ((*CLIPS, "-Q", "caf\udce9"), "not valid text", 2),
        ((*CLIPS, *ASKED, "-s", "caf\udce9"), "system prompt is not valid text", 2),
        ((*CLIPS, *ASKED, "-b", "2"), "budget '2'", 2),
        ((*CLIPS, *ASKED, "--method-arg", "speed=1"), "speed", 2),
        ((*CLIPS, *ASKED, "--start", "3", "--end", "2"), "end 2 s is not after", 2),
        ((*CLIPS, *ASKED, "--decoder", "vlc"), "vlc", 2),
        ((*CLIPS, *ASKED, "--device", "abacus"), "abacus", 2),
        ((*CLIPS, *ASKED, "--json"), "--json", 2),
        ((*CLIPS, *ASKED, "-o", "-", "--resume"), "no file that could be", 2),
        ((*CLIPS, *ASKED, "-o", "samples"), "cannot write samples: Is a directory", 2),
        ((*CLIPS, *ASKED, "-o", "/proc/out.jsonl"), "cannot write /proc/out.jsonl", 2),
        ((*CLIPS, *ASKED, "-o", CLIPS[1], "--overwrite"), "samples/three.mp4 is what is to be read", 2),
        (("--overwrite", "-o", *CLIPS, *ASKED), "samples/square.mp4 is there, and holds no records of a batch", 2),
        (("--from", "samples/questions.jsonl", "-o", "./samples/questions.jsonl", "--overwrite"), "is to be read", 2),
        (("--from", "-"), "nothing is piped", 2),
        (("--from", "LICENSE"), "LICENSE: the first line must name the columns", 2),
        (("gone.mp4", "lost.mp4", *ASKED), "no such file: gone.mp4, lost.mp4\n", 3),
        (("https://example.org/a.mp4", *ASKED), "yt-dlp", 3),
        ((*CLIPS, *ASKED, "-m", "samples"), "config.json", 4),
    ],
)
def test_refused_before_weights_are_read(run, monkeypatch, out, args, says, code):
    no_weights(monkeypatch)
    result = run(*args)
    assert result.code == code and says in result.err, result.err
    if "--json" not in args:
        assert result.out == "" and len(result.err.splitlines()) == 2 and "hint: " in result.err
    assert not out.exists()


def test_what_is_there_is_not_lost(run, out, monkeypatch):
    assert run(*CLIPS, *ASKED).code == 0
    before = out.read_bytes()
    result = run(*CLIPS, *ASKED)
    assert result.code == 2 and "is there already" in result.err and "--resume" in result.err.splitlines()[1]
    assert run(*CLIPS, *ASKED, "--overwrite", "-m", "samples").code == 4 and out.read_bytes() == before
    assert run(CLIPS[0], *ASKED, "--overwrite").code == 0 and len(records(out)) == 2


def test_resume_asks_what_is_left(run, out, monkeypatch):
    assert run(CLIPS[0], *ASKED, "--resume").code == 0  # nothing there yet
    before = out.read_bytes()
    result = run(*CLIPS, *ASKED, "--resume")
    assert result.code == 0 and result.err.startswith("4 of 4 rows answered, 2 of them before: 0:")
    assert out.read_bytes().startswith(before) and len({r["id"] for r in records(out)}) == len(records(out)) == 4
    no_weights(monkeypatch)
    result = run(*CLIPS, *ASKED, "--resume")
    assert (result.code, result.err) == (0, "4 of 4 rows answered, 4 of them before\n")


def test_resume_keeps_the_records_of_other_rows(run, out, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert run(CLIPS[0], broken, "-Q", "What colour is the square?").code == 6
    before = out.read_bytes()
    result = run(CLIPS[0], broken, "-Q", "Is there a digit?", "--resume")
    assert result.code == 6 and "also holds 2 records of other rows, which stay in it" in result.err
    assert out.read_bytes().startswith(before) and len(records(out)) == 4


def test_resume_mends_a_torn_line_and_refuses_other_settings(run, out, monkeypatch):
    run(*CLIPS, *ASKED)
    names, whole = [r["id"] for r in records(out)], out.read_bytes()
    out.write_bytes(whole[:-100])
    with monkeypatch.context() as patch:
        no_weights(patch)
        for args, says in (
            (("--seed", "1"), "other settings: seed was 0, is 1"),
            (("-b", "1"), "budget was 'balanced', is 1"),
            (("--method", "random"), "method was 'evoprune', is 'random'"),
        ):
            result = run(*CLIPS, *ASKED, "--resume", *args)
            assert result.code == 2 and says in result.err and out.read_bytes() == whole[:-100]
    assert run(*CLIPS, *ASKED, "--resume").code == 0
    assert [r["id"] for r in records(out)] == names


def test_a_video_that_is_missing(run, out, tmp_path):
    late = tmp_path / "late.mp4"
    result = run(CLIPS[0], late, *ASKED)
    assert result.code == 6
    assert "late.mp4 (its rows will fail)" in " ".join(result.err.split())
    assert "2 of 4 rows answered, 2 failed: " in result.err and "with --resume" in result.err
    assert result.err.count("late.mp4") == 1  # it was named before
    good, bad = records(out)[:2], records(out)[2:]
    assert all(r["error"] is None for r in good)
    assert [(r["error"]["code"], r["finish_reason"], r["answer"]) for r in bad] == [(3, "error", None)] * 2
    assert [r["video"]["path"] for r in bad] == [str(late)] * 2 and len({r["id"] for r in records(out)}) == 4
    assert run(CLIPS[0], late, *ASKED, "--resume").code == 6 and len(records(out)) == 4
    late.write_bytes((ROOT / CLIPS[1]).read_bytes())
    result = run(CLIPS[0], late, *ASKED, "--resume")
    assert result.code == 0 and result.err.startswith("4 of 4 rows answered, 2 of them before")
    assert [r["id"] for r in records(out)] == [r["id"] for r in (*good, *bad)]


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("problem", "kind"), [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (ZeroDivisionError(), "bug")]
)
def test_a_row_that_fails(run, out, monkeypatch, problem, kind):
    with monkeypatch.context() as patch:
        breaking(patch, 3, problem)
        result = run(*CLIPS, *ASKED, "-n", "1")
    assert result.code == 6 and "3 of 4 rows answered, 1 failed" in result.err and "Traceback" not in result.err
    assert [r["error"] and r["error"]["type"] for r in records(out)] == [None, None, kind, None]
    breaking(monkeypatch, 1, problem)
    result = run(*CLIPS, *ASKED, "-n", "1", "--resume", "--debug")
    assert result.code == 6 and result.err.startswith("Traceback") and type(problem).__name__ in result.err
    assert [r["error"] is None for r in records(out)] == [True, True, True, False]


@pytest.mark.few(1)
@pytest.mark.parametrize("problem", [KeyboardInterrupt(), Terminated()])
def test_an_interruption_keeps_what_is_finished(run, out, monkeypatch, problem):
    with monkeypatch.context() as patch:
        breaking(patch, 2, problem)
        result = run(*CLIPS, *ASKED, "-n", "1")
    assert result.code == (130 if isinstance(problem, KeyboardInterrupt) else 143) and result.out == ""
    assert "1 of 4 rows answered" in result.err and "the same command with --resume" in result.err
    assert [r["question"] for r in records(out)] == QUESTIONS[:1]
    assert run(*CLIPS, *ASKED, "-n", "1", "--resume").code == 0 and len(records(out)) == 4


@pytest.mark.full
@pytest.mark.parametrize("problem", [KeyboardInterrupt(), Terminated()])
@pytest.mark.parametrize("at", ["best_of", "load_weights"])
def test_an_interruption_before_the_first_record(run, out, monkeypatch, problem, at):
    def stops(*_):
        raise problem.with_traceback(None)

    where = {
        "best_of": "evoprune.language.generate.best_of",
        "load_weights": "evoprune.session.loading.model.load_weights",
    }
    monkeypatch.setattr(where[at], stops)
    result = run(*CLIPS, *ASKED)
    assert result.err == "interrupted: no record was written; to go on: the same command\n"
    assert result.out == "" and not out.exists() and run(*CLIPS, *ASKED, "-q").err == ""


def test_a_folder_of_videos(run, out, tmp_path):
    (folder := tmp_path / "clips").mkdir()
    for name in ("b10.mp4", "b9.MP4", "notes.txt", ".hidden.mp4"):
        (folder / name).symlink_to(ROOT / CLIPS[0])
    (folder / "inside").mkdir()
    assert run(folder, CLIPS[1], "-Q", "Who?").code == 0
    assert [r["video"]["path"] for r in records(out)] == [f"{folder}/b9.MP4", f"{folder}/b10.mp4", CLIPS[1]]


def test_another_one_is_writing(run, out):
    with closing(RecordFile(str(out))):
        for how in ((), ("--resume",), ("--overwrite",)):
            result = run(*CLIPS, *ASKED, *how)
            assert result.code == 2 and "another batch is writing" in result.err and "hint: wait" in result.err


@pytest.mark.few(1)
@pytest.mark.parametrize("columns", [100, 50])
def test_progress_on_a_terminal(run, columns):
    result = run(*CLIPS, *ASKED, columns=columns)
    assert " of 4 rows, " in result.err and " left" in result.err
    last = visible(result.err)
    assert last[0].startswith("4 of 4 rows answered: 0:") and max(map(len, last)) <= columns
    assert " ".join(" ".join(last[1:]).split()) == CUT
    assert visible(run(*CLIPS, *ASKED, "-q", "--overwrite", columns=columns).err) == []


def test_progress_where_nobody_watches(run, monkeypatch):
    monkeypatch.setattr(batch, "TELL_EVERY_S", 0.0)
    lines = run(*CLIPS, *ASKED).err.splitlines()
    assert [line.split(",")[0] for line in lines[:4]] == [f"{n} of 4 rows" for n in range(1, 5)]
    assert all(re.search(r" a (second|minute), ~.* left$", line) for line in lines[:4])
    assert len(lines) == 6 and lines[5] == CUT


@pytest.mark.parametrize(
    ("made", "seconds", "says"), [(4, 2.0, "2 a second"), (2, 60.0, "2 a minute"), (3, 7200.0, "1.5 an hour")]
)
def test_pace(made, seconds, says):
    assert batch.pace(made, seconds) == says


def test_a_warning_is_told_once_even_where_it_is_quiet(cli, out, foreign):
    result = cli("batch", foreign, *ASKED, "-m", "demo", "-q", "-o", out)
    assert result.code == 0 and result.err.count("warning: ") == 1
    assert [r["warnings"] for r in records(out)] == [["demo_model"]] * 2


def test_frames_that_a_limit_leaves_out_are_told_once(run, out):
    result = run(*CLIPS, "-Q", QUESTIONS[0], "--frames", "64")
    (line,) = [line for line in result.err.splitlines() if line.startswith("warning: ")]
    assert "fewer or smaller frames" in line and line.endswith("and 1 more)")
    assert [r["warnings"] for r in records(out)] == [["limited", "answer_cut"]] * 2


def test_cache(run, out, monkeypatch, tmp_path):
    monkeypatch.setenv("EVOPRUNE_CACHE_DIR", str(tmp_path / "cache"))
    for state in ("miss", "hit"):
        run(*CLIPS, *ASKED, "--cache", "--overwrite")
        assert {r["cache"] for r in records(out)} == {state}


def test_a_path_that_is_no_text(run, out, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    Path(path).write_bytes((ROOT / CLIPS[0]).read_bytes())
    for _ in range(2):
        assert run(path, *ASKED, "--resume").code == 0
    assert [r["video"]["path"] for r in records(out)] == [path] * 2


def test_a_bug_outside_of_rows_is_not_hidden(run, out, monkeypatch):
    monkeypatch.setattr(RecordFile, "add", lambda *_: 1 / 0)
    result = run(*CLIPS, *ASKED)
    assert result.code == 1 and "ZeroDivisionError" in result.err and not out.exists()


def test_the_model_is_loaded_once(run, monkeypatch):
    loads, real = [], video_qa.load_model
    monkeypatch.setattr(video_qa, "load_model", lambda *a, **k: loads.append(1) or real(*a, **k))
    run(*CLIPS, *ASKED)
    assert loads == [1]


# In processes of their own.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tiny_folder, tmp_path):
    """Starts a batch of 20 or more rows about all samples: two spans of each video, so many questions."""
    videos = sorted(map(str, (ROOT / "samples").glob("*.[mw]*")))

    def call(*args, questions: int = 2, out: Path = tmp_path / "out.jsonl", **how) -> subprocess.Popen:
        rows = [
            {
                "id": f"{Path(video).stem} {start} {number}",
                "video": video,
                "question": f"What is {number}?",
                "start": start,
            }
            for video in videos
            for start in (0, 1)
            for number in range(questions)
        ]
        source = tmp_path / "rows.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        quick = ("-m", tiny_folder, "-n", "2", "--frames", "4", "--from", source, "-o", out)
        return subprocess.Popen(
            [sys.executable, "-m", "evoprune_cli", "batch", *map(str, (*quick, *args))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=ENVIRONMENT,
            **how,
        )

    return call


def wait_for_lines(process, out: Path, count: int) -> None:
    until = time.monotonic() + 120
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < count):
        assert time.monotonic() < until
        time.sleep(0.002)


def kill_and_resume(start, out: Path, kills: int, questions: int, seed: int) -> None:
    """Kills a batch again and again, mostly once a few more rows are done, lets it finish, and compares it with a whole one."""
    whole = out.with_name("whole.jsonl")
    assert start(questions=questions, out=whole).wait(300) == 0
    draw, total = random.Random(seed), 12 * questions
    for number in range(kills):
        process = start("--resume", questions=questions)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 4))  # while it is imported, the model loaded, the file looked through
        else:
            wait_for_lines(process, out, draw.randint(number * total // kills, (number + 1) * total // kills - 1))
            time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        if draw.random() < 0.5 and out.exists():  # as if it had been hit while it wrote
            content = out.read_bytes()
            out.write_bytes(content[: max(0, len(content) - draw.randint(1, 4000))])
    last = start("--resume", questions=questions)
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err.decode()
    ours, theirs = ({r["id"]: (r["question"], r["answer"], r["pruning"]) for r in records(p)} for p in (out, whole))
    assert len(records(out)) == len(ours) == total and ours == theirs


@pytest.mark.full
def test_killed_twice_and_resumed(start, out):
    kill_and_resume(start, out, kills=2, questions=3, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1])
def test_killed_twenty_times_and_resumed(start, out, seed):
    kill_and_resume(start, out, kills=20, questions=20, seed=seed)


@pytest.mark.full
def test_the_disk_is_full(start, out):
    """A limit on the size of files, which the fifth record or so runs into."""
    process = start(preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000)))
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2 and 1 <= len(records(out)) < 24
    lines = err.decode().splitlines()
    assert lines[-2].startswith(f"error: cannot write {out}: ") and lines[-1] == "hint: make room there"
    assert start("--resume").wait(120) == 0 and len(records(out)) == len({r["id"] for r in records(out)}) == 24


@pytest.mark.full
def test_two_at_a_time(start, out):
    first = start(questions=40)
    wait_for_lines(first, out, 1)
    second = start("--resume", questions=40)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2 and b"another batch is writing" in err and first.poll() is None
    first.kill()
    first.communicate()


@pytest.mark.full
def test_nobody_reads(start):
    process = start(questions=40, out=Path("-"))
    assert json.loads(process.stdout.readline())["error"] is None
    process.stdout.close()
    assert process.wait(120) == 0 and process.stderr.read() == b""
    process.stderr.close()


# Subtitles, pictures, several inputs.


CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture
def clip(tmp_path):
    return shutil.copy(CLIP, tmp_path / "clip.mp4")


@pytest.fixture
def subtitled(cli, tiny_folder, tmp_path):
    def call(*args):
        quick = ("-m", tiny_folder, "-n", "2", "--frames", "4", "-o", tmp_path / "out.jsonl")
        result = cli("batch", *map(str, (*quick, *args)))
        lines = (tmp_path / "out.jsonl").read_text().splitlines() if (tmp_path / "out.jsonl").exists() else []
        return result, [json.loads(line) for line in lines]

    return call


@pytest.mark.full
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_rows_of_a_batch(subtitled, clip, tmp_path, form):
    write_subtitled(tmp_path / "track.mkv", [ASS])
    (tmp_path / "said.srt").write_text(SRT)
    rows = [
        {"video": "clip.mp4", "question": "Who?", "subtitles": "said.srt"},
        {"video": "clip.mp4", "question": "Who?", "subtitles": "none"},
        {"video": "clip.mp4", "question": "Who?"},
        {"video": "track.mkv", "question": "Who?", "subtitles": "auto"},
        {"video": "track.mkv", "question": "Who?", "subtitles": "gone.srt"},
    ]
    path = tmp_path / f"rows.{form}"
    with path.open("w", newline="") as file:
        if form == "csv":
            writer = csv.DictWriter(file, ["video", "question", "subtitles"])
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
    result, made = subtitled("--from", path)
    found = {record["batch"]["row"].get("subtitles"): record["subtitles"] for record in made}
    assert result.code == 6 and len({record["id"] for record in made}) == 5
    assert {key: value and value["source"] for key, value in found.items()} == {
        "said.srt": f"{tmp_path}/said.srt", "none": None, None: None, "auto": "track 1 (eng)", "gone.srt": None,
    }  # fmt: skip
    (failed,) = [record["error"] for record in made if record["error"]]
    assert failed["code"] == 3 and "gone.srt" in failed["message"]
    (tmp_path / "gone.srt").write_text(SRT)
    result, made = subtitled("--from", path, "--resume")
    assert result.code == 0 and len(made) == 5 and not any(record["error"] for record in made)
    assert [record["tokens"]["text"] for record in made if record["subtitles"] is None] == [
        made[1]["tokens"]["text"]
    ] * 2


def test_an_option_for_all_rows_and_resume(subtitled, clip, tmp_path):
    (tmp_path / "clip.srt").write_text(SRT)
    result, made = subtitled(clip, CLIP, "-Q", "Who?", "--subtitles", "auto")
    assert result.code == 0 and [bool(record["subtitles"]) for record in made] == [True, False]
    assert made[0]["batch"]["settings"]["subtitles"] == "auto"
    assert "subtitles was 'auto', is None" in subtitled(clip, CLIP, "-Q", "Who?", "--resume")[0].err
    assert subtitled(clip, CLIP, "-Q", "Who?", "--resume", "--subtitles", "auto")[0].code == 0


def test_outputs_of_versions_without_subtitles_can_be_resumed(subtitled, clip):
    settings = subtitled(clip, "-Q", "Who?")[1][0]["batch"]
    assert "subtitles" not in settings["row"] and not any("subtitle" in name for name in settings["settings"])


CLIP, OTHER, DIFFERS = "samples/square.mp4", "samples/arrivals.webm", "What differs?"
QUICK = ("-n", "2")


def test_a_batch_of_pictures_and_several_inputs(cli, photo, tmp_path):
    rows = [{"video": photo, "question": "What?"}, {"inputs": [os.path.abspath(CLIP), photo], "question": "What?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out.jsonl"
    result = cli("batch", "--from", tmp_path / "rows.jsonl", "-m", "demo", "-o", out, *QUICK)
    assert result.code == 0
    made = [json.loads(line) for line in out.read_text().splitlines()]
    assert [len(record["inputs"]) for record in made] == [1, 2]
    assert made[1]["batch"]["row"]["inputs"] == rows[1]["inputs"] and "video" not in made[1]["batch"]["row"]
    again = cli("batch", "--from", tmp_path / "rows.jsonl", "-m", "demo", "-o", out, *QUICK, "--resume")
    assert again.code == 0 and "2 of 2 rows answered, 2 of them before" in again.err
