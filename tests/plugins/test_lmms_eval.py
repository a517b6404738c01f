"""Test the lmms-eval model with a stand-in for the parts of lmms-eval that it uses, and in lmms-eval itself if installed.

lmms-eval needs an older PyAV than the other tests. `python -m experiments.environments lmms-eval` creates an environment for it.
"""

import importlib
import json
import sys
from collections import namedtuple
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from PIL import Image

from evoprune.errors import UsageError
from evoprune.report import Report
from evoprune.session import Answer
from evoprune.video_qa import VideoQA

CLIPS = "samples/square.mp4", "samples/three.mp4"
QUESTIONS = "What colour is the square?", "How many shapes are there?"
HERE = Path(__file__).parent
real = pytest.mark.skipif(find_spec("lmms_eval") is None, reason="lmms-eval is not installed")


@dataclass
class TokenCounts:
    input_tokens: int | None = None
    output_tokens: int | None = None
    reasoning_tokens: int | None = None

    def to_dict(self):
        return {name: value for name, value in vars(self).items() if value is not None and name.endswith("tokens")}


GenerationResult = namedtuple("GenerationResult", ["text", "token_counts"], defaults=[None])


class Lmms:
    """The parts of lmms-eval's base class that a model uses."""

    is_simple = True

    def __init__(self):
        self.task_dict, self.cached = {}, []
        self.cache_hook = SimpleNamespace(add_partial=lambda *told: self.cached.append(told))

    rank, world_size = 0, 1


@pytest.fixture
def model_class(monkeypatch):
    """The class, built on the stand-in. `test_in_lmms_eval` checks that lmms-eval 0.7.3 has the same names."""
    for name, contents in {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult, "TokenCounts": TokenCounts},
    }.items():
        module = ModuleType(name)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "evoprune_lmms_eval.model", raising=False)
    yield importlib.import_module("evoprune_lmms_eval.model").EvoPruneQwen25VL
    sys.modules.pop("evoprune_lmms_eval.model")


def request(model, question, visuals, **settings):
    """Return a request as lmms-eval makes it for a simple model."""
    docs = model.task_dict.setdefault("task", {}).setdefault("test", [])
    docs.append(visuals)
    return SimpleNamespace(args=(question, settings, lambda doc: doc, len(docs) - 1, "task", "test"))


def test_answers_and_what_they_took(model_class, monkeypatch):
    encoded, encode = [], VideoQA.encode
    monkeypatch.setattr(VideoQA, "encode", lambda qa, path, **how: encoded.append(path[0]) or encode(qa, path, **how))
    model = model_class(pretrained="demo", budget=0.25, method="evoprune", frames=8, device="cpu", batch_size="1")
    asked = [(q, clip) for clip in CLIPS for q in QUESTIONS]
    given = [request(model, q, [clip], max_new_tokens=16, temperature=0, do_sample=False) for q, clip in asked]
    results = model.generate_until(given)
    assert encoded == list(CLIPS)  # once for consecutive questions
    qa = VideoQA.load("demo", budget=0.25)
    assert [r.text for r in results] == ["".join(encode(qa, c, frames=8).ask(q)) for q, c in asked]
    cached = [("generate_until", g.args[:2], r.text) for g, r in zip(given, results, strict=True)]
    assert model.cached == cached
    first, second = (json.loads(json.dumps(r.token_counts.to_dict())) for r in results[:2])
    assert first["visual_tokens_in"] == 96 and first["visual_tokens_kept"] == 24 < first["input_tokens"]
    assert first["output_tokens"] >= 1 and 0 < first["encoder_live_share"] < 1 and first["warnings"] == []
    assert all(first["time_ms"][stage] > 0 for stage in ("read", "preprocess", "encode", "prefill", "generate"))
    assert second["time_ms"]["encode"] == 0 and second["time_ms"]["prefill"] > 0


def test_an_answer_ends_at_the_task_s_stop_words(model_class, monkeypatch):
    model = model_class(pretrained="demo")

    def ask(*_, **__):
        report = Report(answer="")

        def pieces():
            for character in "yes, no. Perhaps":
                report.answer += character
                yield character

        return Answer(report, pieces())

    monkeypatch.setattr("evoprune.session.asking.EncodedInputs.ask", ask)
    given = [request(model, "?", [CLIPS[0]], until=stops) for stops in (["no", ","], ". P", ["never"], [])]
    assert [r.text for r in model.generate_until(given)] == ["yes", "yes, no", "yes, no. Perhaps", "yes, no. Perhaps"]


