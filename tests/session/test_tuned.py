"""Tuned settings on disk, and what a budget of "tuned" becomes."""

import json
import os
import stat
import subprocess
import sys
from dataclasses import replace

import pytest

import evoprune
from evoprune.errors import UsageError
from evoprune.session.loading.model import load_model
from evoprune.session.options import PruneOptions
from evoprune.session.saved import folder, matching, never_tuned, tuned
from evoprune.video_qa import VideoQA
from tests.threads import one_thread  # noqa: F401
from tests.tuned import ORIGIN, SETTING, tune

A, B, C = ("a" * 64, "ab" * 32, "c" * 64)
CLIP, QUESTION = "samples/square.mp4", "What colour is the square?"


def test_saved_found_listed_and_removed(config):
    assert tuned.find(A) is None and tuned.every() == []
    other = replace(SETTING, model="other", created_utc="2026-04-01T12:00:00+00:00")
    assert tuned.save(A, SETTING) == config / "tuned" / f"{A}.json"
    tuned.save(B, other)
    assert tuned.find(A) == SETTING and tuned.every() == [(B, other), (A, SETTING)]
    assert {stat.S_IMODE(folder.stat().st_mode) for folder in (config, config / "tuned")} == {0o700}
    tuned.save(A, other)
    assert tuned.find(A) == other and len(os.listdir(config / "tuned")) == 2
    tuned.remove(A)
    assert tuned.find(A) is None
    with pytest.raises(UsageError, match="cannot remove"):
        tuned.remove(A)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"EVOPRUNE_CONFIG_DIR": "~/here", "XDG_CONFIG_HOME": "/x"}, "/home/u/here"),
        ({"XDG_CONFIG_HOME": "/x"}, "/x/evoprune"),
        ({}, "/home/u/.config/evoprune"),
    ],
)
def test_where_they_are(monkeypatch, variables, expected):
    for name in ("EVOPRUNE_CONFIG_DIR", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"HOME": "/home/u"} | variables).items():
        monkeypatch.setenv(name, value)
    assert str(folder()) == expected


WRONG = [
    ("method", "magic", "no pruning method 'magic'"),
    ("method", "evoprune:size=3", "no argument 'size'"),
    ("budget", 1.5, "not a share"),
    ("created_utc", "yesterday", "no date"),
    ("low", 1.01, "not a share"),
    ("agree", "0.9", "not a number"),
    ("first_token", 0, "above 0"),
    ("videos", 0, "above 0"),
    ("questions", 1.5, "not a whole number"),
    ("model", None, "not a text"),
]


@pytest.mark.parametrize(("name", "value", "message"), WRONG)
def test_what_cannot_be_is_refused_on_both_ways(config, name, value, message):
    with pytest.raises(UsageError, match=message):
        replace(SETTING, **{name: value})
    path = tuned.save(A, SETTING)
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(UsageError, match=f"{A}.json is damaged: .*{message}") as caught:
        tuned.find(A)
    assert "--forget-tuned aaaaaaaaaaaa" in caught.value.hint and "evoprune tune" in caught.value.hint


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": "evoprune/tuned@2"}', '{"schema": "evoprune/tuned@1"}', "{", "NaN"]
)
def test_a_damaged_file_is_named_and_never_ignored(config, content):
    tuned.save(B, SETTING)
    tuned.save(A, SETTING).write_text(content)
    with pytest.raises(UsageError, match="is damaged"):
        tuned.find(A)
    (good, _), (bad, problem) = tuned.every()
    assert (good, bad) == (B, A) and isinstance(problem, UsageError)


def test_fields_of_later_versions_are_ignored(config):
    path = tuned.save(A, SETTING)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"later": 1}))
    assert tuned.find(A) == SETTING


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EVOPRUNE_CONFIG_DIR", str(tmp_path / "file"))
    with pytest.raises(UsageError, match="cannot write") as caught:
        tuned.save(A, SETTING)
    assert "EVOPRUNE_CONFIG_DIR" in caught.value.hint
    assert [never_tuned("model", lambda: A) for _ in range(2)] == [True, True]


