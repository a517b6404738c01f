"""`evoprune batch`: records in a file, every row exactly once, and inputs that are refused before any weights are read."""

import csv
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from evoprune.backend import limits
from evoprune.language.static import best_of
from evoprune.session import session
from evoprune_cli import batch
from evoprune_cli.terminal import Terminated
from tests.cli.screen import visible
from tests.video.files import numbered_frame, write_image
from tests.video.subtitled import ASS, SRT, write_subtitled

ROOT = Path(__file__).parents[2]
CLIPS = ["samples/square.mp4", "samples/three.mp4"]
QUESTIONS = ["What happens?", "How many shapes are there?"]
CUT = "4 answers may be incomplete: -n (max_new_tokens) allows no more tokens"  # all rows here have few tokens
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
    assert "no file matches this pattern" in run("no*such.mp4", *ASKED).err
    assert run("nosuch.mp4", *ASKED).err.endswith("hint: check the path\n")


def breaking(monkeypatch, at: int, problem: BaseException):
    """Make the `at`-th token fail: with `-n 1`, the first token of the `at`-th question."""
    chosen = []

    def fails(*args):
        chosen.append(1)
        if len(chosen) == at:
            raise problem.with_traceback(None)
        return best_of(*args)

    monkeypatch.setattr("evoprune.language.answer.best_of", fails)


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


def test_rows_from_stdin_are_about_videos_beside_us(run, out, monkeypatch):
    monkeypatch.chdir("samples")
    rows = [{"video": "three.mp4", "question": question, "start": 1} for question in QUESTIONS]
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    assert run("--from", "-", "--end", "3", stdin=content).code == 0
    assert [(r["question"], r["sampling"]["start_s"], r["sampling"]["end_s"]) for r in records(out)] == [
        (question, 1, 3) for question in QUESTIONS
    ]


def no_weights(monkeypatch):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))


@pytest.mark.few(6)
@pytest.mark.parametrize(
    ("args", "says", "code"),
    [
        ((), "no videos", 2),
        ((*CLIPS, "What is here?"), "put -Q before each question", 2),
        ((*CLIPS, "-", *ASKED), "cannot read a video from stdin", 2),
        (("gone.mp4", *CLIPS, CLIPS[0], "-Q", ""), f"{CLIPS[0]!r} is given twice; '': question is empty; no such file: g", 2),
        ((*CLIPS, *ASKED, "-s", "caf\udce9"), "system prompt is not valid text", 2),
        ((*CLIPS, *ASKED, "--method", "evoprune:speed=1"), "speed", 2),
        ((*CLIPS, *ASKED, "--json"), "--json", 2),
        ((*CLIPS, *ASKED, "-o", "-", "--resume"), "not a file that can be", 2),
        ((*CLIPS, *ASKED, "-o", "/proc/out.jsonl"), "cannot write /proc/out.jsonl", 2),
        ((*CLIPS, *ASKED, "-o", CLIPS[1], "--overwrite"), "samples/three.mp4 is one of the inputs", 2),
        (("--overwrite", "-o", *CLIPS, *ASKED), "samples/square.mp4 already exists, and contains no records of a batch", 2),
        (("--from", "samples/questions.jsonl", "-o", "./samples/questions.jsonl", "--overwrite"), "is one of the inputs", 2),
        (("--from", "-"), "nothing is piped", 2),
        (("rtsp://example.org/a.mp4", *ASKED), "evoprune watch rtsp://example.org/a.mp4 -Q ", 3),
        ((*CLIPS, *ASKED, "-m", "samples"), "config.json", 4),
    ],
)  # fmt: skip
def test_refused_before_weights_are_read(run, monkeypatch, out, args, says, code):
    no_weights(monkeypatch)
    result = run(*args)
    assert result.code == code and says in result.err, result.err
    if "--json" not in args:
        assert result.out == "" and len(result.err.splitlines()) == 2 and "hint: " in result.err
    assert not out.exists()


@pytest.mark.parametrize("question", ["What is here?", "Why?", "count the squares"])
def test_a_question_among_the_videos(run, monkeypatch, out, question):
    no_weights(monkeypatch)
    result = run(*CLIPS, question, *ASKED)
    assert result.code == 3 and not out.exists()
    assert f"no such file: {question}\nhint: put -Q before each question: evoprune batch " in result.err


