"""`evoprune ask` from end to end: the answer on stdout, everything else on stderr."""

import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evoprune
from evoprune.backend.limits import MAX_VISUAL_TOKENS_CPU
from evoprune.bundled import DEMOS
from evoprune.errors import VideoError
from evoprune.language import LanguageModel, PrefixCache
from evoprune.report import Report
from evoprune.session import EncodedInputs, ModelOptions, ReadAhead, encoding
from evoprune.video import frames
from evoprune_cli.terminal import stdout
from evoprune_cli.words import split_words
from tests.cli.apart import records_of
from tests.cli.screen import visible
from tests.loading import edit
from tests.video.files import numbered_frames, write_said, write_video
from tests.video.subtitled import SRT, pictures

CLIP, QUESTION, ANSWER = "samples/square.mp4", "What colour is the square?", "green"
SCENE = "samples/scenes/crossing.mp4"
ROOT = Path(__file__).parents[2]


def test_a_wrong_value_from_the_environment_is_traced_to_it(cli, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_BUDGET", "lots")
    assert "; the value comes from EVOPRUNE_BUDGET\n" in cli("ask", CLIP, QUESTION).err
    assert "EVOPRUNE_BUDGET" not in cli("ask", CLIP, QUESTION, "-b", "lots").err
    record = cli("ask", CLIP, QUESTION, "--json").record
    assert record["error"]["hint"].endswith("EVOPRUNE_BUDGET")
    monkeypatch.setenv("EVOPRUNE_THREADS", "lots")
    assert "; the value comes from EVOPRUNE_THREADS\n" in cli("ask", CLIP, QUESTION).err


@pytest.mark.few(2)
@pytest.mark.parametrize(
    "command, last",
    [
        (f"ask {CLIP} What?", [True]),
        (f"ask {CLIP} -Q What? -Q Who?", [False, False]),
        (f"ask {CLIP} What? --compare", [False] * 4),
        (f"batch {CLIP} samples/pan.mp4 -Q What? -Q Who? -m demo -o /dev/null", [False, True] * 2),
        ("eval --data samples/questions.jsonl --limit 1 -b 0.5", [False, True] * 2),
    ],
)
def test_a_model_is_told_that_no_question_follows(cli, monkeypatch, command, last):
    read, told = PrefixCache.read, []

    def reads(self, pruned, prompt, last, *more):
        told.append(last)
        return read(self, pruned, prompt, last, *more)

    monkeypatch.setattr(PrefixCache, "read", reads)
    assert cli(*command.split(), "-q").code == 0 and told == last


@pytest.mark.full
def test_a_limit_on_the_size_of_files_is_named(cli):
    assert cli("ask", CLIP, QUESTION, "-q").code == 0  # or the limit would truncate Python's compiled files
    command = [sys.executable, "-m", "evoprune_cli", "ask", str(ROOT / CLIP), QUESTION]
    limited = f"ulimit -f 2; exec {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 3 and "file size limit" in done.stderr and "ulimit" in done.stderr


def test_counts_and_times_of_a_record_fit_together(cli):
    result = cli("ask", CLIP, QUESTION, "--json", "-b", "0.25", "--method", "evoprune-paper")
    record, pruning = result.record, result.record["pruning"]
    assert sum(pruning["kept_per_pair"]) == 36 == pruning["visual_tokens_kept"] == record["tokens"]["visual"]
    rows = [row for _, row in pruning["layers"]]
    assert rows == sorted(rows, reverse=True) and rows[0] == 144 and rows[-1] == 36
    assert pruning["encoder_live_share"] == pytest.approx(sum(rows) / len(rows) / 144, abs=1e-6)
    assert record["tokens"]["prompt"] == record["tokens"]["text"] + 36
    times = record["time_ms"]
    assert times.pop("prefill_prune") is None  # nothing leaves inside the language model
    seldom = ("pack", "compile", "store", "overlap", "speech")
    assert all(times[name] > 0 for name in times if name not in seldom) and min(map(times.get, seldom)) >= 0
    assert times["ttft_model"] == pytest.approx(times["encode"] + times["prefill"], abs=1e-3)
    assert times["ttft_model"] < times["ttft_wall"] < times["total"] + 1
    assert Report.from_json(result.out).to_json() == result.out.strip()


def test_several_questions_share_one_encoding(cli):
    asked = [QUESTION, "What digit is it?", "Which way does the square move?"]
    alone = [cli("ask", CLIP, question, "-q").out for question in asked]
    together = cli("ask", CLIP, asked[0], "-Q", asked[1], "-Q", asked[2])
    assert together.out == "".join(alone)
    assert together.err.count("\nencode") == together.err.count("\nprefill") == 1
    assert together.err.count("; first token ") == 2 and QUESTION not in together.err
    lines = cli("ask", CLIP, *(part for question in asked for part in ("-Q", question)), "--json").out.splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["question"] for r in records] == asked and [r["answer"] + "\n" for r in records] == alone
    assert records[0]["time_ms"]["encode"] > 0 and records[1]["time_ms"]["encode"] == 0
    assert len({r["id"] for r in records}) == 3


