"""Tests of `experiments.real`: its plan, its errors, resuming, and its page. In an environment with lmms-eval also a whole run."""

import importlib
import json
import shutil
import sys
from collections import namedtuple
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import httpx2
import pytest

from evoprune.bundled import DEMOS
from evoprune.errors import UsageError
from experiments.real import page
from experiments.real.__main__ import Failed, main, part
from experiments.real.plan import BASELINE, BENCHMARKS, Settings, download_bytes, hours, is_here, rows_of

real = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")
TRIAL = ("demo-scenes", "--benchmarks", "clips", "--frames", "8", "--methods", "evoprune random", "--budgets", "1,0.25")


def settings(**other):
    given = {
        "model": "demo",
        "rows": rows_of(["evoprune"], [1, 0.25]),
        "benchmarks": ("clips", "mvbench"),
        "questions": 4,
        "seed": 0,
    }
    return Settings(**given | other)


@pytest.fixture
def answers(monkeypatch):
    """The module that runs in lmms-eval's environment, with a stand-in for lmms-eval."""
    result = namedtuple("GenerationResult", ["text", "token_counts"], defaults=[None])
    base = type("lmms", (), {"__init__": lambda self: setattr(self, "task_dict", {})})
    for name, contents in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": result},
        "lmms_eval.api.model": {"lmms": base},
        "lmms_eval.evaluator": {"simple_evaluate": None},
        "lmms_eval.tasks": {"TaskManager": None},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "experiments.real.answers", raising=False)
    yield importlib.import_module("experiments.real.answers")
    sys.modules.pop("experiments.real.answers")


def test_rows_begin_with_the_unpruned_model():
    rows = rows_of(["evoprune", "random"], [1, 0.25, 0.1])
    assert rows[0] == BASELINE
    assert [row.name for row in rows[1:]] == ["evoprune 0.25", "random 0.25", "evoprune 0.1", "random 0.1"]
    assert hours(settings(rows=rows), 36, 100) == 5


def test_reports_have_no_paths():
    rows = rows_of(["idpruner:scorer=/home/me/scorer 7B,lam=0.5", "reuse+visionselector:scorer=a/b"], [0.1])
    names = ["idpruner:scorer=scorer 7B,lam=0.5 0.1", "reuse+visionselector:scorer=b 0.1"]
    assert [row.name for row in rows[1:]] == names
    text = json.dumps(page.new_report(settings(model="/home/me/model", rows=rows)))
    assert "/home" not in text and "a/b" not in text and '"model"' in text


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--benchmarks", "clip"], ("unknown benchmark 'clip'", "did you mean clips?")),
        (["demo", "--benchmarks", ","], ("no benchmark is named", "choose from")),
        (["demo", "--budgets", "1,2"], ("at most 1", "example")),
        (["demo", "--budgets", "x"], ("not a list of numbers", "example")),
        (["demo", "--questions", "0"], ("at least 1", "leave them out")),
        (["demo", "--methods", "evoprun"], ("unknown pruning method 'evoprun'", "did you mean evoprune")),
        (["nowhere/at/all", "--benchmarks", "clips"], ("neither a folder here nor a hub id", "a hub id is org/name")),
        (["EMPTY", "--benchmarks", "clips"], ("contains no config.json", "give a folder")),
        (["INCOMPLETE", "--benchmarks", "clips"], ("contains no tokenizer", "copy tokenizer.json")),
        (["demo", "--methods", "evoprune"], ("cannot be reached: no route", "check the network")),
        (
            ["demo", "--benchmarks", "clips", "--methods", "evoprune", "--python", "/nowhere"],
            ("cannot be run", "leave out --python"),
        ),
        (
            ["demo", "--benchmarks", "clips", "--methods", "evoprune", "--python", sys.executable],
            ("has no lmms-eval", "leave out"),
        ),
    ],
)
def test_errors_have_two_lines(arguments, says, tmp_path, capsys, monkeypatch):
    def unreachable(*_, **__):
        raise httpx2.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    if sys.executable in arguments and find_spec("lmms_eval"):
        pytest.skip("this Python has lmms-eval")
    for name in ("EMPTY", "INCOMPLETE"):
        (tmp_path / name).mkdir()
    shutil.copy(DEMOS["demo"].folder / "config.json", tmp_path / "INCOMPLETE")
    arguments = [str(tmp_path / word) if word in ("EMPTY", "INCOMPLETE") else word for word in arguments]
    assert main([*arguments, "-o", str(tmp_path / "results")]) not in (0, None)
    *_, what, hint = capsys.readouterr().err.splitlines()
    assert what.startswith("error: ") and says[0] in what
    assert hint.startswith("hint: ") and says[1] in hint