def test_all_missing_videos_are_named_at_once(run, tmp_path):
    names = [str(tmp_path / f"gone {number}.mp4") for number in range(12)]
    result = run(*names, *ASKED)
    assert result.code == 3 and f": {', '.join(names[:10])}, and 2 more\n" in result.err


def test_resume_asks_what_is_left(run, out, monkeypatch):
    assert run(CLIPS[0], *ASKED, "--resume").code == 0  # nothing there yet
    before = out.read_bytes()
    result = run(*CLIPS, *ASKED, "--resume")
    assert result.code == 0 and result.err.startswith("4 of 4 rows answered, 2 of them earlier: 0:")
    assert out.read_bytes().startswith(before) and len({r["id"] for r in records(out)}) == len(records(out)) == 4
    no_weights(monkeypatch)
    result = run(*CLIPS, *ASKED, "--resume")
    assert (result.code, result.err) == (0, "4 of 4 rows answered, 4 of them earlier\n")


@pytest.fixture
def model(tiny_folder, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"])
def test_resume_refuses_a_model_that_was_replaced(run, out, model, monkeypatch, name):
    assert run(CLIPS[0], *ASKED, "-m", model).code == 0
    before = out.read_bytes()
    (model / name).write_bytes((model / name).read_bytes())  # like another file of the same size
    no_weights(monkeypatch)
    result = run(*CLIPS, *ASKED, "-m", model, "--resume")
    assert result.code == 2 and out.read_bytes() == before
    said = f"the model {model} has changed since the output was started: modified_utc was"
    assert said in " ".join(result.err.split()) and len(result.err.splitlines()) == 2


@pytest.mark.parametrize(("begun", "now"), [(0, 2048), (2048, 0)])
def test_resume_refuses_a_device_that_prunes_small_inputs_otherwise(run, out, monkeypatch, begun, now):
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", begun)
    assert run(CLIPS[0], *ASKED).code == 0
    before = out.read_bytes()
    assert records(out)[0]["pruning"]["after_tower_below"] == (begun or None)
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", now)
    result = run(*CLIPS, *ASKED, "--resume")
    assert (
        result.code == 2
        and "error: the output was started on another device or version: the size limit for pruning only after"
        in result.err
    )
    assert "--device" in result.err and out.read_bytes() == before
    monkeypatch.setitem(limits.LAUNCH_BOUND_UNITS, "cpu", begun)
    assert run(*CLIPS, *ASKED, "--resume").code == 0 and len(records(out)) == 4


def test_resume_accepts_records_that_do_not_say_what_they_were_made_of(run, out, model):
    assert run(CLIPS[0], *ASKED, "-m", model).code == 0
    made = records(out)
    for record in made:
        assert record["batch"].pop("files")["model"]["files"] > 5
    out.write_text("".join(json.dumps(record) + "\n" for record in made))
    os.utime(model / "model.safetensors", (1, 1))
    assert run(*CLIPS, *ASKED, "-m", model, "--resume").code == 0 and len(records(out)) == 4


def test_resume_refuses_an_adapter_beside_the_model(run, out, model):
    assert run(CLIPS[0], *ASKED, "-m", model).code == 0
    (model / "adapter_config.json").write_text("{}")
    assert re.search(
        r"files was (\d+) and is now \d+;", " ".join(run(CLIPS[0], *ASKED, "-m", model, "--resume").err.split())
    )


@pytest.mark.few(3)
@pytest.mark.parametrize("kind", ["video", "picture", "folder", "added", "subtitles", "beside", "second"])
def test_resume_refuses_an_input_that_was_replaced(run, out, tmp_path, kind):
    """A row without an answer is asked again, whatever its input is now."""
    clip, folder, picture = tmp_path / "clip.mp4", tmp_path / "frames", tmp_path / "a.png"
    shutil.copy(CLIPS[0], clip)
    folder.mkdir()
    for place in (folder / "1.png", folder / "2.png", picture):
        write_image(place, numbered_frame(1))
    said = tmp_path / ("clip.en.srt" if kind == "beside" else "said.srt")
    said.write_text(SRT)
    asked, changed = {
        "video": ({"video": "clip.mp4"}, clip),
        "picture": ({"video": "a.png"}, picture),
        "folder": ({"video": "frames"}, folder / "2.png"),
        "added": ({"video": "frames"}, folder / "3.png"),
        "subtitles": ({"video": "clip.mp4", "subtitles": "said.srt"}, said),
        "beside": ({"video": "clip.mp4", "subtitles": "auto"}, said),
        "second": ({"inputs": ["a.png", "clip.mp4"]}, clip),
    }[kind]
    rows = tmp_path / "rows.jsonl"
    lines = [{"id": "a", "question": "What?"} | asked, {"id": "b", "video": "gone.mp4", "question": "What?"}]
    rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert run("--from", rows).code == 6
    shutil.copy(CLIPS[1], tmp_path / "gone.mp4")  # its row failed
    assert run("--from", rows, "--resume").code == 0 and [r["error"] for r in records(out)] == [None, None]
    before = out.read_bytes()
    write_image(changed, numbered_frame(3)) if kind == "added" else os.utime(changed, (1, 1))
    result = run("--from", rows, "--resume")
    assert result.code == 2 and out.read_bytes() == before
    assert "has changed since row 'a' was answered: " in " ".join(result.err.split())
    assert len(result.err.splitlines()) == 2 and "delete the row's line" in result.err
    out.write_bytes(before.split(b"\n", 1)[1])
    assert run("--from", rows, "--resume").code == 0 and {r["id"] for r in records(out)} == {"a", "b"}


def test_resume_keeps_the_records_of_other_rows(run, out, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    assert run(CLIPS[0], broken, "-Q", "What colour is the square?").code == 6
    before = out.read_bytes()
    result = run(CLIPS[0], broken, "-Q", "Is there a digit?", "--resume")
    assert result.code == 6 and "has 2 records that are not in this batch; kept" in result.err
    assert out.read_bytes().startswith(before) and len(records(out)) == 4


def test_a_video_that_is_missing(run, out, tmp_path):
    late = tmp_path / "late.mp4"
    result = run(CLIPS[0], late, *ASKED)
    assert result.code == 6
    assert "late.mp4 (its rows will fail)" in " ".join(result.err.split())
    assert "2 of 4 rows answered, 2 failed: " in result.err and "with --resume" in result.err
    assert result.err.count("late.mp4") == 1  # named once before
    good, bad = records(out)[:2], records(out)[2:]
    assert all(r["error"] is None for r in good)
    assert [(r["error"]["code"], r["finish_reason"], r["answer"]) for r in bad] == [(3, "error", None)] * 2
    assert [r["video"]["path"] for r in bad] == [str(late)] * 2 and len({r["id"] for r in records(out)}) == 4
    assert run(CLIPS[0], late, *ASKED, "--resume").code == 6 and len(records(out)) == 4
    late.write_bytes((ROOT / CLIPS[1]).read_bytes())
    result = run(CLIPS[0], late, *ASKED, "--resume")
    assert result.code == 0 and result.err.startswith("4 of 4 rows answered, 2 of them earlier")
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
        "best_of": "evoprune.language.answer.best_of",
        "load_weights": "evoprune.session.loading.model.load_weights",
    }
    monkeypatch.setattr(where[at], stops)
    result = run(*CLIPS, *ASKED)
    assert result.err == "interrupted before any record was written; to continue, repeat the same command\n"
    assert result.out == "" and not out.exists() and run(*CLIPS, *ASKED, "-q").err == ""


@pytest.mark.few(1)
@pytest.mark.parametrize("columns", [100, 50])
def test_progress_on_a_terminal(run, columns):
    result = run(*CLIPS, *ASKED, columns=columns)
    assert re.search(r"row 4/4, 0:\d\d", result.err)
    last = visible(result.err)
    assert last[0].startswith("4 of 4 rows answered: 0:") and max(map(len, last)) <= columns
    assert re.fullmatch(
        rf"4 of 4 .*; waited \d+\.\d s for video reading {re.escape(CUT)}", " ".join(" ".join(last).split())
    )
    assert visible(run(*CLIPS, *ASKED, "-q", "--overwrite", columns=columns).err) == []


def test_progress_where_nobody_watches(run, monkeypatch):
    monkeypatch.setattr(batch, "TELL_EVERY_S", 0.0)
    lines = run(*CLIPS, *ASKED).err.splitlines()
    assert [line.split(",")[0] for line in lines[:4]] == [f"{n} of 4 rows" for n in range(1, 5)]
    assert all(re.search(r" rows/(s|min), ~.* left$", line) for line in lines[:4])
    assert len(lines) == 6 and lines[5] == CUT


@pytest.mark.parametrize(
    ("made", "seconds", "says"), [(4, 2.0, "2 rows/s"), (2, 60.0, "2 rows/min"), (3, 7200.0, "1.5 rows/h")]
)
def test_pace(made, seconds, says):
    assert batch.pace(made, seconds) == says


def test_a_warning_is_told_once_even_where_it_is_quiet(cli, out, foreign):
    result = cli("batch", foreign, *ASKED, "-Q", "Is the man smiling?", "-m", "demo", "-q", "-o", out)
    assert result.code == 0 and result.err.count("warning: ") == 1
    assert [r["warnings"] for r in records(out)] == [["demo_model"]] * 3


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


def test_the_model_is_loaded_once(run, monkeypatch):
    loads, real = [], session.load_model
    monkeypatch.setattr(session, "load_model", lambda *a, **k: loads.append(1) or real(*a, **k))
    run(*CLIPS, *ASKED)
    assert loads == [1]


# In separate processes.
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("EVOPRUNE_")} | {"OMP_NUM_THREADS": "1"}