@pytest.mark.full
def test_each_of_several_questions_stands_above_its_answer_on_a_terminal(cli):
    asked = ("ask", CLIP, QUESTION, "-Q", "Which\nway?")
    result = cli(*asked, columns=80)
    seen = visible(result.err)
    assert seen[0] == f"> {QUESTION}" and seen.count("> Which way?") == 1
    assert sum(line.startswith("prefill") for line in seen) == sum("; first token " in line for line in seen) == 1
    for flags in ("-q", "--json"):
        assert "> W" not in cli(*asked, flags, columns=80).err


CUT = "warning: the answer may be incomplete: it reached the token limit, -n (max_new_tokens)\n"


@pytest.mark.full
def test_an_answer_that_is_cut_says_so_in_one_line(cli):
    asked = ("ask", CLIP, "Describe the video.", "-Q", QUESTION)
    result = cli(*asked, "-n", "2", "--json")
    first, second = map(json.loads, result.out.splitlines())
    assert first["finish_reason"] == "length" and first["tokens"]["new"] == 2 and first["warnings"] == ["answer_cut"]
    assert second["finish_reason"] == "stop" and second["warnings"] == [] and "incomplete" not in result.err
    for flags in ([], ["-q"]):
        assert cli(*asked, "-n", "2", *flags).err.count(CUT) == 1
    assert "incomplete" not in cli(*asked).err
    assert cli("ask", CLIP, "Describe the video.", "--compare", "-n", "2", "-q").err == CUT


def test_generation_options_reach_the_model_and_what_it_asks_for_otherwise_is_said(cli, tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder, tmp_path / "model")
    edit(folder / "generation_config.json", temperature=0.7, top_k=20, repetition_penalty=1.05)
    asked = ("ask", CLIP, QUESTION, "-m", folder, "-n", "1", "--frames", "2", "--json")
    result = cli(*asked)
    said = "note: the model's generation_config.json has other sampling settings; to use them: --temperature 0.7 --top-k 20"
    assert said in " ".join(result.err.split())
    assert result.record["generation"] == {
        "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.05, "seed": 0, "think": "off",
        "stop": None, "logprobs": None, "schema": None, "regex": None, "choices": None,
    }  # fmt: skip
    assert "drawn" not in cli(*asked, "-q").err
    result = cli(*asked, "-t", "0.7", "--top-k", "20", "--repetition-penalty", "1.3")
    assert "drawn" not in result.err and result.record["generation"]["repetition_penalty"] == 1.3
    assert "drawn" not in cli(*asked[:4], tiny_folder, *asked[5:]).err  # its temperature is close to 0


