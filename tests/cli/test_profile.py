"""`evoprune profile`: its output and formats, and the inputs it refuses before it reads any weights."""

import csv
import io
import re
from xml.etree import ElementTree

import pytest

from evoprune.bench import Case, Profile, ProfileSettings
from evoprune.bench import profile as measuring
from evoprune.bench.profile_results import ProfileResults
from evoprune.errors import ModelError
from evoprune.methods import Budget
from evoprune.session import ModelOptions
from tests.cli.screen import visible

CLIP = "samples/square.mp4"
ROWS = ["Hugging Face", "budget 1.0", "bound -b 0.5", "evoprune -b 0.5"]
QUICK = ("-r", "1", "--size", "112x168", "--frames", "4", "-b", "0.5")


@pytest.fixture(autouse=True)
def quick_rate(monkeypatch):
    monkeypatch.setattr(measuring, "matmul_rate", lambda *_, **__: 1e11)


@pytest.fixture
def profile(cli, tiny_folder):
    """`evoprune profile` on the tiny model, at a size that takes milliseconds unless `args` say otherwise."""

    def call(*args, **settings):
        return cli("profile", "-m", str(tiny_folder), *QUICK, *map(str, args), **settings)

    return call


def table_rows(text: str, title: str = "first token") -> list[str]:
    """Return the lines of the table that has this column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if title in line and ":" not in line) + 1
    return lines[start : lines.index("", start)]


def test_a_table_on_stdout_and_nothing_else(profile):
    result = profile()
    assert (result.code, result.err) == (0, "")
    assert [line[: len(name)] for line, name in zip(table_rows(result.out), ROWS, strict=True)] == ROWS
    assert [line[: len(name)] for line, name in zip(table_rows(result.out, "live"), ROWS, strict=True)] == ROWS
    assert "4 frames of 112x168: 48 units" in result.out and "1 round after 1 of warm-up" in result.out
    assert "random weights" not in result.out and "synthetic motion; 30 text tokens; 4 new tokens" in result.out
    assert all(len(line) <= 80 and line == line.rstrip() for line in result.out.splitlines())


def test_only_columns_that_are_there_are_explained(profile, monkeypatch):
    seen = []
    monkeypatch.setattr(ProfileResults, "text", lambda results, *_: seen.append(results) or "")
    profile()
    for width, gone in ((80, ()), (40, ("vs bound", "matmul"))):
        text = " ".join(seen[0].table(width).split())
        for title in ("vs bound", "live", "matmul"):
            assert (f"{title}: " in text) == (title not in gone), (width, title)


@pytest.mark.full
def test_markdown(profile):
    out = profile("--format", "md", "--frames", "4,8", "--size", "112x168", "--size", "56x112").out
    head, _, titles, rule, *rows = out.splitlines()
    for fact in ("model, ", "cpu (1 thread)", "4 sizes", "torch 2.", "transformers 5", "1 round after"):
        assert fact in head
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in rows[: rows.index("")]]
    titles = [title.strip() for title in titles.strip("|").split("|")]
    assert titles[:3] == ["frames", "size", ""] and set(rule) <= set("| -")
    assert all(len(row) == len(titles) for row in cells)
    sizes = [(n, size) for n in ("4", "8") for size in ("112x168", "56x112")]
    assert [row[:3] for row in cells] == [[*size, name] for size in sizes for name in ROWS]
    assert out.count("\n- ") >= 4


def test_json(profile):
    names = ["random", "evoprune-paper"]
    document = profile("--format", "json", "-n", "2", "--method", "random", "--method", "evoprune-paper,random").record
    assert document["schema"] == "evoprune/profile@1"
    assert document["settings"]["methods"] == names and document["settings"]["new_tokens"] == 2
    assert document["settings"]["synthetic"] == "motion" and document["settings"]["video"] is None
    assert document["rounds"]["measured"] == 1 and document["env"]["threads"] == 1
    assert [row["name"] for row in document["rows"]] == [*ROWS[:3], "random -b 0.5", "evoprune-paper -b 0.5"]
    assert document["rows"][-1]["counts"]["live_share"] == 0.75 and document["rows"][-1]["error"] is None


@pytest.mark.full
def test_pictures(cli, photo, tiny_folder):
    quick = ("-m", tiny_folder, "-b", "0.25", "-r", "1", "-w", "0", "--format", "json")
    for words, height, width in ((("--pictures", "--size", "56x84"), 56, 84), ((photo, "--size", "84x56"), 84, 56)):
        rows = cli("profile", *words, *quick).record["rows"]
        assert {(row["frames"], row["height"], row["width"]) for row in rows} == {(1, height, width)}
        assert [row["counts"]["tokens"] for row in rows] == [6, 6, 2, 2] and not any(row["error"] for row in rows)


@pytest.mark.full
def test_a_video(cli, tiny_folder):
    common = ("-m", str(tiny_folder), "-r", "1", "--frames", "4", "-b", "0.5", "--format", "json")
    document = cli("profile", CLIP, *common).record
    assert document["settings"]["video"] == CLIP and document["settings"]["synthetic"] is None
    assert {(row["height"], row["width"]) for row in document["rows"]} == {(112, 168)}  # the clip's own shape
    document = cli("profile", CLIP, *common, "--size", "56x56").record
    assert {row["counts"]["units"] for row in document["rows"]} == {8}


@pytest.mark.full
def test_output_goes_to_a_file(profile, tmp_path):
    result = profile("--format", "csv", "-o", tmp_path / "out.csv", "--chart", tmp_path / "chart.svg")
    assert (result.code, result.out, result.err) == (0, "", "")
    assert (tmp_path / "out.csv").read_text().startswith("row,name,")
    words = [e.text for e in ElementTree.parse(tmp_path / "chart.svg").iter() if e.tag.endswith("text")]
    assert "live share: rows computed, averaged over all layers" in words and "-b 0.5" in words


@pytest.mark.full
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_the_title_of_a_chart_says_that_weights_are_random(profile, tmp_path, load_format):
    profile("--load-format", load_format, "--chart", tmp_path / "chart.svg")
    title = next(e.text for e in ElementTree.parse(tmp_path / "chart.svg").iter() if e.tag.endswith("title"))
    assert (" with random weights: " in title) == (load_format == "dummy")
    assert title.endswith("live share of evoprune")  # a chart of another method has another title


@pytest.mark.full
def test_a_chart_of_a_sweep(profile, tmp_path):
    profile("--frames", "2,8", "--chart", tmp_path / "chart.svg")
    words = [e.text for e in ElementTree.parse(tmp_path / "chart.svg").iter() if e.tag.endswith("text")]
    assert words.count("frames") == 2 and {"Encode", "First token (encode + prefill)", *ROWS} <= set(words)


@pytest.mark.full
def test_progress_on_a_terminal_only(profile):
    result = profile(columns=50)
    assert "round 1 of 1: evoprune -b 0.5, 4 frames of 112x168" in result.err
    assert visible(result.err) == [] and "round 1 of 1" not in result.out
    assert profile("-q", columns=50).err == ""


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--frames", "0"), "--frames '0'"),
        (("--frames", "8,many"), "--frames 'many'"),
        (("--frames", "9" * 40), "is not a number of frames"),
        (("--size", "100x100"), "multiples of 28"),
        (("--size", "224"), "HEIGHTxWIDTH"),
        (("--synthetic", "film"), "one of motion, static90, noise"),
        ((CLIP, "--synthetic", "noise"), "cannot be combined"),
        (("--load-format", "magic"), "one of auto, dummy"),
        (("-r", "0"), "--repeat"),
        (("--time-limit", "-1"), "--time-limit"),
        (("--pictures", CLIP), "--pictures excludes"),
        (("--pictures", "--frames", "8"), "--pictures excludes"),
    ],
)
def test_wrong_flags(profile, monkeypatch, args, says):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    result = profile(*args)
    assert (result.code, result.out) == (2, "")
    error, hint = result.err.splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: ") and says in result.err


@pytest.mark.full
def test_a_row_without_memory_stays(profile, monkeypatch):
    def run_evoprune(loaded, clip, plan, method, *rest):
        if method.name == "random":
            raise measuring.OutOfMemory("out of memory in encode")
        return real(loaded, clip, plan, method, *rest)

    real = measuring.run_evoprune
    monkeypatch.setattr(measuring, "run_evoprune", run_evoprune)
    result = profile("--method", "evoprune,random")
    assert (result.code, result.err) == (6, "")
    assert table_rows(result.out)[-1].split() == ["random", "-b", "0.5", *"------"]
    assert "random -b 0.5, 4 frames of 112x168: out of memory in encode" in result.out
    *rows, failed = csv.DictReader(io.StringIO(profile("--method", "evoprune,random", "--format", "csv").out))
    assert failed["error"] == "out of memory in encode" and failed["encode_ms"] == ""
    assert [(row["name"], row["tokens"]) for row in rows] == list(zip(ROWS, ("48", "48", "24", "24"), strict=True))
    for row in rows:
        assert float(row["encode_low_ms"]) <= float(row["encode_ms"]) <= float(row["encode_high_ms"])
        assert float(row["ttft_model_ms"]) > 0 and row["error"] == ""


@pytest.mark.full
def test_an_interruption_prints_the_finished_rounds(profile, monkeypatch):
    turns, real = [], measuring.run_evoprune

    def run_evoprune(*args):
        turns.append(args)
        if len(turns) == 6:  # in the last turn of the second round after a warm-up
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(measuring, "run_evoprune", run_evoprune)
    result = profile("-r", "3", "--format", "json")
    assert (result.code, result.err) == (130, "")
    assert result.record["rounds"]["interrupted"] and result.record["rounds"]["measured"] == 1
    assert result.record["notes"][-1] == "interrupted: 1 of 3 rounds finished"


def test_defaults(cli, monkeypatch):
    """The true dimensions of the 3B model, whatever EVOPRUNE_MODEL says; EVOPRUNE_BUDGET is respected."""
    asked, recorded = [], []

    def load(model, cases):
        asked.append((model.id, cases, model.options.load_format))
        raise ModelError("enough")

    class Recorded(ProfileSettings):
        def __init__(self, **more):
            super().__init__(**more)
            recorded.append(self)

    monkeypatch.setattr(measuring, "load", load)
    monkeypatch.setattr("evoprune_cli.profile.ProfileSettings", Recorded)
    monkeypatch.setenv("EVOPRUNE_MODEL", "demo")
    assert cli("profile").code == 4
    assert asked == [("Qwen/Qwen2.5-VL-3B-Instruct", [Case(8, 224, 336)], "dummy")]
    (s,) = recorded
    assert (s.budgets, s.methods, s.seed) == (tuple(Budget.PRESETS)[1:], ("evoprune",), 0)
    assert (s.new_tokens, s.warmups, s.repetitions, s.time_limit_s) == (4, 1, 3, 150)
    monkeypatch.setenv("EVOPRUNE_BUDGET", "fast")
    cli("profile")
    assert recorded[-1].budgets == ("fast",)


def test_a_run_that_surely_takes_longer_than_its_limit_is_refused_before_it_loads(cli, monkeypatch):
    monkeypatch.setattr(measuring, "load", lambda *_: pytest.fail("it loads"))
    monkeypatch.setattr(measuring, "matmul_rate", lambda *_, **__: 1e10)  # a slow machine
    asked = ("profile", "-b", "0.1", "-r", "1", "--frames", "4")
    result = cli(*asked, "--time-limit", "20")
    assert result.code == 2 and result.out == ""
    assert "Hugging Face and budget 1.0 take at least " in result.err and "--time-limit is 20" in result.err
    assert "hint: use --time-limit " in result.err and "-m demo" in result.err


def test_what_a_long_run_takes_is_said_before_it(profile, monkeypatch):
    monkeypatch.setattr(measuring, "matmul_rate", lambda *_, **__: 1e6)
    result = profile("--time-limit", "1000")
    needed = r"the weights of \S+: needs about \d+ MiB of memory and about \d+ s on an idle machine "
    assert result.code == 0 and re.fullmatch(rf"{needed}\(at most 1000 s: --time-limit\)\n", result.err)
    assert profile("--time-limit", "1000", "-q").err == ""


def test_the_expected_duration_counts_rounds_and_rows_up_to_the_limit(tiny_folder, monkeypatch):
    def expected(limit_s=1e9, **settings):
        usual = {"budgets": (0.1,), "methods": ("random",), "warmups": 1, "repetitions": 1, "time_limit_s": limit_s}
        run = Profile(ProfileSettings(**usual | settings), ModelOptions(str(tiny_folder)), [Case(4, 112, 168)])
        return run.needs().expected

    monkeypatch.setattr(measuring, "matmul_rate", lambda *_, **__: 1e6)
    one = expected()
    assert expected(repetitions=3) == pytest.approx(2 * one, rel=0.01)
    assert one < expected(budgets=(0.1, 0.5)) < expected(budgets=(0.1, 0.5), methods=("random", "divprune")) < 2 * one
    assert expected(limit_s=one / 2) == one / 2
    monkeypatch.setattr(measuring, "matmul_rate", lambda *_, **__: 1e15)  # only measuring this rate takes time
    assert expected(repetitions=9) > 10 * 0.2


def test_progress_is_printed_in_plain_lines_if_stderr_is_no_terminal(profile, monkeypatch):
    monkeypatch.setattr("evoprune_cli.terminal.PLAIN_EVERY_S", 0.0)
    lines = profile().err.splitlines()
    assert any(re.fullmatch(r"\[0:\d\d\] round 1 of 1: evoprune -b 0.5, 4 frames of 112x168", line) for line in lines)
    assert all("\x1b" not in line and "\r" not in line for line in lines)
    assert profile("-q").err == ""