def test_a_folder_with_other_settings_is_refused(tmp_path):
    (tmp_path / "settings.json").write_text(json.dumps(settings().as_json()))
    settings().check(tmp_path)
    with pytest.raises(UsageError, match="other settings: questions, seed"):
        settings(questions=5, seed=1).check(tmp_path)


def test_sizes_come_from_the_hub(tmp_path, monkeypatch):
    files = SimpleNamespace(siblings=[SimpleNamespace(size=3), SimpleNamespace(size=None), SimpleNamespace(size=4)])
    seen = []
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda _, *words, **how: seen.append((words, how)) or files
    )
    assert download_bytes(BENCHMARKS["mvbench"]) == 7
    assert seen[0][0] == ("OpenGVLab/MVBench",) and seen[0][1]["revision"] == "video"
    home = {"HF_HOME": str(tmp_path)}
    assert is_here(BENCHMARKS["clips"], home) and not is_here(BENCHMARKS["mlvu"], home)
    (tmp_path / "mlvu").mkdir()
    assert is_here(BENCHMARKS["mlvu"], home)


def test_a_failed_part_is_recorded_and_tried_again(tmp_path, capsys):
    report = page.new_report(settings())

    def fail():
        raise Failed("the hub closed\nhint: try again")

    part(report, "verify", tmp_path / "verify.json", fail)
    assert "error: the hub closed\nhint: try again" in capsys.readouterr().err
    assert "the hub closed hint: try again" in (tmp_path / "report.md").read_text()
    done = {"verdict": "held", "checks": [{"name": "logits", "state": "held", "says": "equal"}]}
    part(report, "verify", tmp_path / "verify.json", lambda: done)
    part(report, "verify", tmp_path / "verify.json", fail)  # is not run again
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["parts"]["verify"] == done and not kept["failed"]
    assert "| logits | held: equal |" in (tmp_path / "report.md").read_text()


def sample(number, right, error=None):
    counts = {"visual_tokens_kept": 10 + number, "time_ms": {"ttft_model": 500.0}}
    return {"video": f"{number % 12}", "id": str(number), "right": right, "error": error, "counts": counts}


def test_the_page_has_paired_differences(tmp_path):
    report = page.new_report(settings(model="demo-scenes"))
    baseline = [sample(i, i % 4 != 0) for i in range(24)]
    pruned = [sample(i, i % 4 == 1, "the file is damaged" if i == 0 else None) for i in range(24)]
    rows = {"none": {"official": {}, "samples": baseline}, "evoprune 0.25": {"official": {}, "samples": pruned}}
    report["parts"]["clips"] = {"task": "evoprune_clips", "asked": 24, "of": 60, "rows": rows}
    page.write_report(tmp_path, report)
    text = (tmp_path / "report.md").read_text()
    assert "24 of 60 questions about 12 inputs" in text and page.DEMO_NOTE in text
    assert "| none | 75.0 | - | 22 | 0.50 |" in text and "| evoprune 0.25 | 25.0 | -50.0 (" in text
    assert "1 questions could not be asked" in text
    kept = json.loads((tmp_path / "report.json").read_text())["parts"]["clips"]["rows"]
    mean, low, high = kept["evoprune 0.25"]["difference"]
    assert low < mean == -0.5 < high and kept["none"]["difference"] is None