def test_the_demo_warns_of_what_it_was_not_trained_on(cli, tmp_path):
    (tmp_path / "said.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    for more in ((CLIP, QUESTION), (QUESTION, "--subtitles", tmp_path / "said.srt")):
        assert cli("ask", CLIP, *more, "--json").record["warnings"] == ["demo_inputs"]


@pytest.fixture
def scenes_of_tiny(tiny_folder, monkeypatch):
    """Replace the model for scenes by other weights; warnings do not depend on weights."""
    monkeypatch.setitem(DEMOS, "demo-scenes", replace(DEMOS["demo-scenes"], folder=tiny_folder))


@pytest.mark.full
@pytest.mark.parametrize(
    ("inputs", "asked", "warnings"),
    [
        ([SCENE], "What does the camera do?", []),
        ([SCENE, SCENE], "In the second video: Where is the sign that says EXIT?", []),
        (["still.jpg"], "Which of these is missing?\nA. red star\nB. sign 482", []),
        ([SCENE], "Is the man smiling?", ["demo_question"]),
        ([CLIP], QUESTION, ["demo_model"]),
        ([SCENE, CLIP], QUESTION, ["demo_model"]),
        ([SCENE, SCENE, SCENE], QUESTION, ["demo_inputs"]),
        ([SCENE, "--subtitles", "said.srt"], QUESTION, ["demo_inputs"]),
    ],
)
def test_the_model_for_scenes_warns_of_what_it_does_not_know(cli, tmp_path, scenes_of_tiny, inputs, asked, warnings):
    (tmp_path / "said.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    Image.new("RGB", (112, 112)).save(tmp_path / "still.jpg", comment=DEMOS["demo-scenes"].tag)
    inputs = [tmp_path / name if name in ("still.jpg", "said.srt") else name for name in inputs]
    record = cli("ask", *inputs, asked, "-m", "demo-scenes", "--frames", "4", "-n", "1", "--json").record
    found = [name for name in record["warnings"] if name not in ("answer_cut", "equal_scores")]
    assert (record["model"]["id"], record["model"]["dtype"], found) == ("demo-scenes", "fp32", warnings)


def test_a_question_without_a_video(cli):
    result = cli("ask", "What is in it?", terminal=True)
    assert result.code == 3 and "no such file: What is in it?" in result.err and "the video comes first" in result.err


@pytest.mark.few(1)
@pytest.mark.parametrize("flags", [(), ("-q",), ("--json",)])
def test_the_warning_that_an_answer_means_nothing_comes_before_it(cli, foreign, monkeypatch, flags):
    monkeypatch.setattr("evoprune_cli.ask.print_warning", lambda name, video: print(f"warning {name}", file=stdout()))
    assert cli("ask", foreign, QUESTION, *flags).out.startswith("warning demo_model\n")


# Images, and several inputs.


OTHER, DIFFERS = "samples/arrivals.webm", "What differs?"
QUICK = ("-n", "2")


@pytest.mark.parametrize(
    ("words", "inputs", "question"),
    [
        ((CLIP,), (CLIP,), None),
        ((CLIP, DIFFERS), (CLIP,), DIFFERS),
        ((CLIP, OTHER), (CLIP, OTHER), None),
        ((CLIP, OTHER, DIFFERS), (CLIP, OTHER), DIFFERS),
        ((CLIP, "-"), (CLIP, "-"), None),
        ((CLIP, "and/or"), (CLIP,), "and/or"),
        ((CLIP, "what is in photo.jpg"), (CLIP,), "what is in photo.jpg"),
        ((CLIP, "b.mpv"), (CLIP, "b.mpv"), None),
        ((CLIP, ""), (CLIP,), ""),
        ((CLIP, "\0"), (CLIP,), "\0"),
    ],
)
def test_the_last_word_is_the_question_unless_it_is_a_path(words, inputs, question):
    assert split_words(words) == (inputs, question)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        ((CLIP, "b.mpv"), 3, "no such file: b.mpv\nhint: check the path; to ask it as a question: -Q b.mpv"),
        ((CLIP, "gone.mp4", DIFFERS), 3, "no such file: gone.mp4\nhint: check the path\n"),
        ((CLIP, "gone.mp4", "-Q", DIFFERS), 3, "no such file: gone.mp4"),
        ((CLIP, "docs"), 2, "no question\nhint: docs is a file; to ask it as a question: -Q docs\n"),
        ((CLIP,), 2, f'no question\nhint: evoprune ask {CLIP} "What happens?", or -i for a prompt\n'),
        ((CLIP, OTHER), 2, f'no question\nhint: evoprune ask {CLIP} {OTHER} "What differs?", or -i for a prompt\n'),
        (
            (CLIP, "what", "is", "it"),
            2,
            f'unexpected extra words: what is it\nhint: quote the question: evoprune ask {CLIP} "what is it"; ',
        ),
        (
            (CLIP, "one thing", "it's another", "a third?"),
            2,
            "ask takes one question, not 3: 'one thing' 'it'\"'\"'s another' 'a third?'\n"
            f'hint: put -Q before each: evoprune ask {CLIP} -Q "one thing" -Q "it\'s another" -Q "a third?"; -i opens ',
        ),
        ((CLIP, "What?", "Who?"), 2, "ask takes one question, not 2: 'What?' 'Who?'"),
        ((CLIP, "one thing", "here"), 2, "unexpected extra words: one thing here\nhint: quote the question: "),
        ((CLIP, "what differs", OTHER), 2, f'\nhint: put it last: evoprune ask {CLIP} {OTHER} "what differs"\n'),
        ((CLIP, "what", "differs", OTHER), 2, f'put it last: evoprune ask {CLIP} {OTHER} "what differs"\n'),
        ((CLIP, "a.mp4", "b.mp4", DIFFERS), 3, "no such file: a.mp4, b.mp4\nhint: check the path\n"),
        (("gone.mp4",), 3, "no such file: gone.mp4\nhint: check the path\n"),
        (("gone",), 3, "no such file: gone\nhint: check the path\n"),
        (("rtsp://cam/1",), 3, "rtsp://cam/1 is a URL, not a file\nhint: live video: evoprune watch"),
        (("-", "-", DIFFERS), 2, "standard input is given twice"),
        ((CLIP, OTHER, DIFFERS, "--subtitles", "a.srt"), 2, "a.srt has the subtitles of one video"),
    ],
)
def test_what_is_no_input_is_named(cli, words, code, says):
    result = cli("ask", *words, stdin="", terminal=True)
    assert (result.code, result.out) == (code, "") and says in result.err


@pytest.mark.parametrize(
    ("line", "right"),
    [
        (("ask", "What?", CLIP), f'evoprune ask {CLIP} "What?"'),
        (("ask", "What?", "gone.mp4"), 'evoprune ask gone.mp4 "What?"'),
        (("ask", "What", "is it?", CLIP, OTHER), f'evoprune ask {CLIP} {OTHER} "What is it?"'),
        (("ask", "Is it $5?", "a clip.mp4", CLIP), None),
        (("find", "a red circle", CLIP), f'evoprune find {CLIP} "a red circle"'),
    ],
)
def test_a_question_before_its_video_is_called_swapped(cli, line, right):
    result = cli(*line)
    assert (result.code, result.out) == (3, "")
    if right:
        assert "the question and the input are swapped" in result.err and result.err.endswith(f": {right}\n")