def test_a_task_s_settings_override_the_model_s(model_class, monkeypatch):
    """A temperature of 0 and a top_k of 0 do too. A top_p of 0, which tasks state, means nothing."""
    seen = []

    def ask(_self, _question, **options):
        seen.append(tuple(options[name] for name in ("temperature", "top_k", "top_p", "max_new_tokens")))
        return Answer(Report(answer="yes"), iter(["yes"]))

    monkeypatch.setattr("evoprune.session.asking.EncodedInputs.ask", ask)
    model = model_class(pretrained="demo", temperature=0.5, top_k=3, top_p=0.9, max_new_tokens=7)
    own = 0.5, 3, 0.9, 7
    cases = [
        ({}, own),
        ({"temperature": None, "top_k": None, "top_p": None, "max_new_tokens": None}, own),
        ({"temperature": 0, "top_k": 0}, (0, 0, 0.9, 7)),
        ({"temperature": 0.0, "top_p": 0}, (0, 3, 0.9, 7)),
        ({"top_k": 0}, (0.5, 0, 0.9, 7)),
        ({"temperature": 0.7, "top_k": 5, "top_p": 0.6, "max_new_tokens": 9}, (0.7, 5, 0.6, 9)),
        ({"temperature": 0.7, "do_sample": False}, (0, 3, 0.9, 7)),
        ({"do_sample": False}, (0, 3, 0.9, 7)),
        ({"do_sample": True}, own),
    ]
    model.generate_until([request(model, "?", [CLIPS[0]], **settings) for settings, _ in cases])
    assert seen == [right for _, right in cases]


@pytest.mark.full
def test_pictures_and_several_inputs(model_class, tmp_path):
    picture = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50)
    picture.save(tmp_path / "a.png")
    shown = [
        [picture],
        [CLIPS[0], picture],
        [picture.convert("CMYK"), picture.convert("LA")],
        [str(tmp_path / "a.png")],
    ]
    model = model_class(pretrained="demo", pictures="true", budget=0.5)
    first, both, two, file = model.generate_until([request(model, "What?", each, max_new_tokens=4) for each in shown])
    qa = VideoQA.load("demo", budget=0.5)
    assert first.text == file.text == qa.ask(tmp_path / "a.png", "What?", max_new_tokens=4).text
    assert both.text == qa.ask([CLIPS[0], tmp_path / "a.png"], "What?", max_new_tokens=4).text
    assert two.token_counts.measured["visual_tokens_in"] == 2 * first.token_counts.measured["visual_tokens_in"]
    for wrong, says in (([], "shows nothing"), ([3], "shows int")):
        with pytest.raises(UsageError, match=says):
            model.generate_until([request(model, "What?", wrong)])


@pytest.mark.full
def test_questions_about_the_same_pictures_share_their_encoding(model_class, monkeypatch):
    encoded, encode = [], VideoQA.encode
    monkeypatch.setattr(VideoQA, "encode", lambda qa, paths, **how: encoded.append(1) or encode(qa, paths, **how))
    picture = Image.effect_mandelbrot((90, 60), (-2, -1, 1, 1), 50)
    palettes = [picture.convert("P"), picture.convert("P")]
    palettes[1].putpalette(palettes[0].getpalette()[::-1])
    asked = [(q, [CLIPS[0], each]) for each in (picture, picture.copy(), *palettes) for q in QUESTIONS]
    model = model_class(pretrained="demo", pictures="true", budget=0.5, frames=4)
    results = model.generate_until([request(model, q, shown, max_new_tokens=4) for q, shown in asked])
    assert len(encoded) == 3  # equal images are the same input, and images with another palette are not
    anew = [r.token_counts.measured["time_ms"]["encode"] > 0 for r in results]
    assert anew == [True, *[False] * 3, True, False, True, False]


def test_settings_that_make_no_sense(model_class, monkeypatch):
    for wrong, said in (({"batch_size": 4}, "one at a time"), ({"budget": 2.0}, "budget"), ({"method": "x"}, "'x'")):
        with pytest.raises(UsageError, match=said):
            model_class(pretrained="demo", **wrong)
    model = model_class(pretrained="demo")
    for visuals in ([], list(CLIPS), [object()]):
        with pytest.raises(UsageError, match="not one video file"):
            model.generate_until([request(model, "What happens?", visuals)])
    with pytest.raises(UsageError, match="beams"):
        model.generate_until([request(model, "What happens?", [CLIPS[0]], num_beams=3)])
    with pytest.raises(NotImplementedError, match="generate_until"):
        model.loglikelihood([])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="one process"):
        model_class(pretrained="demo")


@real
def test_the_entry_point_is_found():
    from lmms_eval.models import get_model

    assert "evoprune_qwen2_5_vl" in entry_points(group="lmms_eval.models").names
    assert get_model("evoprune_qwen2_5_vl").__name__ == "EvoPruneQwen25VL"


@real
def test_in_lmms_eval():
    """Runs a task on the sample clips, from the name of the model to the logged samples."""
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    done = simple_evaluate(
        model="evoprune_qwen2_5_vl",
        model_args="pretrained=demo,budget=0.5,method=evoprune:alpha=4",
        tasks=["evoprune_samples"],
        task_manager=TaskManager(include_path=str(HERE / "lmms_eval_task"), include_defaults=False),
        batch_size=1,
        device="cpu",
    )
    samples = done["samples"]["evoprune_samples"]
    rows = [json.loads(line) for line in Path("samples/questions.jsonl").read_text().splitlines()]
    qa = VideoQA.load("demo", budget=0.5)
    right = [r["answer"] == "".join(qa.encode(f"samples/{r['video']}").ask(r["question"])).strip() for r in rows]
    assert done["results"]["evoprune_samples"]["right,none"] == pytest.approx(sum(right) / len(right))
    assert len(samples) == len(rows)
    counts = samples[0]["token_counts"][0]
    assert counts["visual_tokens_kept"] * 2 == counts["visual_tokens_in"] and counts["time_ms"]["encode"] > 0