def test_which_settings_a_text_names(config):
    for fingerprint, name in ((A, "x"), (B, "x"), (C, "y")):
        tuned.save(fingerprint, replace(SETTING, model=name))
    assert {text: [f for f, _ in matching(text)] for text in ("y", "aaa", "ab", "all")} == {
        "y": [C], "aaa": [A], "ab": [B], "all": [A, B, C],
    }  # fmt: skip
    for text, message in (
        ("x", "names 2 tuned settings: aaaaaaaaaaaa, abababababab"),
        ("z", "no tuned setting"),
        ("", "no"),
    ):
        with pytest.raises(UsageError, match=message):
            matching(text)


def test_a_model_is_said_to_be_untuned_once_and_then_costs_nothing(config):
    assert never_tuned("model", lambda: A)
    assert not never_tuned("model", lambda: pytest.fail("the weights were read"))
    tuned.save(B, SETTING)
    assert not never_tuned("another", lambda: B)


def test_it_imports_no_torch():
    code = "import sys, evoprune.session.saved; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- a budget of "tuned" ---


@pytest.mark.parametrize("more", [{"method": "divprune"}, {"method_args": {"depth": 0.5}}])
@pytest.mark.parametrize("kind", [PruneOptions, evoprune.EvoPrune])
def test_it_holds_the_method_too(kind, more):
    with pytest.raises(UsageError, match="budget tuned holds the method too"):
        kind(budget="tuned", **more)


def test_it_becomes_plain_values_once_and_reports_say_so(config):
    tune("demo")
    qa = VideoQA.load(budget="tuned", seed=3)
    assert (
        qa.engine.options == PruneOptions(0.2, "evoprune:depth=0.25", seed=3) and qa.engine.method.encoder.depth == 0.25
    )
    assert "method 'evoprune:depth=0.25', budget 0.2" in repr(qa)
    report = qa.encode(CLIP).ask(QUESTION).report
    given = VideoQA(qa.loaded, budget=0.2, method="evoprune", method_args={"depth": 0.25}).encode(CLIP).report
    assert report.pruning.tuned == ORIGIN and given.pruning.tuned is None
    assert (report.pruning.args, report.pruning.budget) == (given.pruning.args, 0.2)
    assert report.pruning.visual_tokens_kept == given.pruning.visual_tokens_kept
    assert "evoprune:depth=0.25 -b 0.2, tuned 2026-03-01: " in str(report).replace("\n", " ")
    assert VideoQA(qa.loaded, budget="tuned").engine.tuned == SETTING
    assert qa.unpruned().engine.tuned is None


@pytest.mark.parametrize("state", ["never tuned", "damaged", "random"])
def test_it_is_refused_before_weights_are_read(config, saved, monkeypatch, state):
    monkeypatch.setattr("evoprune.session.loading.model.load_weights", lambda *_: pytest.fail("weights were read"))
    message = f"no tuned setting for {saved}"
    if state == "damaged":
        (config / "tuned" / f"{tune(saved)}.json").write_text("{")
        message = "is damaged"
    if state == "random":
        message = "are random"
    with pytest.raises(UsageError, match=message) as caught:
        VideoQA.load(saved, budget="tuned", load_format="dummy" if state == "random" else "auto")
    assert caught.value.hint and (state != "never tuned" or f"evoprune tune VIDEO... -m {saved}" in caught.value.hint)


def test_a_loaded_model_that_was_never_tuned(config):
    with pytest.raises(UsageError, match="no tuned setting for demo"):
        VideoQA(load_model("demo"), budget="tuned")


def test_the_model_is_found_once(config, saved, monkeypatch):
    from evoprune.session.loading import found

    tune(saved)
    calls, locate = [], found.locate
    monkeypatch.setattr(found, "locate", lambda *args, **more: calls.append(args) or locate(*args, **more))
    VideoQA.load(saved, budget="tuned")
    assert len(calls) == 1


def test_what_takes_no_name_says_where_tuned_works():
    with pytest.raises(UsageError, match="budget 'tuned' does not work here") as caught:
        evoprune.encode(None, None, None, budget="tuned")
    assert "tuned works with models" in caught.value.hint