@pytest.fixture
def start(tiny_folder, tmp_path):
    """Start a batch of 20 or more rows about all samples: two spans per video, each with this many questions."""
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


@pytest.mark.parametrize(
    ("kills", "questions"), [pytest.param(2, 3, marks=pytest.mark.full), pytest.param(20, 20, marks=pytest.mark.slow)]
)
def test_killed_and_resumed(start, out, kills, questions):
    """Kill a batch repeatedly, mostly after a few more rows, let it finish, and compare it with an uninterrupted one."""
    whole = out.with_name("whole.jsonl")
    assert start(questions=questions, out=whole).wait(300) == 0
    draw, total = random.Random(0), 12 * questions
    for number in range(kills):
        process = start("--resume", questions=questions)
        if draw.random() < 0.2:
            time.sleep(draw.uniform(0, 4))  # during imports, loading, or scanning the file
        else:
            wait_for_lines(process, out, draw.randint(number * total // kills, (number + 1) * total // kills - 1))
            time.sleep(draw.uniform(0, 0.02))
        process.kill()
        process.communicate()
        if draw.random() < 0.5 and out.exists():  # as if it had been killed while writing
            content = out.read_bytes()
            out.write_bytes(content[: max(0, len(content) - draw.randint(1, 4000))])
    last = start("--resume", questions=questions)
    _, err = last.communicate(timeout=300)
    assert last.returncode == 0, err.decode()
    ours, theirs = ({r["id"]: (r["question"], r["answer"], r["pruning"]) for r in records(p)} for p in (out, whole))
    assert len(records(out)) == len(ours) == total and ours == theirs


# Subtitles.


@pytest.mark.full
def test_rows_have_subtitles_of_their_own(run, out, tmp_path):
    clip = shutil.copy(CLIPS[0], tmp_path / "clip.mp4")
    write_subtitled(tmp_path / "track.mkv", [ASS])
    (tmp_path / "said.srt").write_text(SRT)
    names = {"said.srt": clip, "none": clip, "auto": "track.mkv", "gone.srt": clip}
    rows = [{"video": str(video), "question": "Who?", "subtitles": name} for name, video in names.items()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--from", tmp_path / "rows.jsonl").code == 6
    found = {r["batch"]["row"]["subtitles"]: r["subtitles"] and r["subtitles"]["source"] for r in records(out)}
    assert found == {"said.srt": f"{tmp_path}/said.srt", "none": None, "auto": "track 1 (eng)", "gone.srt": None}
    (failed,) = [r["error"] for r in records(out) if r["error"]]
    assert failed["code"] == 3 and "gone.srt" in failed["message"]


def test_an_option_for_all_rows_is_one_of_the_settings(run, out, tmp_path):
    clip = shutil.copy(CLIPS[0], tmp_path / "clip.mp4")
    (tmp_path / "clip.srt").write_text(SRT)
    asked = (clip, CLIPS[0], "-Q", "Who?")
    assert run(*asked, "--subtitles", "auto").code == 0
    assert [bool(record["subtitles"]) for record in records(out)] == [True, False]
    assert "subtitles was 'auto' and is now None" in run(*asked, "--resume").err
    run(*asked, "--overwrite")  # like the output of versions without subtitles
    assert not any("subtitle" in name for r in records(out) for name in (*r["batch"]["row"], *r["batch"]["settings"]))


def texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def clips(tmp_path):
    """Two videos of the same name, in folders beside each other."""
    for folder, clip in zip(("a", "b.c"), CLIPS, strict=True):
        (tmp_path / "clips" / folder).mkdir(parents=True)
        shutil.copy(clip, tmp_path / "clips" / folder / "x.mp4")
    return sorted((tmp_path / "clips").glob("*/*.mp4"))


def test_captions_are_the_answers_in_the_folders_of_the_videos(run, out, clips, tmp_path):
    folder = tmp_path / "captions"
    asked = (*clips, "-Q", QUESTIONS[0], "--captions", folder)
    assert run(*asked).code == 0
    made = texts(folder)
    written = {Path(record["batch"]["files"]["caption"]): record["answer"].strip() + "\n" for record in records(out)}
    assert {str(path.relative_to(folder)): text for path, text in written.items()} == made and len(made) == 2
    assert set(made) == {"a/x.txt", "b.c/x.txt"}
    (folder / "a" / "x.txt").unlink()  # as if the batch had been killed before it was written
    (folder / "b.c" / "x.txt").write_text("edited")
    assert run(*asked, "--resume").code == 0
    assert texts(folder) == made | {"b.c/x.txt": "edited"} and len(records(out)) == 2
    assert run(*asked, "--overwrite").code == 0
    assert texts(folder) == made


def test_captions_of_rows_that_were_answered_without_them(run, clips, tmp_path):
    assert run(*clips, "-Q", QUESTIONS[0]).code == 0
    assert run(*clips, "-Q", QUESTIONS[0], "--captions", tmp_path / "captions", "--resume").code == 0
    assert set(texts(tmp_path / "captions")) == {"a/x.txt", "b.c/x.txt"}


@pytest.mark.parametrize("how", [[], ["--resume"], ["--overwrite"]])
def test_a_caption_never_replaces_a_file_of_the_user(run, out, clips, monkeypatch, how):
    mine = clips[0].with_suffix(".txt")
    mine.write_text("mine")
    no_weights(monkeypatch)
    result = run(clips[0], "-Q", QUESTIONS[0], "--captions", clips[0].parent, *how)
    assert result.code == 2 and "x.txt exists, and no record of the output names it as a caption" in result.err
    assert mine.read_text() == "mine" and not out.exists()


def test_a_row_that_fails_has_no_caption(run, clips, tmp_path):
    clips[0].write_bytes(b"no video")
    assert run(*clips, "-Q", QUESTIONS[0], "--captions", tmp_path / "captions").code == 6
    assert set(texts(tmp_path / "captions")) == {"b.c/x.txt"}


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([*CLIPS, *ASKED], "about samples/square.mp4 and samples/square.mp4, would have the caption square.txt"),
        ([CLIPS[0], "-Q", "A", "-o", "x.csv"], "--captions needs a folder, and records that name its files"),
        (["https://example.org/a.mp4", "-Q", "A"], "--captions takes a file per row, not https://example.org/a.mp4"),
        ([*CLIPS, "-Q", "A", "--captions", "README.md"], "cannot write"),
    ],
)
def test_captions_that_cannot_be(run, tmp_path, monkeypatch, args, says):
    no_weights(monkeypatch)
    result = run("--captions", tmp_path / "captions", *args)
    assert result.code == 2 and says in result.err


def table(path: Path) -> list[dict]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_a_table_has_the_rows_as_they_came_and_their_answers(run, tmp_path):
    """This also works if cells contain commas, quotes or line breaks, or if a column of the same name exists."""
    odd = 'Is it "red",\nor blue; which?'
    clip = str(ROOT / CLIPS[0])
    with open(tmp_path / "rows.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows(
            [["video", "question", "answer", "note"], [clip, odd, "red", ""], ["gone.mp4", "Why?", "", "grün"]]
        )
    result = run("--from", tmp_path / "rows.csv", "-o", tmp_path / "x.csv")
    found = table(tmp_path / "x.csv")
    assert result.code == 6 and [row["question"] for row in found] == [odd, "Why?"]
    assert list(found[0])[:4] == ["video", "question", "row_answer", "note"] and found[1]["note"] == "grün"
    assert (
        found[0]["row_answer"] == "red"
        and found[0]["answer"]
        and not found[0]["error"]
        and found[0]["new_tokens"] == "2"
    )
    assert "no such file" in found[1]["error"] and not found[1]["answer"] and found[1]["finish_reason"] == "error"
    assert "--resume" not in result.err
    assert "rows.csv: fields that are only copied to the output: note in 1 row\n" in result.err


def test_a_table_is_not_gone_on_with_and_replaces_only_a_table(run, tmp_path):
    asked = (CLIPS[0], "-Q", QUESTIONS[0])
    result = run(*asked, "-o", tmp_path / "x.csv", "--resume")
    assert result.code == 2 and "does not record the settings" in result.err and ".jsonl" in result.err
    assert run(*asked, "-o", tmp_path / "x.csv").code == 0 and run(*asked, "-o", tmp_path / "x.csv").code == 2
    assert run(*asked, "-o", tmp_path / "x.csv", "--overwrite").code == 0
    assert [(row["video"], row["question"]) for row in table(tmp_path / "x.csv")] == [(CLIPS[0], QUESTIONS[0])]
    (tmp_path / "mine.csv").write_text("a,b\n1,2\n")
    assert run(*asked, "-o", tmp_path / "mine.csv", "--overwrite").code == 2
    assert (tmp_path / "mine.csv").read_text() == "a,b\n1,2\n"


def test_folders_inside_folders(run, out, tmp_path):
    deep = tmp_path / "all" / "b" / "c"
    deep.mkdir(parents=True)
    (tmp_path / "all" / ".hidden").mkdir()
    for place in (deep, tmp_path / "all" / ".hidden"):
        shutil.copy(ROOT / CLIPS[0], place / "x.mp4")
    (deep / "again").symlink_to(tmp_path / "all")
    refused = run(tmp_path / "all", "-Q", QUESTIONS[0])
    assert refused.code == 2 and "-r also searches" in refused.err
    assert run(tmp_path / "all", "-r", "-Q", QUESTIONS[0]).code == 0
    assert [record["video"]["path"] for record in records(out)] == [str(deep / "x.mp4")]
    write_image(tmp_path / "all" / "a.png", numbered_frame(0))
    result = run(tmp_path / "all", "-Q", QUESTIONS[0], "--overwrite")
    assert result.code == 0 and "1 image as one video; subfolders are not searched (-r)\n" in result.err
    shutil.copy(ROOT / CLIPS[0], tmp_path / "all" / "x.mp4")
    shutil.copy(ROOT / CLIPS[0], tmp_path / "all" / "y.mp4")
    for words, found in (((), 3), (("--start", "1"), 2)):  # an image has no time span
        result = run(tmp_path / "all", "-Q", QUESTIONS[0], "--overwrite", *words)
        assert result.code == 0 and len(records(out)) == found
        assert ("2 videos and 1 image; skipped: b/" in result.err) == (found == 3)
    (tmp_path / "none").mkdir()
    assert run(tmp_path / "none", "-r", "-Q", QUESTIONS[0], "--overwrite").code == 2
