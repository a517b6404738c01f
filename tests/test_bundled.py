"""The bundled models. If a file is missing, the tests of the installed weights fail."""

import tomllib
from pathlib import Path

import pytest

import evoprune
from evoprune.bundled import DEMOS, WORDS, Demo

PACKAGE = Path(evoprune.__file__).parent
CLIPS = {"demo": "samples/square.mp4", "demo-scenes": "samples/scenes/crossing.mp4"}


def test_each_world_has_a_model_that_knows_it():
    assert [demo.world for demo in DEMOS.values()] == list(WORDS)
    assert [Demo.of(demo.folder / "." / "") for demo in DEMOS.values()] == list(DEMOS.values())
    assert Demo.of(PACKAGE) is Demo.of(None) is None


def test_the_package_holds_their_files():
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8"))
    packed = project["tool"]["setuptools"]["package-data"]["evoprune"]
    assert all(f"{demo.folder.relative_to(PACKAGE).as_posix()}/*" in packed for demo in DEMOS.values())


@pytest.mark.parametrize("name", DEMOS)
def test_they_answer_about_their_own_clips(name):
    qa = evoprune.VideoQA.load(name, device="cpu", budget=0.25)
    answer = qa.ask(CLIPS[name], "What colour is the square?", max_new_tokens=8)
    assert qa.loaded.dtype == "fp32" and answer.text and answer.report.warnings == []


@pytest.mark.parametrize(
    ("name", "question", "unknown"),
    [
        ("demo", "What colour is the Square?", []),
        ("demo", "Does the man smile?", ["man", "smile"]),
        ("demo", "What does the sign say?", ["sign", "say"]),
        ("demo", "NORTH", ["north"]),
        ("demo-scenes", "In the second picture: What colour is the sign that says NORTH?\nA. red\nB. 4711", []),
        ("demo-scenes", "Is the digit on the North sign?", ["digit", "north"]),
    ],
)
def test_what_is_unknown(name, question, unknown):
    assert DEMOS[name].unknown_words(question) == unknown
