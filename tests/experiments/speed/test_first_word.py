"""A checkpoint can be written and asked. Every part of `first_word` runs on small clips with the demo model."""

import json
import re
import shutil
import sys
import time
from argparse import Namespace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from evoprune.bench.hugging_face import share_equal
from evoprune.bundled import DEMOS
from evoprune.hf import processor_inputs
from evoprune.session import load_model
from evoprune.video import probe, read_chunks
from evoprune.video_qa import VideoQA
from experiments.speed import checkpoint, first_word, first_word_readers, first_word_tables
from experiments.speed.first_word import Clip, Frames, Run, parsed, read_in_turn, run_once
from experiments.speed.first_word_asks import QUESTION, Transformers
from experiments.speed.first_word_clips import KINDS, TINY, Kind, join, make_clip, number_of
from experiments.speed.processes import Side
from tests.tiny import tiny_config
from tests.video.files import apart

ROOT = Path(__file__).parents[3]
CLIP = ROOT / "samples/square.mp4"


def test_a_checkpoint_has_every_weight_and_a_tokenizer_of_that_size_and_transformers_reads_it(tmp_path, monkeypatch):
    tiny = tiny_config().to_dict()
    tiny["text_config"]["vocab_size"] = 700
    for name in ("vision_start", "vision_end", "image", "video"):  # transformers reads their ids from the config
        special = f"{name}_pad" if name in ("image", "video") else name
        tiny[f"{name}_token_id"] = 600 + checkpoint.SPECIAL_TOKENS.index(special)
    (tmp_path / "config.json").write_text(json.dumps(tiny))
    monkeypatch.setattr(checkpoint, "WORDS", 600)
    monkeypatch.setitem(checkpoint.BUNDLED_CONFIGS, "tiny", tmp_path / "config.json")
    written = tmp_path / "checkpoint"
    checkpoint.write_checkpoint(written, "tiny")
    loaded = load_model(str(written), dtype="bf16")
    assert len(list(written.glob("*.safetensors"))) == 2 and not list(tmp_path.glob("*.writing"))
    assert loaded.tokenizer.backend.get_vocab_size() == 600 + len(checkpoint.SPECIAL_TOKENS)
    text = "What colour is the square?"
    assert loaded.tokenizer.decode(loaded.tokenizer.encode(text)) == text
    answer = VideoQA(loaded).encode(CLIP, frames=4).ask("What?", max_new_tokens=5)
    assert answer.text is not None and answer.report.tokens.new == 5  # no token ends an answer
    side = Transformers(Namespace(model=str(written), device="cpu"))
    plain = load_model(str(written), dtype="bf16", pack=False)
    assert share_equal(side._model, plain.model) == []  # it has all weights and no others
    assert side.ask(str(CLIP), 4, 5, lambda piece: None)["words"] == 5


# Clips.


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> dict[str, Clip]:
    """A clip of each kind, two pieces long."""
    folder = tmp_path_factory.mktemp("clips")
    made = {}
    for name, kind in KINDS.items():
        clip = made[name] = Clip(name, 2 * kind.piece_s / 60, folder / f"{name}.{kind.ending}")
        apart(make_clip, clip.path, name, 60 * clip.minutes, TINY)
    return made


@pytest.mark.parametrize("name", KINDS)
def test_every_frame_carries_its_number_also_where_pieces_are_joined(name, clips):
    kind, clip = KINDS[name], clips[name]
    info = probe(clip.path)
    assert info.duration_s == pytest.approx(clip.seconds, abs=0.1)
    around = [kind.piece_s - 0.51, kind.piece_s - 0.01, kind.piece_s + 0.01, kind.piece_s + 1.71, clip.seconds - 1.01]
    times_s = [0.26, 1.01, 2.57, *around]
    found = [number_of(frame) for chunk in read_chunks(info, times_s) for frame in chunk.pixels]
    assert found == [kind.number_at(time_s) for time_s in times_s]


def test_a_screen_changes_rarely_and_its_keyframes_are_far_apart(clips):
    kind = KINDS["screen"]
    shown = kind.times_s
    assert shown == sorted(set(shown)) and len(shown) < kind.piece_s * kind.fps / 5
    assert probe(clips["screen"].path).variable_rate


