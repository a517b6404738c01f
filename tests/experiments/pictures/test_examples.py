"""The pictures and examples of README and docs equal the current output of `experiments.pictures.examples`, except for times."""

import json
from typing import Any

import pytest
from PIL import Image

from experiments.pictures import figure_method
from experiments.pictures.examples import (
    JSON,
    MADE_BY,
    OVERLAY,
    ROOT,
    described,
    examples,
    filled,
    overlay_facts,
    wrapped,
)
from tests.cli.conftest import cli  # noqa: F401

README, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/json.md"))


def without_times(content: Any) -> Any:
    """Return an example without its measured times."""
    return {name: value for name, value in content.items() if name != "time_ms"}


@pytest.mark.parametrize("title", ["ask and batch", "find", "eval", "methods", "Errors"])
def test_an_example_of_json_has_todays_values(cli, title):  # noqa: F811
    shown = json.loads(examples(PAGE)[title])
    real = json.loads(cli(*JSON[title]).out)
    assert without_times(shown) == without_times(filled(shown, real)), MADE_BY


def test_every_example_of_json_has_a_command_and_its_layout():
    found = examples(PAGE)
    assert found.keys() == JSON.keys()
    for example in found.values():
        assert example == wrapped(json.loads(example)) and max(map(len, example.splitlines())) <= 132, MADE_BY


def test_the_overlay_shows_the_default_of_today(cli, tmp_path):  # noqa: F811
    record = cli(*OVERLAY, tmp_path / "overlay.png").record
    assert Image.open(ROOT / "docs/overlay.png").text["facts"] == overlay_facts(record), MADE_BY
    made, shown = Image.open(tmp_path / "overlay.png"), Image.open(ROOT / "docs/overlay.png")
    assert made.size == shown.size


def test_the_figure_of_the_method_is_described_as_it_is():
    text = described(figure_method.measure(figure_method.CLIP, figure_method.BUDGET))
    assert f"![{text}](method.svg)" in (ROOT / "docs/method.md").read_text(encoding="utf-8"), MADE_BY