def test_a_folder_of_videos_has_the_command_for_all_of_them(cli, tmp_path):
    folder = tmp_path / "my clips"
    folder.mkdir()
    for name in ("b.mp4", "a.mp4"):
        (folder / name).touch()
    result = cli("ask", str(folder), "What is it?", "-m", "demo-scenes")
    assert result.code == 3 and f"no images in the folder {folder}, but 2 videos" in result.err
    one, every = re.findall(r"(evoprune .*?)(?:;|$)", result.err.splitlines()[1])
    assert shlex.split(one) == ["evoprune", "ask", str(folder / "a.mp4"), "What is it?"]
    assert shlex.split(every) == [
        "evoprune",
        "batch",
        str(folder),
        "-Q",
        "What is it?",
        "-m",
        "demo-scenes",
        "-o",
        "answers.jsonl",
    ]
    other = cli("inspect", str(folder))
    assert "but 2 videos" in other.err and str(folder / "a.mp4") in other.err


def test_downloads_of_small_files_are_part_of_loading(cli, monkeypatch):
    describe, local_folder = evoprune.session.describe, ModelOptions.local_folder
    slow_s = 0.5

    def slowly(options):
        time.sleep(slow_s)
        with monkeypatch.context() as patch:
            patch.setattr(ModelOptions, "local_folder", local_folder)
            return describe(options)

    cli("ask", CLIP, QUESTION, "--frames", "4")  # the first model takes longer to load
    monkeypatch.setattr(evoprune.session, "describe", slowly)
    usual = cli("ask", CLIP, QUESTION, "--frames", "4", "--json").record["time_ms"]
    monkeypatch.setattr(ModelOptions, "local_folder", lambda options: None)  # as for a model from the hub
    remote = cli("ask", CLIP, QUESTION, "--frames", "4", "--json").record["time_ms"]
    assert usual["load"] + 500 * slow_s < remote["load"] >= 1000 * slow_s
    assert remote["startup"] > 0