def test_a_clip_that_would_be_too_large_is_not_written(tmp_path, monkeypatch, clips):
    monkeypatch.setattr("experiments.speed.first_word_clips.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"out.mp4 would take .* GiB"):
        join(clips["hd"].path, tmp_path / "out.mp4", KINDS["hd"], 120)
    assert not (tmp_path / "out.mp4").exists()


# Sides.


ANSWERS = "from experiments.speed.processes import serve\nimport os, time\n"
SIDES = {
    "echoes": "serve(lambda: lambda asked: (print('noise'), asked)[1])",
    "raises": "def make():\n  raise OSError('no such library')\nserve(make)",
    "dies": "serve(lambda: lambda asked: os._exit(7))",
    "hangs": "serve(lambda: lambda asked: time.sleep(60))",
}


def test_a_side_that_fails_ends_or_hangs_says_so(tmp_path):
    sides = {
        name: Side([sys.executable, "-c", ANSWERS + code], tmp_path / f"{name}.txt") for name, code in SIDES.items()
    }
    begun = time.monotonic()
    said = {name: side.ask({"a": 1}, 1.5 if name == "hangs" else 60) for name, side in sides.items()}
    assert said["echoes"] == {"a": 1} and sides["echoes"].ask({"b": 2}, 60) == {"b": 2}
    assert said["raises"] == {"error": "OSError: no such library"}
    assert said["dies"]["error"].startswith("ended with 7")
    assert said["hangs"] == {"error": "not done in 2 s", "over_s": 1.5}
    assert [side.running for side in sides.values()] == [True, True, False, False]
    assert sides["echoes"].ask({}, 0) == {"error": "not started: no time was left"}
    assert sides["echoes"].end() == 0 and time.monotonic() - begun < 55


def test_a_process_is_ended_in_time_and_one_that_fails_shows_why(tmp_path):
    log = tmp_path / "log.txt"
    hangs = run_once([sys.executable, "-c", "import time; time.sleep(60)"], 1.0, log)
    assert hangs == {"error": "not done in 1 s", "over_s": 1.0}
    fails = run_once([sys.executable, "-c", "raise SystemExit('no such model')"], 60, log)
    assert fails == {"error": "ended with 1: no such model"}
    words = "import sys, time\nfor w in 'ab':\n  print(w, end='', flush=True); time.sleep(0.2)"
    works = run_once([sys.executable, "-c", words], 60, log)
    assert 0 < works["first_word"] < works["second_word"] == works["last_word"] < works["ended"]
    assert works["answer"] == "ab" and works["peak_bytes"] > 2**20 and works["cpu"] > 0


# Reading.


def test_readers_take_turns_and_those_that_fail_are_rows(tmp_path, clips):
    """Readers that are not installed fail with a reason; the others have times."""
    run = Run(parsed(["-o", str(tmp_path), "--tiny", "-r", "2"]))
    run.record |= {"reading": [], "about": first_word.about(run), "parts": {}}
    names = [*first_word_readers.READERS]
    cases = [Frames(clip, 6, 1.1, 1.0137) for clip in (clips["hd"], clips["ts"])]
    read_in_turn(run, cases, names, time.monotonic() + 300)
    rows = run.record["reading"]
    assert [row["side"] for row in rows[: len(names)]] == names and {row["round"] for row in rows} == {0, 1}
    for side in ("evoprune", "PyAV, seeking"):
        mine = [row for row in rows if row["side"] == side]
        assert len(mine) == 4 and all(row["others"] == 0 and row["seconds"] > 0 and row["frames"] == 6 for row in mine)
    near = [row for row in rows if row["side"] == "evoprune, keyframes"]
    assert any(row["others"] for row in near) and all(row["moved_s"] <= 1.1 / 2 + 0.05 for row in near)
    if "torchcodec" in (missing := {row["side"] for row in rows if "error" in row}):
        assert sum(row["side"] == "torchcodec" for row in rows) == 2  # once for each case
    page = first_word_tables.document([run.record])
    assert all(f"- {side} failed with " in page for side in missing)
    assert json.loads(run.file.read_text())["reading"] == rows


def test_a_reader_that_takes_too_long_is_ended_and_the_others_go_on(tmp_path, clips, monkeypatch):
    run = Run(parsed(["-o", str(tmp_path), "--tiny"]))
    run.record["reading"] = []
    monkeypatch.setitem(first_word.TURN_S["cpu"], "reading", 0.001)
    read_in_turn(run, [Frames(clips["uhd"], 4, 1.7, 1.0137)], ["evoprune", "PyAV, seeking"], time.monotonic() + 120)
    assert [row["over_s"] for row in run.record["reading"]] == [0.001, 0.001]
    assert first_word_tables.reading_cell(run.record["reading"][:1]) == "over 0.00"


def test_frames_that_moved_are_counted():
    kind = Kind("", "mp4", "", (1, 1), 10, fps=10)
    assert first_word_readers.distance(kind, 3, 3) == 0
    assert first_word_readers.distance(kind, 99, 1) == pytest.approx(0.2)  # the piece is repeated
    assert first_word_readers.distance(kind, 400, 1) == 5  # no frame of the piece


# The whole program.


def test_transformers_gets_what_its_processor_would_make_of_the_video():
    model, words = str(DEMOS["demo"].folder), []
    side = Transformers(Namespace(model=model, device="cpu"))
    side._feed = "PyAV, seeking"
    made = side._inputs(side._plan(str(CLIP), None))
    wanted = processor_inputs(model, CLIP, QUESTION)
    assert {*made} == {*wanted} and all(torch.equal(made[name], wanted[name]) for name in made)
    found = side.ask(str(CLIP), None, 8, words.append)
    assert (found["words"], len(words), found["visual"]) == (8, 8, 144) and found["prompt"] == made["input_ids"].shape[
        1
    ]
    assert 0 < found["encode"] < found["first_word"] < found["last_word"]


def test_every_part_runs_and_fills_the_documents(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(first_word.signal, "signal", lambda *_: None)
    monkeypatch.setattr(first_word, "NEW_TOKENS", 6)
    monkeypatch.setattr(first_word, "BUDGETS", ("balanced",))
    quick = ["-o", str(tmp_path), "--tiny", "-r", "1"]
    first_word.main([*quick, "--parts", "reading,loaded"])
    first_word.main([*quick, "--parts", "start"])  # the other parts stay
    record = json.loads((tmp_path / "first_word.json").read_text())
    timed = {part: [row for row in record[part] if "error" not in row] for part in ("reading", "loaded", "start")}
    assert {row["side"] for row in timed["reading"]} >= {"evoprune", "PyAV, seeking"}
    assert [row["side"] for row in timed["loaded"]] == 2 * ["transformers"] + 2 * ["balanced"], record["loaded"]
    assert [row["first"] for row in timed["loaded"]] == [True, False] * 2
    assert [row["side"] for row in timed["start"]] == ["transformers", "balanced"], record["start"]
    for row in timed["loaded"]:
        assert 0 < row["encode"] + row["prefill"] <= row["first_word"] <= row["last_word"]
    assert "encode + prefill" in timed["start"][1]["stats"]
    assert all(record["about"]["versions"][name] for name in ("evoprune", "torch", "av"))
    assert "evoprune `-b balanced`" in capsys.readouterr().out

    (tmp_path / "results").mkdir()
    for page in ("README.md", "results/first_word.md"):
        shutil.copyfile(ROOT / page, tmp_path / page)
    first_word_tables.write_documents([record], tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert "![From the path to the first word. " in readme
    first_word_tables.write_documents([record], tmp_path)  # a second time, without duplicates
    assert (tmp_path / "README.md").read_text() == readme
    page = (tmp_path / "results/first_word.md").read_text()
    assert "### Reading" in page and "*Exact* frames" in page
    drawn = ElementTree.parse(tmp_path / "results/first_word.svg")
    bars = [e for e in drawn.iter() if e.tag.endswith("rect") and e.get("height") == str(first_word_tables.TALL)]
    assert len(bars) == 2 * len(first_word_tables.STAGES)


def test_a_gpu_takes_eight_minutes_at_most(tmp_path):
    assert sum(first_word.SECONDS["cuda"].values()) <= 480
    run = Run(parsed(["-o", str(tmp_path), "--device", "cuda"]))
    assert [(clip.minutes, frames) for clip, frames in run.questions] == [(60, 64), (10, None)]


@pytest.mark.parametrize(
    ("more", "says"),
    [(("--parts", "reading,talking"), "unknown part talking"), (("--seconds", "reading=soon"), "--seconds")],
)
def test_what_cannot_be_run_is_refused(more, says, capsys):
    with pytest.raises(SystemExit):
        parsed(["-o", "a", *more])
    assert says in re.sub(r"\s+", " ", capsys.readouterr().err)
