"""`--subtitles` of `ask` and `batch`: what is taken, what stderr and the records say, and what is refused."""

import csv
import json
import shutil

import pytest

from tests.video.subtitled import ASS, SRT, pictures, srt, write_subtitled

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


@pytest.fixture
def clip(tmp_path):
    return shutil.copy(CLIP, tmp_path / "clip.mp4")


def test_a_file_beside_the_video(cli, clip, tmp_path):
    (tmp_path / "clip.en.srt").write_text(SRT)
    result = cli("ask", clip, QUESTION, "--subtitles", "auto", "-v")
    assert f"subtitles: {tmp_path}/clip.en.srt, 2 lines\n" in result.err
    assert "\nsubtitles  " in result.err and "clip.en.srt: 2 of 2 lines, " in result.err
    record = cli("ask", clip, QUESTION, "--subtitles", "auto", "--json", "-q").record
    assert record["subtitles"]["source"] == f"{tmp_path}/clip.en.srt" and record["subtitles"]["lines_in_prompt"] == 2
    assert cli("ask", clip, QUESTION, "--json").record["subtitles"] is None


@pytest.mark.full
def test_auto_without_any_is_no_error(cli, clip):
    result = cli("ask", clip, QUESTION, "--subtitles", "auto")
    assert result.code == 0 and "note: no subtitles: no file beside the video, and no text track in it\n" in result.err
    quiet = cli("ask", clip, QUESTION, "--subtitles", "auto", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, result.out, "")


@pytest.mark.full
def test_too_many_lines(cli, clip, tmp_path):
    (tmp_path / "many.srt").write_text(srt([(n / 100, n / 100 + 1, f"line {n}") for n in range(500)]))
    result = cli("ask", clip, QUESTION, "--subtitles", tmp_path / "many.srt", "--max-subtitle-tokens", "100", "--json")
    said = result.record["subtitles"]
    assert said["lines"] == 500 and 0 < said["lines_in_prompt"] < 50 and said["tokens"] <= 100
    assert f"{said['lines_in_prompt']} of 500 lines (--max-subtitle-tokens)\n" in result.err


def test_a_guessed_encoding_is_warned_of(cli, clip, tmp_path):
    (tmp_path / "clip.srt").write_bytes(SRT.encode("cp1252"))
    result = cli("ask", clip, QUESTION, "--subtitles", "auto", "--json", "-q")
    assert "subtitles_encoding" in result.record["warnings"] and "save it as UTF-8" in result.err


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "no such file"),
        (b"", "no subtitles"),
        (bytes(range(256)) * 20, "cannot read"),
        ("Привет, мир".encode("cp1251"), "UTF-8"),
        (pictures(), "pictures"),
        (b"x" * 50_000_000, "more than 10 MiB"),
    ],
)
def test_what_cannot_be_used_is_refused_before_weights_are_read(cli, clip, tmp_path, monkeypatch, content, says):
    monkeypatch.setattr("evoprune.video_qa.VideoQA.load", lambda *_, **__: pytest.fail("weights were read"))
    path = tmp_path / "said.srt"
    if content is not None:
        path.write_bytes(content)
    result = cli("ask", clip, QUESTION, "--subtitles", path)
    assert (result.code, result.out) == (3, "") and says in result.err and "\nhint: " in result.err


@pytest.mark.parametrize("option", [("--subtitles", ""), ("--max-subtitle-tokens", "0")])
def test_options_that_make_no_sense(cli, clip, option):
    assert cli("ask", clip, QUESTION, *option).code == 2


@pytest.mark.full
def test_they_must_fit_into_the_context(cli, clip, tmp_path):
    (tmp_path / "clip.srt").write_text(srt([(n / 1000, n / 1000 + 1, f"line {n}") for n in range(5000)]))
    result = cli("ask", clip, QUESTION, "--subtitles", "auto", "--max-subtitle-tokens", "5000")
    assert result.code == 2 and "--max-subtitle-tokens" in result.err


@pytest.mark.full
def test_compare_reads_them_twice_and_says_so_once(cli, clip, tmp_path):
    (tmp_path / "clip.srt").write_text(SRT)
    result = cli("ask", clip, QUESTION, "--subtitles", "auto", "--compare", "--json")
    assert result.record["subtitles"] == result.record["compare"]["subtitles"] and result.err.count("subtitles: ") == 1


@pytest.fixture
def batch(cli, tiny_folder, tmp_path):
    def call(*args):
        quick = ("-m", tiny_folder, "-n", "2", "--frames", "4", "-o", tmp_path / "out.jsonl")
        result = cli("batch", *map(str, (*quick, *args)))
        lines = (tmp_path / "out.jsonl").read_text().splitlines() if (tmp_path / "out.jsonl").exists() else []
        return result, [json.loads(line) for line in lines]

    return call


@pytest.mark.full
@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_rows_of_a_batch(batch, clip, tmp_path, form):
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
    result, made = batch("--from", path)
    found = {record["batch"]["row"].get("subtitles"): record["subtitles"] for record in made}
    assert result.code == 6 and len({record["id"] for record in made}) == 5
    assert {key: value and value["source"] for key, value in found.items()} == {
        "said.srt": f"{tmp_path}/said.srt", "none": None, None: None, "auto": "track 1 (eng)", "gone.srt": None,
    }  # fmt: skip
    (failed,) = [record["error"] for record in made if record["error"]]
    assert failed["code"] == 3 and "gone.srt" in failed["message"]
    (tmp_path / "gone.srt").write_text(SRT)
    result, made = batch("--from", path, "--resume")
    assert result.code == 0 and len(made) == 5 and not any(record["error"] for record in made)
    assert [record["tokens"]["text"] for record in made if record["subtitles"] is None] == [
        made[1]["tokens"]["text"]
    ] * 2


def test_an_option_for_all_rows_and_resume(batch, clip, tmp_path):
    (tmp_path / "clip.srt").write_text(SRT)
    result, made = batch(clip, CLIP, "-Q", "Who?", "--subtitles", "auto")
    assert result.code == 0 and [bool(record["subtitles"]) for record in made] == [True, False]
    assert made[0]["batch"]["settings"]["subtitles"] == "auto"
    assert "subtitles was 'auto', is None" in batch(clip, CLIP, "-Q", "Who?", "--resume")[0].err
    assert batch(clip, CLIP, "-Q", "Who?", "--resume", "--subtitles", "auto")[0].code == 0


def test_outputs_of_versions_without_subtitles_can_be_resumed(batch, clip):
    settings = batch(clip, "-Q", "Who?")[1][0]["batch"]
    assert "subtitles" not in settings["row"] and not any("subtitle" in name for name in settings["settings"])


def test_an_evaluation_refuses_them(cli, clip, tmp_path):
    row = {"video": "clip.mp4", "question": "Who?", "answer": "a man", "subtitles": "auto"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    result = cli("eval", "--data", tmp_path / "rows.jsonl")
    assert result.code == 2 and "subtitles are not read in an evaluation" in result.err
