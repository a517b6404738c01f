"""`evoprune tune`: its output, files and refused inputs, and that the options it finds work."""

import json
import re
from xml.etree import ElementTree

import pytest

from evoprune.bench.tune import Trial
from evoprune.errors import UsageError
from evoprune_cli.terminal import Terminated

CLIPS = ("samples/square.mp4", "samples/arrivals.webm")
LOW = ("--agree", "0.01")


@pytest.fixture
def tune(cli, tiny_folder):
    """The command on the tiny model and two clips, unless `args` say otherwise."""

    def call(*args, videos=CLIPS, **settings):
        quick = ("-m", str(tiny_folder), "--dtype", "fp32", "--frames", "4", "-b", "0.2", "-Q", "What happens?")
        return cli("tune", *map(str, videos), *quick, *map(str, args), **settings)

    return call


def test_a_table_a_chart_and_options_that_are_used(tune, cli, tiny_folder, tmp_path):
    chart, output = tmp_path / "t.svg", tmp_path / "t.json"
    result = tune("--agree", "0.05", "--chart", chart, "-o", output)
    assert result.code == 0 and result.err == "" and all(len(line) <= 80 for line in result.out.splitlines())
    document = json.loads(output.read_text())
    assert document["schema"] == "evoprune/tune@1" and len(document["rows"]) == 5 and document["notes"] == []
    name = document["recommended"]
    assert f"* {name} " in result.out and f"recommended: {name}" in " ".join(result.out.split())
    assert "agreement" in "".join(ElementTree.parse(chart).getroot().itertext())
    options = document["options"]
    assert f"{options['method']} -b {options['budget']:g}" == name
    use, last = result.out.splitlines()[-2:]
    assert use == "use these options:"
    assert last == f"-b {options['budget']:g} --method {options['method']}"
    answer = cli("ask", CLIPS[0], "What?", "-m", str(tiny_folder), "--frames", "4", *last.split(), "-n", "2", "--json")
    pruning = answer.record["pruning"]
    assert pruning["budget"] == 0.2 and pruning["method"] == options["method"]


@pytest.mark.full
def test_a_recipe_of_operations_that_is_used(tune, cli, tiny_folder, tmp_path):
    recipe = f"operations:recipe={tmp_path / 't.json'}"
    ask = ("ask", CLIPS[0], "What?", "-m", str(tiny_folder), "--frames", "4", "-n", "2", "--method")
    assert "needs a recipe" in cli(*ask, "operations", "-b", "0.3").err
    assert "needs a recipe" in tune("--method", "evoprune+operations").err
    assert "there is no file for it" in tune("--operations").err
    result = tune("--operations", "-o", tmp_path / "t.json")
    assert result.code == 0 and result.err == "" and all(len(line) <= 80 for line in result.out.splitlines())
    document = json.loads((tmp_path / "t.json").read_text())
    assert document["schema"] == "evoprune/tune-operations@1" and document["complete"]
    assert "\n-b 0.2 " in result.out and "--method operations:recipe=FILE" in result.out
    assert cli(*ask, recipe, "-b", "0.3", "--json").record["pruning"]["language_work"]
    for more in (("--method", "random"), ("--agree", "0.5"), ("--chart", "a.svg")):
        assert "--operations finds one recipe for all budgets" in tune("--operations", *more).err
    short = ("--operations", "--time-limit", "0.01")
    made = tune(*short, "--json", videos=CLIPS[:1])
    assert made.code == 0 and not made.record["complete"] and "so the operations were not ordered" in made.err
    assert "no recipe was found" in tune(*short, "-o", tmp_path / "u.json", videos=CLIPS[:1]).out
    assert "is not a complete" in cli(*ask, recipe.replace("t.json", "u.json"), "-b", "0.3").err


QUICK = ("-m", "demo", "--frames", "4", "-b", "0.2", "--method", "random", "--agree", "0.01")
KNOWN, UNKNOWN = ("-Q", "What colour is the square?"), ("-Q", "Why do they leave?")