def test_stats_follow_columns_even_in_a_pipe(cli, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    lines = cli("ask", CLIP, QUESTION, "--frames", "4").err.splitlines()
    assert any(line.startswith("prefill") for line in lines) and max(map(len, lines)) <= 40


DATA = "data:video/mp4;base64," + "A" * 9000
LONG = "a" * 300 + ".mp4"


@pytest.mark.few(8)
@pytest.mark.parametrize(
    ("given", "hint"),
    [(DATA, "write it to a file and give its path"), (LONG, ""), ("file:///clips/a.mp4", "leave out file://")],
    ids=["data", "long", "file"],
)
@pytest.mark.parametrize(
    "command",
    [
        "ask {} What? --json", "ask samples/square.mp4 {} What?", "ask samples/square.mp4 What? --subtitles {}", "inspect {}",
        "profile {}", "tune {} -m demo", "batch {} -Q What? -m demo -o -", "watch {} -m demo -Q What? --every 1s",
    ],
)  # fmt: skip
def test_what_is_no_path_is_refused_in_a_line(cli, command, given, hint):
    result = cli(*(word.format(given) for word in command.split()))
    hint = "" if command.startswith("batch") and given.startswith("file:") else hint  # a batch accepts it
    assert result.code in (2, 3) and len(result.err.splitlines()) == 2 and f"hint: {hint}" in result.err
    assert len(result.err) < 600 and not re.search(r"\w{201}", result.err + result.out)
    if given == DATA:
        assert "A" * 40 not in result.err + result.out and ",  0" not in result.err
    if result.out:
        assert max(map(len, (result.record["error"]["message"], result.record["inputs"][0]["path"]))) <= 250


def test_a_failure_names_all_inputs(cli, photo):
    record = cli("ask", CLIP, photo, DIFFERS, "--json", "-b", "3").record
    assert record["error"]["code"] == 2 and [each["path"] for each in record["inputs"]] == [CLIP, photo]


@pytest.mark.full
def test_what_is_about_videos_is_said_to_be(cli, photo):
    assert "note: --fps, --frames" in cli("ask", photo, DIFFERS, "--fps", "3", *QUICK).err
    assert "note: --fps, --frames" not in cli("ask", photo, CLIP, DIFFERS, "--fps", "3", *QUICK).err


@pytest.mark.full
def test_each_video_has_its_own_subtitles(cli, tmp_path):
    paths = []
    for name in ("one", "two"):
        shutil.copy(CLIP, tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\nThis is {name}\n")
        paths.append(str(tmp_path / f"{name}.mp4"))
    record = cli("ask", *paths, DIFFERS, "--subtitles", "auto", "--json", *QUICK).record
    assert [each["subtitles"]["lines"] for each in record["inputs"]] == [1, 1] and record["subtitles"] is None
    without = cli("ask", *paths, DIFFERS, "--json", *QUICK).record
    said = sum(each["subtitles"]["tokens"] for each in record["inputs"])
    assert record["tokens"]["text"] > without["tokens"]["text"] + said  # and a line that names the video


def test_frames_of_a_folder_have_a_rate(cli, tmp_path):
    frames, rows = tmp_path / "frames", tmp_path / "rows.jsonl"
    frames.mkdir()
    for i in range(20):
        Image.new("RGB", (56, 56), (12 * i, 0, 0)).save(frames / f"{i}.png")
    assert cli("inspect", frames, "--json").record["video"]["duration_s"] == 10.0
    found = cli("inspect", frames, "--frame-rate", 10, "--scan", "--json").record
    assert found["video"]["duration_s"] == found["scan"]["duration_s"] == 2.0
    assert len(found["plan"]["timestamps_s"]) == 4
    record = cli("ask", frames, "What digit is it?", "-m", "demo", "--frame-rate", 8, "-n", 1, "--json").record
    assert record["video"]["duration_s"] == 2.5
    own = {"video": "frames", "question": "What digit is it?", "frame_rate": 4}
    rows.write_text(json.dumps(own) + "\n" + json.dumps({"video": "frames", "question": "Why?"}))
    asked = "batch", "--from", rows, "-m", "demo", "-o", "-", "--frame-rate", 5, "-n", 1
    assert [json.loads(line)["video"]["duration_s"] for line in cli(*asked).out.splitlines()] == [5.0, 4.0]
    for wrong in (0, "4 fps", True):
        rows.write_text(json.dumps(own | {"frame_rate": wrong}))
        refused = cli(*asked)
        assert refused.code == 2 and "frame_rate" in refused.err


def test_what_is_not_seen_as_in_a_player_is_said(cli, tmp_path):
    write_said(tmp_path / "cameras.mp4")
    found = cli("ask", tmp_path / "cameras.mp4", "What digit is it?", "-m", "demo", "-n", 1, "--frames", 2)
    assert "cameras.mp4 has several video tracks" in " ".join(found.err.split())
    assert "other tracks        2" in cli("inspect", tmp_path / "cameras.mp4").out
    assert "other tracks" not in cli("inspect", "samples/square.mp4").out


# --compare: every question with and without pruning, even if one of them fails.


MORE = "Which way does the square move?"
COMPARE = ("ask", CLIP, QUESTION, "--compare")


@pytest.mark.full
@pytest.mark.parametrize("method", ["downscale", "subsample"])
def test_nothing_is_taken_away_on_the_full_side_by_methods_that_shrink_the_input(cli, method):
    full = cli(*COMPARE, "-b", "0.25", "--method", method, "--json").record["compare"]
    assert full["sampling"]["grid_thw"] == [6, 8, 12] and full["pruning"]["visual_tokens_kept"] == 144


@pytest.mark.full
@pytest.mark.parametrize("when", ["encode", "prefill"])
@pytest.mark.parametrize("problem", [MemoryError(), KeyboardInterrupt()])
def test_the_pruned_answer_stays_when_the_full_one_breaks_off(cli, monkeypatch, problem, when):
    def broken(*args, **settings):
        calls.append(1)
        if len(calls) == 2 or (len(calls) > 2 and when == "encode"):  # if memory is short, smaller pieces are tried
            raise problem.with_traceback(None)
        return real(*args, **settings)

    module, name = {"encode": (encoding, "encode_rows"), "prefill": (LanguageModel, "prefill")}[when]
    real, interrupted = getattr(module, name), isinstance(problem, KeyboardInterrupt)
    reason, code = ("interrupt", 130) if interrupted else ("error", 5)
    for flags in (("-q",), ("--json",)):
        calls = []
        monkeypatch.setattr(module, name, broken)
        result = cli(*COMPARE, "-Q", MORE, *flags)
        monkeypatch.setattr(module, name, real)
        assert result.code == code
        if flags == ("-q",):
            assert result.out == "pruned: green\n"
            continue
        first, second = map(json.loads, result.out.splitlines())
        assert (first["answer"], first["finish_reason"], first["error"]) == ("green", "stop", None)
        assert first["compare"]["finish_reason"] == second["finish_reason"] == reason
        assert second["question"] == MORE and second["error"]["code"] == code
        if not interrupted:
            assert first["compare"]["error"]["stage"] == when


def test_an_interruption_of_the_second_question_is_not_taken_for_the_first(cli, monkeypatch):
    """The same question twice: the second one ends before it has begun."""

    def broken(self, question, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(self, question, **settings)

    calls, real = [], EncodedInputs.ask
    monkeypatch.setattr(EncodedInputs, "ask", broken)
    result = cli("ask", CLIP, QUESTION, "-Q", QUESTION, "--json")
    first, second = map(json.loads, result.out.splitlines())
    assert result.code == 130 and first["answer"] == "green" and second["answer"] is None
    assert first["id"] != second["id"] and second["error"]["type"] == "interrupted"


# The notes before the first frame is read: the expected time, and the limits that apply.


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """150 s of 224x224, two frames per second."""
    pictures = np.random.default_rng(0).integers(0, 255, (4, 224, 224, 3), np.uint8)
    frames = (pictures[i % 4] for i in range(300))
    return write_video(tmp_path_factory.mktemp("long") / "long.mp4", frames, fps=2, options={"preset": "ultrafast"})


@pytest.fixture
def notes(cli, tiny_folder, monkeypatch):
    """A function that returns the lines that `ask` prints on stderr before it reads the first frame, as in `notes(clip, flags...)`.

    The command is stopped at that point. Its default model is not the demo model.
    """

    def call(clip, *flags: str, model=tiny_folder) -> list[str]:
        def announced(*what):
            print("READING", file=sys.stderr)
            raise VideoError("enough", "for this test")

        with monkeypatch.context() as patch:
            patch.setattr(frames, "stream_frames", announced)
            patch.setattr(ReadAhead, "_begin", lambda *_: iter(()))  # otherwise reading ahead comes first
            result = cli("ask", clip, QUESTION, "-m", model, "-n", "1", *flags)
        assert result.code == 3, result.err
        before, after = result.err.split("READING\n")
        assert not any(word in after for word in ("reading", "limited to"))
        assert all(len(line) <= 80 for line in before.splitlines())
        return before.splitlines()

    return call


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("", ["limited to 32 of 300 frames at the model's rate, one every 4.69 s (--max-frames)"]),
        ("--fps 0.2", []),
        ("--fps 2", ["limited to 32 of 300 requested frames, one every 4.69 s (--max-frames)"]),
        ("--fps 1 --end 1:00", ["limited to 32 of 60 requested frames, one every 1.88 s (--max-frames)"]),
        ("--fps 2 --max-frames 16", []),  # the limit was set on purpose
        ("--frames 32", []),
        (
            "--max-frames 300",
            [f"limited to {MAX_VISUAL_TOKENS_CPU:,} tokens on a CPU (--max-visual-tokens): 300 frames of 140x140"],
        ),
        ("--max-frames 300 -q", []),
    ],
)  # fmt: skip
def test_the_limits_that_apply_are_noted(notes, long_clip, flags, says):
    assert notes(long_clip, "-b", "fast", *flags.split()) == says


# --subtitles: which ones are used, stderr and records, and refused files.


@pytest.fixture
def clip(tmp_path):
    return shutil.copy(CLIP, tmp_path / "clip.mp4")


def test_a_file_beside_the_video(cli, clip, tmp_path):
    (tmp_path / "clip.en.srt").write_text(SRT)
    result = cli("ask", clip, QUESTION, "--subtitles", "auto", "-v")
    assert f"subtitles: {tmp_path}/clip.en.srt, 2 lines\n" in result.err
    assert "\nsubtitles  " in result.err and "clip.en.srt: 2 of 2 lines, " in result.err
    (tmp_path / "clip.en.srt").unlink()
    assert "note: no subtitles: no file next to" in cli("ask", clip, QUESTION, "--subtitles", "auto").err


@pytest.mark.parametrize("content", [None, b"", pictures()])
def test_what_cannot_be_used_is_refused_before_weights_are_read(cli, clip, tmp_path, monkeypatch, content):
    monkeypatch.setattr("evoprune.video_qa.VideoQA.load", lambda *_, **__: pytest.fail("weights were read"))
    path = tmp_path / "said.srt"
    if content is not None:
        path.write_bytes(content)
    result = cli("ask", clip, QUESTION, "--subtitles", path)
    assert (result.code, result.out) == (3, "") and "said.srt" in result.err and "\nhint: " in result.err


# --interactive at a terminal: a prompt on stderr, answers on stdout, Ctrl-C and Ctrl-D.


TALK = ("ask", CLIP, "--interactive")


def test_questions_are_typed(cli):
    alone = [cli("ask", CLIP, question, "-q").out for question in (QUESTION, MORE)]
    result = cli(*TALK, "-q", stdin=f"{QUESTION}\n\n   \n{MORE}", terminal=True)
    assert (result.code, result.out) == (0, "".join(alone)) and result.err == "> " * 5 + "\n"
    assert cli(*TALK, "-q", stdin="", terminal=True).out == ""


def test_questions_of_the_command_line_come_first(cli):
    result = cli("ask", CLIP, QUESTION, "-Q", MORE, "--interactive", stdin=f"{QUESTION}\n", terminal=True)
    assert result.out.splitlines()[0] == result.out.splitlines()[2] == "green" and len(result.out.splitlines()) == 3
    assert result.err.count("; first token ") == 3 and result.err.count("> ") >= 2


@pytest.mark.few(1)
@pytest.mark.parametrize("end", ["exit", "quit", " QUIT ", "/exit", "q"])
def test_words_that_end_it(cli, end):
    result = cli(*TALK, stdin=f"{QUESTION}\n{end}\n{MORE}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n")


@pytest.mark.few(1)
@pytest.mark.parametrize("line", ["-b 0.1", "--compare", "  -n 5", "--"])
def test_a_line_that_looks_like_an_option_is_not_asked(cli, line):
    result = cli(*TALK, "-q", stdin=f"{line}\n- {QUESTION}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n")
    assert f"error: {line.split()[0]} looks like an option" in result.err and "hint: options go on" in result.err


def test_it_greets_and_has_help(cli):
    result = cli(*TALK, stdin="/help\n/foo\n/set-budget 0.1\n?\n", terminal=True)
    assert "Ask about square.mp4. /help for help" in result.err.partition("> ")[0] and result.out == ""
    assert result.err.count("q or Ctrl-D: quit") == 2 and "unknown command /foo" in result.err
    assert "unknown command /set-budget" in result.err


def test_a_prompt_remembers(cli, tiny_folder):
    flags = ("-m", tiny_folder, "--dtype", "fp32", "-n", "3", "--json")
    lines = f"{QUESTION}\n{MORE}\n/undo\n/undo\n/undo\n{MORE}\n/new\n{MORE}\n"
    result = cli(*TALK, *flags, stdin=lines, terminal=True)
    records = [json.loads(line) for line in result.out.splitlines()]
    assert [record["conversation"]["turns"] for record in records] == [0, 1, 0, 0]
    assert records[2]["answer"] == records[3]["answer"]
    assert f"removed: {MORE}" in result.err and "nothing to undo" in result.err
    assert "conversation cleared" in result.err and "Questions are independent" not in result.err
    single = cli(*TALK, *flags, "--history", "off", stdin=f"{QUESTION}\n{MORE}\n/new\n", terminal=True)
    assert [json.loads(line)["conversation"] for line in single.out.splitlines()] == [None, None]
    assert "nothing to clear: questions are independent" in single.err
    words = cli(*TALK, *flags, "--history", "on", stdin="/new video\n", terminal=True)
    assert not words.out and "/new must be alone on its line" in words.err


def test_why_a_prompt_does_not_remember(cli):
    assert "independent: the demo models know only single questions" in cli(*TALK, stdin="", terminal=True).err
    for reason in (("--compare",), ("--method", "cdpruner")):  # they exclude --history on
        assert "remembers" not in cli(*TALK, *reason, stdin="", terminal=True).err
    result = cli(*TALK, "--history", "on", stdin=f"{QUESTION}\n{MORE}\n", terminal=True)
    assert result.err.count("warning: the demo models were trained on single questions") == 1
    for more, says in (
        (("--history", "maybe"), "--history maybe"),
        (("--history", "on", "--compare"), "--compare applies only to single questions"),
        (("--history", "on", "--method", "cdpruner"), "prunes for a single question"),
    ):
        result = cli(*TALK, *more, stdin=f"{QUESTION}\n", terminal=True)
        assert (result.code, result.out) == (2, "") and says in result.err
    assert "--history applies only to questions at a prompt" in cli("ask", CLIP, QUESTION, "--history", "on").err


def test_warnings_come_once(cli, tiny_folder):
    flags = ("-m", tiny_folder, "--load-format", "dummy", "-n", "2", "-q")
    result = cli(*TALK, *flags, stdin=f"{QUESTION}\n{MORE}\n", terminal=True)
    assert result.err.count("warning: the weights") == 1 and result.out.count("\n") >= 2
    assert result.err.count("warning: the answer may be incomplete") == 2
    # A warning caused by a question, not by the inputs.
    asked = cli("ask", CLIP, "Does the dog bark?", "-Q", "Is the dog asleep?", "--compare", "-q").err
    assert asked.count("warning: a question contains words that the demo model") == 1


@pytest.mark.full
def test_a_question_that_cannot_be_asked_does_not_end_it(cli):
    result = cli(*TALK, "-q", stdin=f"caf\udce9\n{QUESTION}\n", terminal=True)
    assert (result.code, result.out) == (0, "green\n") and "error: the question or the system prompt" in result.err
    first, second = cli(*TALK, "--json", stdin=f"caf\udce9\n{QUESTION}\n", terminal=True).out.splitlines()
    assert json.loads(first)["error"]["code"] == 2 and json.loads(second)["answer"] == "green"


@pytest.mark.parametrize("args", [TALK, ("ask", CLIP, QUESTION, "--interactive"), ("ask", "-", "--interactive")])
def test_only_at_a_terminal(cli, args):
    result = cli(*args)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error.startswith("error: --interactive reads questions from a terminal") and "-Q" in hint


@pytest.mark.full
def test_ctrl_d_ends_it_and_answers_alone_reach_a_pipe(keyboard):
    screen, process = keyboard(*TALK, "-q")
    screen.wait_for("> ")
    screen.press(f"{QUESTION}\n".encode())
    assert process.stdout.readline() == b"green\n"
    screen.wait_for("> ", 2)
    screen.press(b"\x1b[A\n")  # arrow up: readline's history
    assert process.stdout.readline() == b"green\n"
    screen.wait_for("> ", 3)
    screen.press(b"\x04")
    assert process.wait(60) == 0 and process.stdout.read() == b""
    lines = visible(screen.finish())
    assert lines[0] == f"> {QUESTION}" and lines[-1].startswith(">")


def stop_an_answer(screen, process) -> None:
    """Ask at a prompt, and press Ctrl-C as soon as the answer begins."""
    while select.select([process.stdout], [], [], 0)[0]:  # the rest of the previous answer
        os.read(process.stdout.fileno(), 2**16)
    screen.press(b"What happens?\n")
    assert process.stdout.read(1)
    screen.press(b"\x03")


@pytest.mark.full
def test_ctrl_c_stops_an_answer_and_then_the_conversation(keyboard, endless):
    screen, process = keyboard(*TALK, "-m", endless, "-n", "30000", "-t", "1", "--seed", "5", "-q")
    for turn in (1, 2):
        screen.wait_for("> ", turn)
        stop_an_answer(screen, process)
    screen.wait_for("> ", 3)
    screen.press(b"half a question\x03")  # the first Ctrl-C only clears the line
    screen.wait_for("to quit: q or Ctrl-D")
    screen.wait_for("> ", 4)
    stop_an_answer(screen, process)
    screen.wait_for("> ", 5)
    screen.press(b"/undo\n")
    screen.wait_for("nothing to undo")  # the stopped answer is not remembered
    screen.wait_for("> ", 6)
    screen.press(b"\x03")
    screen.wait_for("> ", 7)
    screen.press(b"\x03")
    assert process.wait(60) == -signal.SIGINT
    assert process.stdout.read().endswith(b"\n") and "Traceback" not in screen.finish()


# Memory.


def peak(path: Path) -> int:
    command = [sys.executable, "-m", "evoprune_cli", "ask", str(path), "What happens?", "--frames", "24", "--json"]
    done = subprocess.run(command, capture_output=True, check=True, cwd=ROOT)
    record = json.loads(done.stdout)
    assert record["sampling"]["frames"] == 24
    return record["memory"]["peak_bytes"]


@pytest.mark.slow
def test_peak_is_flat_from_a_minute_to_two_hours(tmp_path):
    picture = np.random.default_rng(0).integers(0, 255, (90, 160, 3), np.uint8)

    def frames(seconds: int):
        for i in range(seconds * 10):
            yield np.roll(picture, i % 160, axis=1)

    peaks = {}
    for seconds in (60, 7200):
        path = tmp_path / f"{seconds}.mp4"
        write_video(path, frames(seconds), fps=10)
        peaks[seconds] = peak(path)
    assert peaks[7200] <= 1.1 * peaks[60], peaks


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--fps", "1", "--frames", "2"], "--fps and --frames cannot be combined"),
        (["--store-quantized"], "--store-quantized needs --quantize"),
        (["--choices", "a,b", "--stop", "c"], "--choices and --stop cannot be combined"),
        (["--logprobs", "99"], "--logprobs is 99, not from 0 to 20"),
    ],
)
def test_errors_name_options_as_they_are_typed(cli, words, said):
    refused = cli("ask", CLIP, "Why?", *words)
    assert refused.code == 2 and f"error: {said}\n" in refused.err


