"""Pictures, and several inputs, on the command line."""

import json
import os
import re
import shutil

import pytest
from PIL import Image

from evoprune_cli.ask import split_words
from tests.video.files import write_said

CLIP, OTHER, QUESTION = "samples/square.mp4", "samples/arrivals.webm", "What differs?"
QUICK = ("-n", "2")


@pytest.fixture
def photo(tmp_path):
    Image.effect_mandelbrot((150, 90), (-2, -1, 1, 1), 50).convert("RGB").save(tmp_path / "photo.jpg")
    return str(tmp_path / "photo.jpg")


@pytest.mark.full
def test_each_input_has_its_counts_and_times(cli, photo):
    result = cli("ask", CLIP, photo, OTHER, QUESTION, "--json", *QUICK)
    record = result.record
    assert [(each["path"], each["kind"]) for each in record["inputs"]] == [
        (CLIP, "video"),
        (photo, "picture"),
        (OTHER, "video"),
    ]
    for name in ("visual_tokens_in", "visual_tokens_kept", "encoder_rows"):
        assert record["pruning"][name] == sum(each["pruning"][name] for each in record["inputs"])
    for stage in ("read", "preprocess", "encode"):
        spent = sum(each["time_ms"][stage] for each in record["inputs"])
        assert record["time_ms"][stage] == pytest.approx(spent, abs=1e-3)
    assert record["question"] == QUESTION and record["video"]["path"] is None
    assert record["inputs"][1]["video"]["decoder"] == "pillow" and record["inputs"][1]["sampling"]["start_s"] is None


def test_the_stats_name_each_input(cli, photo):
    err = cli("ask", CLIP, photo, QUESTION, *QUICK).err
    assert "\nvideo      square.mp4" in err and "\npicture    photo.jpg  150x90  jpeg  (pillow)\n" in err
    assert "\ninput 1    144 visual tokens -> 36; read " in err and "\ninput 2    " in err
    alone = cli("ask", photo, QUESTION, *QUICK).err
    assert "a picture\n" in alone and "\ninput 1" not in alone and "frames" not in alone


def test_of_one_input_the_record_stays_as_it_was(cli):
    record = cli("ask", CLIP, QUESTION, "--json", *QUICK).record
    (only,) = record["inputs"]
    assert all(only[name] == record[name] for name in ("video", "sampling", "pruning", "cache", "subtitles"))


@pytest.mark.parametrize(
    ("words", "inputs", "question"),
    [
        ((CLIP,), (CLIP,), None),
        ((CLIP, QUESTION), (CLIP,), QUESTION),
        ((CLIP, OTHER), (CLIP, OTHER), None),
        ((CLIP, OTHER, QUESTION), (CLIP, OTHER), QUESTION),
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
        ((CLIP, "gone.mp4", QUESTION), 3, "no such file: gone.mp4\nhint: check the path\n"),
        ((CLIP, "gone.mp4", "-Q", QUESTION), 3, "no such file: gone.mp4"),
        ((CLIP, "docs"), 2, "no question\nhint: there is a file docs; to ask that as the question: -Q docs\n"),
        ((CLIP, "what", "is", "it"), 2, "unexpected extra words: what is it\nhint: quote the question"),
        (("-", "-", QUESTION), 2, "standard input is there twice"),
        ((CLIP, OTHER, QUESTION, "--subtitles", "a.srt"), 2, "a.srt holds the subtitles of one video"),
    ],
)
def test_what_is_no_input_is_named(cli, words, code, says):
    result = cli("ask", *words, stdin="", terminal=True)
    assert (result.code, result.out) == (code, "") and says in result.err


DATA = "data:video/mp4;base64," + "A" * 9000
LONG = "a" * 300 + ".mp4"


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (DATA, "write it to a file, and give the path of that"),
        (LONG, ""),
        (" ".join(["an name"] * 50) + ".mp4", ""),
        ("file:///clips/a.mp4", "leave out file://"),
    ],
    ids=["data", "long", "long with spaces", "file"],
)
@pytest.mark.parametrize(
    "command",
    [
        ("ask", "{}", "What?", "--json"), ("ask", "samples/square.mp4", "{}", "What?"), ("inspect", "{}"), ("profile", "{}"),
        ("ask", "samples/square.mp4", "What?", "--subtitles", "{}"), ("tune", "{}", "-m", "demo"),
        ("batch", "{}", "-Q", "What?", "-m", "demo", "-o", "-"), ("watch", "{}", "-m", "demo", "-Q", "What?", "--every", "1s"),
    ],
    ids=lambda command: " ".join(word[:9] for word in command),
)  # fmt: skip
def test_what_is_no_path_is_refused_in_a_line(cli, command, given, hint):
    result = cli(*(word.format(given) for word in command))
    hint = "" if command[0] == "batch" and given.startswith("file:") else hint  # a batch understands it
    assert result.code in (2, 3) and len(result.err.splitlines()) == 2 and f"hint: {hint}" in result.err
    assert len(result.err) < 600 and not re.search(r"\w{201}", result.err + result.out)
    if given == DATA:
        assert "A" * 40 not in result.err + result.out and ",  0" not in result.err
    if result.out:
        assert max(map(len, (result.record["error"]["message"], result.record["inputs"][0]["path"]))) <= 250