@pytest.mark.parametrize(
    ("own", "questions", "reason"),
    [
        (True, KNOWN, "the demo models know only generated clips"),
        (False, (*UNKNOWN, *KNOWN), "a question contains words that the demo model was not trained on"),
        (False, KNOWN, None),
    ],
)
def test_answers_of_a_demo_that_mean_nothing(cli, foreign, own, questions, reason):
    result = cli("tune", foreign if own else CLIPS[0], *questions, *QUICK, "--json")
    notes = [note for note in result.record["notes"] if "mean nothing" in note]
    assert result.code == 0 and len(notes) == (reason is not None)
    if reason:
        assert notes[0].startswith(reason) and notes[0].endswith("for a real model: -m Qwen/Qwen2.5-VL-3B-Instruct")


def test_none_passes(tune):
    result = tune("--agree", "0.99")
    assert result.code == 6 and all(len(line) <= 80 for line in result.out.splitlines())
    *_, advice = result.out.split("\n\n")
    assert re.fullmatch(
        "nothing faster certainly agrees on 99% of the tokens; the best setting:\n"
        "-b 0.2 --method \\S+\nto be certain, do not prune:\n-b full\n",
        advice,
    )
    assert "cannot prove that 99% agree" in result.err
    assert "no setting certainly agrees on 99% of the tokens; the best is" in " ".join(result.out.split())


@pytest.mark.full
@pytest.mark.parametrize(("last", "compared", "videos"), [(9, 3, 2), (8, 5, 1)])
def test_an_interruption_leaves_what_is_known(tune, monkeypatch, last, compared, videos):
    """Trials on the second video count if there are enough of them to compare settings."""
    tried = []

    def broken(*columns, **trial):  # finished trials are created by keyword
        tried.extend([trial] * bool(trial))
        if len(tried) == last and trial:
            raise Terminated
        return Trial(*columns, **trial)

    monkeypatch.setattr("evoprune.bench.tune.Trial", broken)
    result = tune(*LOW, "--json")
    assert result.code == 143 == result.record["error"]["code"]
    assert (
        [row["videos"] for row in result.record["rows"]].count(videos)
        == compared
        == result.record["compared"]["settings"]
    )
    assert result.record["compared"]["videos"] == list(CLIPS[:videos])
    assert not any("the time" in note for note in result.record["notes"])


@pytest.mark.full
def test_questions_of_a_file(tune, tmp_path):
    path = tmp_path / "questions.txt"
    path.write_text("\ufeffWho?\n\n  Where? \nWho?\n", encoding="utf-8")
    assert tune(*LOW, "--questions", path, "--json").record["settings"]["questions"] == [
        "What happens?",
        "Who?",
        "Where?",
    ]
    for content in (b"\xff\xfe\x00", b"\n \n"):
        path.write_bytes(content)
        result = tune("--questions", path)
        assert result.code == 2 and str(path) in result.err


@pytest.mark.parametrize(
    "wrong",
    [
        ("--agree", "98"), ("--time-limit", "0"), ("-Q", " "), ("--chart", "t.png"), ("-o", "/nowhere/t.json"), ("--start", "x"),
    ],
)  # fmt: skip
def test_wrong_options_are_refused_before_weights_are_read(tune, monkeypatch, wrong):
    monkeypatch.setattr("evoprune.bench.tune.Tuning.load", lambda *_: pytest.fail("weights are read"))
    result = tune(*wrong)
    assert result.code == 2 and result.out == "" and result.err.count("\n") <= 2
    assert UsageError.exit_code == 2


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("a.mp4", "b.mp4"), "no such file: a.mp4, b.mp4\n"),
        ((CLIPS[0], "What is it?"), "put -Q before each question: "),
    ],
)
def test_words_that_are_no_videos(cli, words, problem):
    result = cli("tune", *words, "-m", "demo")
    assert (result.code, result.out) == (3, "") and problem in result.err


def test_the_time_limit_is_kept(tune):
    result = tune(*LOW, "--time-limit", "0.001", "--json", "-b", "0.5,0.2")
    assert result.code == 6 and result.record["rows"] == [] and result.record["recommended"] is None
    assert result.record["videos"]["answered"] == 1  # the minimum: one video, unpruned
