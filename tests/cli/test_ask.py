"""`evoprune ask` from end to end on the bundled model: the answer on stdout, everything else on stderr."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evoprune.bundled import DEMOS
from evoprune.methods.evoprune import EvoPrune
from evoprune.methods.plans import PRESETS
from evoprune.report.records import Report
from evoprune.report.stats import stats_block
from evoprune.video.info import SCENES_TAG
from evoprune_cli.terminal import stdout
from tests.cli.screen import visible
from tests.decoders import needs_decord
from tests.loading import edit
from tests.video.files import write_video

CLIP, QUESTION, ANSWER = "samples/square.mp4", "What colour is the square?", "green"
SCENE = "samples/scenes/crossing.mp4"
ROOT = Path(__file__).parents[2]


def test_stats(cli):
    result = cli("ask", CLIP, QUESTION)
    for stage in ("read", "preprocess", "encode", "prefill", "generate", "first token", "memory"):
        assert f"\n{stage}" in result.err
    assert "144 visual tokens -> 36, with 35% of the work" in result.err and "25.0% kept, 75.0% pruned" in result.err
    assert "loading the model, not counted: " in result.err
    assert not re.search(r"\b(pairs?|units?|rows?|live|apart|alone)\b", result.err)  # words that nobody has explained
    assert result.err.isascii() and "warning" not in result.err


def test_what_prunes_nothing_has_the_whole_budget(cli):
    pruning = cli("ask", CLIP, QUESTION, "--json", "--method", "none", "-b", "0.1").record["pruning"]
    assert pruning["budget"] == pruning["kept_ratio"] == 1


def test_a_wrong_value_from_the_environment_is_traced_to_it(cli, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_BUDGET", "lots")
    assert "; the value comes from EVOPRUNE_BUDGET\n" in cli("ask", CLIP, QUESTION).err
    assert "EVOPRUNE_BUDGET" not in cli("ask", CLIP, QUESTION, "-b", "lots").err
    record = cli("ask", CLIP, QUESTION, "--json").record
    assert record["error"]["hint"].endswith("EVOPRUNE_BUDGET")


def test_a_seed_that_no_generator_takes(cli):
    result = cli("ask", CLIP, QUESTION, "--seed", 2**64)
    assert result.code == 2 and "bug" not in result.err


@pytest.mark.full
def test_a_limit_on_the_size_of_files_is_named(tmp_path):
    command = [sys.executable, "-m", "evoprune_cli", "ask", str(ROOT / CLIP), QUESTION]
    limited = f"ulimit -f 2; exec {shlex.join(command)}"
    done = subprocess.run(["bash", "-c", limited], capture_output=True, cwd=ROOT, text=True)
    assert done.returncode == 3 and "limit on the size of files" in done.stderr and "ulimit" in done.stderr


def test_verbose_shows_rows_of_every_layer(cli):
    err = cli("ask", CLIP, QUESTION, "-v", "--method", "evoprune-paper").err
    assert "0:144 1:144 2:" in err and "transformers" in err


def test_json_record_holds_the_schema(cli):
    result = cli("ask", CLIP, QUESTION, "--json", "-b", "0.25", "--method", "evoprune-paper")
    record = result.record
    assert result.code == 0 and result.err == ""
    assert record["schema"] == "evoprune/answer@1" and record["error"] is None and record["warnings"] == []
    assert record["answer"] and record["finish_reason"] == "stop" and record["question"] == QUESTION
    assert record["video"] | {"duration_s": 6.0, "width": 168, "height": 112, "codec": "h264"} == record["video"]
    assert record["sampling"]["grid_thw"] == [6, 8, 12] and record["sampling"]["frames"] == 12
    assert record["sampling"]["seconds_per_pair"] == 1.0 and record["sampling"]["resized_hw"] == [112, 168]
    pruning = record["pruning"]
    assert (pruning["visual_tokens_in"], pruning["visual_tokens_kept"], pruning["encoder_rows"]) == (144, 36, 36)
    assert sum(pruning["kept_per_pair"]) == 36 and pruning["positions"] == "qwen" and pruning["kept_ratio"] == 0.25
    rows = [row for _, row in pruning["layers"]]
    assert rows == sorted(rows, reverse=True) and rows[0] == 144 and rows[-1] == 36
    assert pruning["encoder_live_share"] == pytest.approx(sum(rows) / len(rows) / 144, abs=1e-6)
    tokens = record["tokens"]
    assert tokens["visual"] == 36 and tokens["prompt"] == tokens["text"] + 36 and tokens["new"] >= 1
    times = record["time_ms"]
    assert times.pop("prefill_prune") is None  # nothing leaves inside the language model
    assert all(times[name] > 0 for name in times if name != "pack") and times["pack"] >= 0
    assert times["ttft_model"] == pytest.approx(times["encode"] + times["prefill"], abs=1e-3)
    assert times["ttft_model"] < times["ttft_wall"] < times["total"] + 1
    assert Report.from_json(result.out).to_json() == result.out.strip()


def test_the_same_seed_gives_the_same_answer(cli):
    args = ("ask", CLIP, "Describe the video.", "-t", "1", "--seed", "3", "-q", "-b", "fast")
    assert cli(*args).out == cli(*args).out


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
@pytest.mark.parametrize(("flags", "blocks", "lines"), [((), 1, 1), (("--stats",), 2, 0), (("--no-stats",), 0, 0)])
def test_each_of_several_questions_stands_above_its_answer_on_a_terminal(cli, flags, blocks, lines):
    asked, more = ("ask", CLIP, QUESTION, *flags), "Which\nway?"
    result = cli(*asked, "-Q", more, columns=80)
    seen = visible(result.err)
    assert seen[0] == f"> {QUESTION}" and seen.count("> Which way?") == 1
    assert sum(line.startswith("prefill") for line in seen) == blocks
    assert sum("; first token " in line for line in seen) == lines
    assert result.out == cli(*asked, "-Q", more).out == cli(*asked, "-Q", more, "-q").out
    for flags in ((), ("-Q", more, "-q"), ("-Q", more, "--json")):
        assert "> W" not in cli(*asked, *flags, columns=80).err


@needs_decord
def test_both_decoders_give_the_same_answer(cli):
    record = cli("ask", CLIP, QUESTION, "--decoder", "decord", "--json").record
    assert record["video"]["decoder"] == "decord" and record["answer"] == ANSWER


CUT = "warning: the answer may be incomplete: -n (max_new_tokens) allows no more tokens\n"


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
    said = "note: the model's generation_config.json has tokens drawn otherwise than here; as it says: --temperature 0.7 --top-k 20"
    assert said in " ".join(result.err.split())
    assert result.record["generation"] == {
        "max_new_tokens": 1, "temperature": 0.0, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.05, "seed": 0
    }  # fmt: skip
    assert "drawn" not in cli(*asked, "-q").err
    result = cli(*asked, "-t", "0.7", "--top-k", "20", "--repetition-penalty", "1.3")
    assert "drawn" not in result.err and result.record["generation"]["repetition_penalty"] == 1.3
    assert "drawn" not in cli(*asked[:4], tiny_folder, *asked[5:]).err  # whose temperature is next to 0


@pytest.mark.few(1)
@pytest.mark.parametrize(
    ("method", "kept", "rows"), [("none", 144, 144), ("random", 36, 144), ("evoprune-paper", 36, 36)]
)
def test_methods(cli, method, kept, rows):
    pruning = cli("ask", CLIP, QUESTION, "--method", method, "-b", "balanced", "--json").record["pruning"]
    assert (pruning["visual_tokens_kept"], pruning["encoder_rows"], pruning["method"]) == (kept, rows, method)


@pytest.mark.full
def test_the_live_share_is_the_mean_of_the_layers(cli):
    for budget in ("high", "fast"):
        share = PRESETS[budget]
        pruning = cli("ask", CLIP, QUESTION, "--json", "-b", budget).record["pruning"]
        entered = [rows for _, rows in pruning["layers"]]
        most = round(144 * share ** EvoPrune().rows)
        assert pruning["encoder_live_share"] == pytest.approx(sum(entered) / len(entered) / 144, abs=1e-6)
        assert pruning["layers"][-1][1] == pruning["encoder_rows"] <= most
        assert pruning["visual_tokens_kept"] == round(144 * share)


def test_at_full_budget_the_encoder_leaves_nothing_out(cli):
    full = cli("ask", CLIP, QUESTION, "--json", "-b", "full").record["pruning"]
    assert (full["encoder_rows"], full["encoder_live_share"]) == (144, 1)


def test_part_of_a_video(cli):
    sampling = cli("ask", CLIP, QUESTION, "--start", "0:01", "--end", "3", "--frames", "3", "--json").record["sampling"]
    assert (sampling["start_s"], sampling["end_s"], sampling["frames"]) == (1.0, 3.0, 4)
    assert sampling["timestamps_s"] == [1.25, 1.75, 2.25, 2.75]
    sampling = cli("ask", CLIP, QUESTION, "--start", "-0:05", "--end", "-3", "--json").record["sampling"]
    assert (sampling["start_s"], sampling["end_s"]) == (1.0, 3.0)


def test_a_folder_in_the_hubs_layout_is_a_model(cli, tiny_folder):
    record = cli("ask", CLIP, QUESTION, "-m", tiny_folder, "-n", "3", "--json").record
    assert (
        record["model"]["id"] == str(tiny_folder)
        and record["tokens"]["new"] <= 3
        and record["warnings"] in ([], ["answer_cut"])
    )


def test_random_weights_are_told(cli, tiny_folder):
    record = cli("ask", CLIP, QUESTION, "-m", tiny_folder, "--load-format", "dummy", "-n", "3", "--json").record
    assert record["model"]["load_format"] == "dummy" and "random_weights" in record["warnings"]


@pytest.mark.full
def test_model_and_budget_from_the_environment(cli, tiny_folder, monkeypatch):
    monkeypatch.setenv("EVOPRUNE_MODEL", str(tiny_folder))
    monkeypatch.setenv("EVOPRUNE_BUDGET", "fast")
    record = cli("ask", CLIP, QUESTION, "-n", "1", "--json").record
    assert record["model"]["id"] == str(tiny_folder) and record["pruning"]["budget"] == "fast"
    assert cli("ask", CLIP, QUESTION, "-m", "demo", "-b", "1", "--json").record["pruning"]["budget"] == 1.0


@pytest.mark.full
def test_records_hold_the_warning_about_foreign_clips(cli, tmp_path):
    path = tmp_path / "foreign.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8), fps=6)
    assert cli("ask", path, QUESTION, "--json").record["warnings"] == ["demo_model"]


@pytest.mark.full
def test_the_demo_warns_of_questions_in_other_words(cli):
    result = cli("ask", CLIP, "Does the man smile?", "-Q", QUESTION, "-Q", "Who smiles?", "--json")
    given = [json.loads(line)["warnings"] for line in result.out.splitlines()]
    assert given == [["demo_question"], [], ["demo_question"]]
    assert result.err.count("warning: a demo model knows only the words of its training") == 1


def test_the_demo_warns_of_what_it_was_not_trained_on(cli, tmp_path):
    (tmp_path / "said.srt").write_text("1\n00:00:01,000 --> 00:00:02,000\nHello.\n")
    for more in ((CLIP, QUESTION), (QUESTION, "--subtitles", tmp_path / "said.srt")):
        assert cli("ask", CLIP, *more, "--json").record["warnings"] == ["demo_inputs"]


@pytest.fixture
def scenes_of_tiny(tiny_folder, monkeypatch):
    """Other weights in the place of the model for scenes: warnings do not depend on them."""
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
    Image.new("RGB", (112, 112)).save(tmp_path / "still.jpg", comment=SCENES_TAG)
    inputs = [tmp_path / name if name in ("still.jpg", "said.srt") else name for name in inputs]
    record = cli("ask", *inputs, asked, "-m", "demo-scenes", "--frames", "4", "-n", "1", "--json").record
    found = [name for name in record["warnings"] if name != "answer_cut"]
    assert (record["model"]["id"], record["model"]["dtype"], found) == ("demo-scenes", "fp32", warnings)


@pytest.mark.full
def test_each_demo_model_knows_clips_of_its_own_world_alone(cli, tmp_path):
    result = cli("ask", SCENE, QUESTION, "--frames", "4", "-n", "1", "--json")
    assert "demo_model" in result.record["warnings"] and "demo-scenes: crowded scenes with signs" in result.err


def test_a_question_without_a_video(cli):
    result = cli("ask", "What is in it?", terminal=True)
    assert result.code == 3 and "no such file: What is in it?" in result.err and "the video comes first" in result.err


@pytest.mark.few(1)
@pytest.mark.parametrize("flags", [(), ("-q",), ("--json",)])
def test_the_warning_that_an_answer_means_nothing_comes_before_it(cli, tmp_path, monkeypatch, flags):
    path = tmp_path / "foreign.mp4"
    write_video(path, np.random.default_rng(0).integers(0, 255, (12, 96, 128, 3), np.uint8), fps=6)
    monkeypatch.setattr(
        "evoprune_cli.terminal.print_warning", lambda name, video: print(f"warning {name}", file=stdout())
    )
    assert cli("ask", path, QUESTION, *flags).out.startswith("warning demo_model\n")


@pytest.mark.parametrize("args", [
    ("--help",), ("--version",), ("ask", "--help"), ("ask", "--help-all"),
    ("ask", "nothere.mp4", "x"), ("ask", CLIP, "x", "--end", "0"), ("ask", CLIP, "x", "--subtitles", "nothere.srt"),
    ("inspect", "nothere.mp4"),
])  # fmt: skip
def test_help_and_what_is_wrong_with_inputs_need_no_torch(args):
    code = f"""
