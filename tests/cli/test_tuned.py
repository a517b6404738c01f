"""Tuned settings on the command line: where `-b tuned` works, where it is refused, what is said of models never tuned."""

import json
from dataclasses import replace

import pytest

from evoprune.session.saved import recipes, tuned
from tests.recipes import kept
from tests.tuned import ORIGIN, SETTING, tune

CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"
METHOD = "evoprune:depth=0.25"


@pytest.fixture(autouse=True)
def new_folder(config):
    """Every test has a folder of settings of its own."""


def test_ask_answers_with_the_tuned_method_and_says_so(cli, monkeypatch):
    tune("demo")
    pruning = cli("ask", CLIP, QUESTION, "-b", "tuned", "--json").record["pruning"]
    assert (pruning["method"], pruning["budget"], pruning["tuned"]) == (METHOD, 0.2, ORIGIN)
    assert cli("ask", CLIP, QUESTION, "--json").record["pruning"]["tuned"] is None
    monkeypatch.setenv("EVOPRUNE_BUDGET", "tuned")
    assert "-b 0.2, tuned 2026-03-01: " in " ".join(cli("ask", CLIP, QUESTION, "--compare").err.split())


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "error: no tuned setting for demo\nhint: evoprune tune VIDEO... -m demo"),
        (("--method", "divprune"), "error: budget tuned holds the method too\n"),
        (("--method-arg", "depth=0.5"), "error: budget tuned holds the method too\n"),
    ],
)
@pytest.mark.parametrize(
    "command", [("ask", CLIP, QUESTION), ("batch", CLIP, "-Q", "?", "-o", "-")], ids=["ask", "batch"]
)
def test_refused(cli, command, args, message):
    result = cli(*command, "-m", "demo", "-b", "tuned", *args)
    assert result.code == 2 and result.err.startswith(message)


def test_profile_refuses_and_says_where_to_look(cli):
    result = cli("profile", "-b", "tuned", "-q")
    assert result.code == 2 and "evoprune inspect shows its budget and method" in result.err


@pytest.mark.full
def test_a_batch_goes_on_unless_the_model_was_tuned_anew(cli, tmp_path):
    tune("demo")
    run = ("batch", CLIP, "-Q", QUESTION, "-m", "demo", "-b", "tuned", "-o", tmp_path / "out.jsonl")
    assert cli(*run).code == 0
    record = json.loads((tmp_path / "out.jsonl").read_text())
    settings = record["batch"]["settings"]
    assert (settings["method"], settings["budget"]) == (METHOD, 0.2) and "tuned" not in settings
    assert record["pruning"]["tuned"] == ORIGIN
    assert "1 of them before" in cli(*run, "--resume").err
    tune("demo", created_utc="2026-05-01T00:00:00+00:00")  # another day, the same values
    assert cli(*run, "--resume").code == 0
    tune("demo", budget=0.3)
    result = cli(*run, "--resume")
    assert result.code == 2 and "begun with other settings: budget was 0.2, is 0.3" in result.err


@pytest.mark.full
def test_eval_has_a_row_for_it(cli, tmp_path):
    tune("demo")
    run = ("eval", "--data", "samples/questions.jsonl", "--limit", "1", "--frames", "4", "-n", "2", "-b", "tuned,0.25")
    document = cli(*run, "-o", tmp_path / "run", "--json").record
    rows = {row["name"]: row for row in document["rows"] if row["group"] == "all"}
    assert list(rows) == ["full", f"{METHOD} -b 0.2 (tuned)", "evoprune -b 0.25"]
    row = rows[f"{METHOD} -b 0.2 (tuned)"]
    assert (row["method"], row["budget"], row["tuned"]) == (METHOD, 0.2, True)
    assert document["settings"]["tuned"] == [METHOD, 0.2] and document["settings"]["budgets"] == [0.25]
    assert cli(*run, "--resume", tmp_path / "run").code == 0
    tune("demo", budget=0.3)
    assert "tuned was ['evoprune:depth=0.25', 0.2]" in cli(*run, "--resume", tmp_path / "run").err
    assert cli(*run[:-1], "tuned", "--method", "divprune").code == 2