@pytest.mark.parametrize(
    ("question", "words", "noted"),
    [
        ("Who speaks?", (), True),
        ("Is there MUSIC?", ("--json",), True),
        ("What is the single colour?", (), False),
        ("What colour is the square?", ("-v",), True),
        ("What colour is the square?", ("-v", "-q"), False),
    ],
)
def test_a_note_says_that_sound_is_ignored(cli, tmp_path, question, words, noted):
    """The note appears if the question is about sound, or if everything is reported."""
    path = write_video(tmp_path / "sound.mp4", numbered_frames(10), audio_s=1.0)
    result = cli("ask", str(path), question, "-n", "1", *words)
    assert result.code == 0 and ("note: the sound of sound.mp4 is not read" in " ".join(result.err.split())) == noted
    if "--json" in words:
        assert "sound_ignored" in result.record["warnings"]


def test_of_a_silent_video_or_one_with_subtitles_no_note_is_about_sound(cli, tmp_path):
    path = write_video(tmp_path / "sound.mp4", numbered_frames(10), audio_s=1.0)
    (tmp_path / "said.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nHello\n")
    silent = write_video(tmp_path / "silent.mp4", numbered_frames(10))
    for words in ((str(path), "--subtitles", str(tmp_path / "said.srt")), (str(silent),)):
        assert "is not read" not in cli("ask", *words, "Who speaks?", "-n", "1").err
    found = " ".join(cli("find", str(path), "someone talking", "-q").err.split())
    assert "note: the sound of sound.mp4 is not read" in found


# Modules that a question to a demo model does not need: other models, decoders, inputs, options, and commands.
UNUSED = (
    "backend.cpu.quantize", "backend.hosted", "batch", "bench", "contrib", "hf", "language.choices", "language.guidance",
    "language.hosted", "language.hybrid", "language.schema", "language.static", "language.stops", "live", "methods.language",
    "methods.merger", "moments", "session.cache", "session.chat", "session.hub", "session.speech", "video.held", "vision.hooks",
)  # fmt: skip
MOST_MODULES = 104  # may only be lowered


def test_a_question_imports_only_what_it_needs():
    (record,) = records_of("tests.cli.imported", "ask", "samples/square.mp4", "What color is the square?", "-q")
    modules = record["modules"]
    assert not {f"evoprune.{name}" for name in UNUSED} & {*modules}
    assert "evoprune.language.answer" in modules and len(modules) <= MOST_MODULES