import sys
sys.argv = ["evoprune", *{args}]
from evoprune_cli.main import run
try:
    run()
except SystemExit as stop:
    print(stop.code or 0, {{"torch", "transformers"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    refused = not args[-1].startswith("--")
    assert done.stdout.splitlines()[-1] in [f"{code} set()" for code in ((1, 2, 3, 4) if refused else (0,))]


def test_records_hold_a_path_that_is_no_text(cli, tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    shutil.copy(ROOT / CLIP, path)
    result = cli("ask", path, QUESTION, "--json")
    assert result.record["video"]["path"] == path and result.out.isascii()


def test_help_says_what_becomes_of_stdin(cli):
    text = " ".join(cli("ask", "--help").out.split())
    assert "Without a question or -Q, the question is read from stdin; otherwise only - reads it." in text


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


@pytest.mark.few(1)
@pytest.mark.parametrize("width", [40, 60, 80])
def test_stats_block_fits_the_terminal(cli, width):
    report = Report.from_json(cli("ask", CLIP, QUESTION, "--json").out)
    assert all(len(line) <= width for line in stats_block(report, width))
    report.pruning.visual_tokens_in, report.pruning.encoder_rows, report.pruning.visual_tokens_kept = 24576, 12288, 6144
    report.tokens.visual, report.tokens.prompt, report.video.frames_total = 6144, 6190, 1234567
    assert all(len(line) <= width for line in stats_block(report, width))
    report.video.path = "/a/" + "long" * 40 + ".mp4"
    report.model.id = "/b/" + "long" * 40
    assert all(len(line) <= 80 for line in stats_block(report))


@pytest.mark.full
@pytest.mark.parametrize("name", ["arrivals.webm", "vanish.webm", "pan.mp4"])
def test_stats_of_containers_that_state_their_frames_and_of_those_that_do_not(cli, name):
    result = cli("ask", f"samples/{name}", "What happens?", "-n", "2")
    assert result.code == 0 and result.out and " frames" in result.err and "error" not in result.err