@pytest.mark.parametrize("options", [("--start", "1"), ("--end", "-1"), ("--subtitles", "a.srt")])
def test_a_picture_has_no_times_and_no_subtitles(cli, photo, options):
    result = cli("ask", photo, QUESTION, *options)
    assert result.code in (2, 3) and "is a picture, which has no" in result.err


@pytest.mark.full
def test_what_is_about_videos_is_said_to_be(cli, photo):
    assert "note: --fps, --frames" in cli("ask", photo, QUESTION, "--fps", "3", *QUICK).err
    assert "note: --fps, --frames" not in cli("ask", photo, CLIP, QUESTION, "--fps", "3", *QUICK).err
    assert "is a picture" in cli("ask", photo, QUESTION, "--subtitles", "auto", *QUICK).err


def test_a_failure_names_all_inputs(cli, photo):
    record = cli("ask", CLIP, photo, QUESTION, "--json", "-b", "3").record
    assert record["error"]["code"] == 2 and [each["path"] for each in record["inputs"]] == [CLIP, photo]


@pytest.mark.full
def test_several_inputs_are_compared(cli, photo):
    record = cli("ask", CLIP, photo, QUESTION, "--compare", "--json", *QUICK).record
    assert record["compare"]["pruning"]["kept_ratio"] == 1
    assert [each["pruning"]["kept_ratio"] for each in record["compare"]["inputs"]] == [1, 1]


@pytest.mark.full
def test_each_video_has_its_own_subtitles(cli, tmp_path):
    paths = []
    for name in ("one", "two"):
        shutil.copy(CLIP, tmp_path / f"{name}.mp4")
        (tmp_path / f"{name}.srt").write_text(f"1\n00:00:01,000 --> 00:00:02,000\nThis is {name}\n")
        paths.append(str(tmp_path / f"{name}.mp4"))
    record = cli("ask", *paths, QUESTION, "--subtitles", "auto", "--json", *QUICK).record
    assert [each["subtitles"]["lines"] for each in record["inputs"]] == [1, 1] and record["subtitles"] is None
    without = cli("ask", *paths, QUESTION, "--json", *QUICK).record
    said = sum(each["subtitles"]["tokens"] for each in record["inputs"])
    assert record["tokens"]["text"] > without["tokens"]["text"] + said  # and a line that says which video


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


def test_inspecting_a_picture(cli, photo, tmp_path):
    record = cli("inspect", photo, "--json").record
    assert record["video"]["container"] == "picture" and record["plan"]["timestamps_s"] is None
    assert cli("inspect", photo, "--overlay", tmp_path / "o.png").code == 0 and Image.open(tmp_path / "o.png").size[0]
    result = cli("inspect", photo, "--scan")
    assert result.code == 3 and "nothing to scan" in result.err


@pytest.mark.full
def test_a_conversation_about_several_inputs(cli, photo):
    once = cli("ask", CLIP, photo, QUESTION, "-q", *QUICK).out
    result = cli("ask", CLIP, photo, "--interactive", *QUICK, stdin=f"{QUESTION}\n{QUESTION}\n", terminal=True)
    assert (result.code, result.out) == (0, 2 * once)
    assert "Ask about square.mp4 and photo.jpg. /help" in result.err


@pytest.mark.slow
def test_profile_of_pictures(cli, photo, tiny_folder):
    quick = ("-m", tiny_folder, "-b", "0.25", "-r", "1", "-w", "0", "--format", "json")
    for words, height, width in ((("--pictures", "--size", "56x84"), 56, 84), ((photo, "--size", "84x56"), 84, 56)):
        rows = cli("profile", *words, *quick).record["rows"]
        assert [row["row"] for row in rows] == ["hugging_face", "full", "post_encoder_bound", "method"]
        assert {(row["frames"], row["height"], row["width"]) for row in rows} == {(1, height, width)}
        assert [row["counts"]["tokens"] for row in rows] == [6, 6, 2, 2] and not any(row["error"] for row in rows)
    for words in (("--pictures", CLIP), ("--pictures", "--frames", "8")):
        assert "--pictures excludes" in cli("profile", *words).err


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


@pytest.mark.parametrize("wrong", ["0", "-1", "nan", "inf"])
def test_a_rate_that_makes_no_sense(cli, wrong):
    assert cli("inspect", "samples/square.mp4", f"--frame-rate={wrong}").code == 2


def test_what_is_not_seen_as_in_a_player_is_said(cli, tmp_path):
    write_said(tmp_path / "cameras.mp4")
    found = cli("ask", tmp_path / "cameras.mp4", "What digit is it?", "-m", "demo", "-n", 1, "--frames", 2)
    assert "cameras.mp4 has more than one video track" in " ".join(found.err.split())
    assert "other tracks        2" in cli("inspect", tmp_path / "cameras.mp4").out
    assert "other tracks" not in cli("inspect", "samples/square.mp4").out