def test_answers_survive_a_kill(answers, tmp_path):
    path = tmp_path / "clips.answers.jsonl"
    first = {"row": "none", "task": "t", "doc": 0, "text": "é", "video": "a", "error": None, "counts": None}
    kept = answers.Answers(path)
    kept.add(first)
    with path.open("ab") as file:
        file.write('{"row": "none", "task": "t", "doc": 1, "text": "é'.encode()[:-1])
    again = answers.Answers(path)
    assert len(again) == 1 and again.get("none", "t", 0) == first and again.get("none", "t", 1) is None
    again.add(first | {"doc": 1})
    assert len(answers.Answers(path)) == 2


@pytest.mark.parametrize(
    ("judged", "right"),
    [
        ({"right": 1.0}, True),
        ({"right": 0.0}, False),
        ({"videomme_perception_score": {"score": 1.0, "pred_answer": "A", "answer": "A"}}, True),
        ({"mvbench_accuracy": {"pred_answer": "(A) red", "gt_answer": "A", "score": 0}}, False),
        ({"mlvu_percetion_score": {"pred_answer": "B", "answer": "B"}}, True),
        ({"lvb_acc": {"parsed_pred": "C", "answer": "B"}}, False),
    ],
)
def test_lmms_eval_s_judgements(answers, judged, right):
    """The forms of lmms-eval 0.7.3."""
    assert answers.is_right(judged) is right
    with pytest.raises(ValueError, match="unknown form"):
        answers.is_right({"x": "yes"})


def test_a_damaged_input_is_a_wrong_answer_and_a_wrong_setting_ends_the_run(answers, tmp_path):
    from evoprune.errors import VideoError

    def model(problem):
        def asked(_):
            raise problem
            yield

        return SimpleNamespace(answers=asked)

    rows = [{"name": "none", "method": "none", "budget": 1.0}]
    request = SimpleNamespace(args=("?", {}, lambda doc: [doc], 0, "t", "test"))
    subject = answers.Rows({"rows": rows}, answers.Answers(tmp_path / "a.jsonl"))
    subject.task_dict["t"] = {"test": ["clips/a.mp4"]}
    subject._models["none"] = model(VideoError("a.mp4 is damaged"))
    assert [result.text for result in subject.generate_until([request])] == [""]
    kept = answers.Answers(tmp_path / "a.jsonl").get("none", "t", 0)
    assert kept["error"].startswith("a.mp4 is damaged") and kept["video"] == "a.mp4"
    other = answers.Rows({"rows": rows}, answers.Answers(tmp_path / "b.jsonl"))
    other.task_dict, other._models["none"] = subject.task_dict, model(UsageError("wrong"))
    with pytest.raises(UsageError, match="wrong"):
        other.generate_until([request])


@real
@pytest.mark.full
def test_a_whole_run(tmp_path, capsys):
    """Runs everything with a demo model, then again from its results, after half of the answers were lost."""
    command = [*TRIAL, "--questions", "6", "-o", str(tmp_path), "--python", sys.executable]
    assert main(command) == 0
    assert "asking one question without pruning, to estimate" in capsys.readouterr().err
    report = json.loads((tmp_path / "report.json").read_text())
    assert not report["failed"] and [*report["parts"]] == ["verify", "speed", "clips"]
    rows = report["parts"]["clips"]["rows"]
    assert [*rows] == ["none", "evoprune 0.25", "random 0.25"]
    assert all(row["questions"] == 6 for row in rows.values())
    assert rows["evoprune 0.25"]["kept"] * 4 == pytest.approx(rows["none"]["kept"], rel=0.1)
    path = tmp_path / "clips.answers.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:7]) + lines[7][:20])
    (tmp_path / "clips.json").unlink()
    capsys.readouterr()
    assert main(command) == 0
    shown = capsys.readouterr().err
    assert "clips: 7 of 18 answers" in shown and "estimate" not in shown
    again = json.loads((tmp_path / "report.json").read_text())["parts"]["clips"]["rows"]
    assert {name: row["right"] for name, row in again.items()} == {name: row["right"] for name, row in rows.items()}