@pytest.mark.full
def test_inspect_counts_with_the_tuned_budget(cli):
    assert "error: no tuned setting for demo\n" in cli("inspect", CLIP, "-b", "tuned").err
    hub_id = "Qwen/Qwen2.5-VL-3B-Instruct"
    assert f"the weights of {hub_id} are not on this" in cli("inspect", CLIP, "-b", "tuned", "-m", hub_id).err
    tune("demo")
    memory = cli("inspect", CLIP, "-b", "tuned", "--json").record["memory"]
    assert (memory["method"], memory["budget"], memory["visual_tokens"]) == (METHOD, 0.2, 29)


def test_inspect_lists_them_and_forgets_them(cli, config):
    first, second = "a" * 64, "b" * 64
    for fingerprint, name in ((first, "one"), (second, "two"), ("c" * 64, "two")):
        tuned.save(fingerprint, replace(SETTING, model=name))
    (config / "tuned" / f"{second}.json").write_text("{")
    listed = {setting["fingerprint"]: setting for setting in cli("inspect", "--json").record["tuned"]}
    assert (listed[first]["model"], listed[first]["method"], listed[first]["damaged"]) == ("one", METHOD, None)
    assert listed[second]["model"] is None and "is damaged" in listed[second]["damaged"]
    text = cli("inspect").out
    assert f"  aaaaaaaaaaaa  one\n    {METHOD} -b 0.2, agreement 97.0% (at least 95.5%), 2026-03-01\n" in text
    assert "  bbbbbbbbbbbb  unknown\n    the tuned setting" in text
    assert cli("inspect", "--forget-tuned", "three").code == 2
    assert "--forget-tuned is not about a video" in cli("inspect", CLIP, "--forget-tuned", "one").err
    record = cli("inspect", "--forget-tuned", "bbb", "--json").record
    assert [setting["fingerprint"] for setting in record["forgotten"]] == [second] and len(record["tuned"]) == 2
    assert "forgotten\n  aaaaaaaaaaaa  one\n" in cli("inspect", "--forget-tuned", "one").out
    tuned.save(first, replace(SETTING, model="two"))
    result = cli("inspect", "--forget-tuned", "two")
    assert result.code == 2 and "names 2 tuned settings" in result.err
    assert cli("inspect", "--forget-tuned", "all").code == 0 and tuned.every() == []


def test_recipes_are_listed_and_forgotten_with_them(cli, config):
    first, second = "a" * 64, "b" * 64
    tuned.save(first, SETTING)
    for fingerprint in (first, second):
        recipes.save(fingerprint, kept())
    record = cli("inspect", "--json").record
    assert [(each["fingerprint"], each["model"], each["damaged"]) for each in record["recipes"]] == [
        (first, "tiny", None), (second, "tiny", None),
    ]  # fmt: skip
    assert (
        "  bbbbbbbbbbbb  tiny\n    recipe of operations from 1 question about 2 videos, 2026-03-01\n"
        in cli("inspect").out
    )
    forgotten = cli("inspect", "--forget-tuned", "aaa", "--json").record["forgotten"]
    assert [each["fingerprint"] for each in forgotten] == [first, first] and tuned.every() == []
    assert [fingerprint for fingerprint, _ in recipes.every()] == [second]
    assert cli("inspect", "--forget-tuned", "tiny").code == 0 and recipes.every() == []


NOTE = "note: this model was never tuned: evoprune tune VIDEO... -m {} shows what pruning changes in its answers"


@pytest.mark.full
@pytest.mark.parametrize("command", ["ask", "batch"])
def test_a_real_model_is_said_once_to_be_untuned(cli, tiny_folder, tmp_path, command):
    quick = ("-m", tiny_folder, "-n", "1", "--frames", "2")
    if command == "ask":
        run = ("ask", CLIP, QUESTION, *quick)
    else:
        run = ("batch", CLIP, "-Q", QUESTION, *quick, "--overwrite", "-o", tmp_path / "out.jsonl")
    for flags in (["-q"], ["-b", "full"], ["--load-format", "dummy"]):
        assert "never tuned" not in cli(*run, *flags).err
    assert NOTE.format(tiny_folder) in " ".join(cli(*run).err.split())
    assert "never tuned" not in cli(*run).err


@pytest.mark.full
def test_nothing_of_the_kind_is_said_of_others(cli, tiny_folder):
    assert "never tuned" not in cli("ask", CLIP, QUESTION).err
    tune(tiny_folder)
    assert "never tuned" not in cli("ask", CLIP, QUESTION, "-m", tiny_folder, "-n", "1", "--frames", "2").err
