"""The pictures and examples of README and docs are those that `experiments.pictures.examples` makes today, but for times."""

import json
import re
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from experiments.pictures import figure_method
from experiments.pictures.examples import (
    JSON,
    MADE_BY,
    OVERLAY,
    ROOT,
    counts,
    described,
    examples,
    filled,
    overlay_facts,
    wrapped,
)
from tests.cli.conftest import cli  # noqa: F401

README, PAGE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/json.md"))


def without_times(content: Any) -> Any:
    """An example without its measured times."""
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
    assert f"![{text}](docs/method.svg)" in README, MADE_BY
    assert f"![{text}](method.svg)" in (ROOT / "docs/method.md").read_text(encoding="utf-8"), MADE_BY


def test_the_transcript_and_the_recording_say_the_same():
    """What README says is compared with a run in tests/cli/test_documents.py."""
    (shown,) = re.findall(r"^```text\n\$ evoprune ask .*\ngreen\n\n(.*?)^```", README, re.S | re.M)
    drawn = ElementTree.parse(ROOT / "docs/recording.svg").iter("{http://www.w3.org/2000/svg}text")
    lines = ["".join(each.itertext()) for each in drawn if each.get("class") == "last"]
    assert counts("\n".join(lines[lines.index("green") + 1 :])) == counts(shown), MADE_BY
