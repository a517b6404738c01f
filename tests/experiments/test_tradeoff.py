"""The chart of accuracy against cost says what the documents say."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

from evoprune.errors import UsageError
from evoprune.visualize.chart import Point
from experiments.comparison_chart import chart as comparison_chart
from experiments.comparison_document import budgets, read
from experiments.comparison_document import main as redraw
from experiments.tradeoff import first_tokens, frontier, main, rows

PAGE, TIMES = Path("results/default-scenes.md"), Path("results/benchmarks.md")


def words(svg: str) -> set[str | None]:
    return {e.text for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")}


def test_a_document_is_read_as_it_was_written():
    outcomes = read(PAGE.read_text())
    assert [outcome.name for outcome in outcomes] == ["demo-scenes", "tests/demo/second-scenes"]
    assert budgets(outcomes) == [0.25, 0.1]
    best = outcomes[1].rows(0.1)[0]
    line = next(
        line
        for line in PAGE.read_text().split("## tests/demo/second-scenes")[1].split("### `-b 0.1`")[1].splitlines()
        if "`evoprune`" in line
    )
    assert f"{100 * best['accuracy']:.1f} ({100 * best['low']:.1f}-{100 * best['high']:.1f})" in line
    with pytest.raises(UsageError, match="no tables of methods"):
        read("# Nothing\n")


CHARTS = (
    "rivals-earlier",
    "portrait",
    "comparison",
    "comparison-scenes",
    "default-scenes",
    "default-shapes",
)


@pytest.mark.parametrize("name", CHARTS)
def test_the_committed_charts_are_those_of_their_documents(name, tmp_path):
    redraw([f"results/{name}.md", "-o", str(tmp_path / "a.svg")])
    assert (tmp_path / "a.svg").read_text() == Path(f"results/{name}.svg").read_text()


def test_the_committed_chart_is_that_of_its_documents(tmp_path):
    main([str(PAGE), "-o", str(tmp_path / "a.svg")])
    assert (tmp_path / "a.svg").read_text() == Path("results/tradeoff.svg").read_text()


def test_earlier_forms_are_marked():
    marked = {
        name: {
            row.method for row in rows(Path(f"results/{name}.md").read_text()) if row.method.endswith("(earlier form)")
        }
        for name in ("default-shapes", "rivals-earlier")
    }
    assert marked["default-shapes"] == set() and marked["rivals-earlier"] == {"evoprune (earlier form)"}


def test_the_chart_of_a_comparison_marks_the_rows_that_its_page_marks():
    found = words(Path("results/rivals-earlier.svg").read_text())
    assert {"evoprune*", "divprune", "evoprune-merge"} <= found and "divprune*" not in found
    assert any("*: measured with earlier code" in (word or "") for word in found)
    assert not any("*" in (word or "") for word in words(Path("results/default-shapes.svg").read_text()))


def test_a_chart_of_marked_rows_says_so(tmp_path):
    main(["results/rivals-earlier.md", "--method", "evoprune,divprune", "-o", str(tmp_path / "a.svg")])
    assert {"evoprune (earlier form)", "divprune"} <= words((tmp_path / "a.svg").read_text())


def test_too_many_methods_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["results/comparison.md", "-o", str(tmp_path / "a.svg")])
    assert "choose with --method among" in capsys.readouterr().err and not (tmp_path / "a.svg").exists()


def test_times_are_shares_of_hugging_face():
    times = first_tokens(TIMES.read_text())
    line = next(line for line in TIMES.read_text().splitlines() if line.startswith("| `evoprune -b 0.1` "))
    assert times["evoprune -b 0.1"] == pytest.approx(100 / float(line.split("|")[7]))
    assert times["evoprune -b 0.1"] < times["bound -b 0.1"] < times["budget 1.0"] < 100
    with pytest.raises(UsageError, match="no table of times"):
        first_tokens("nothing")


def test_the_frontier_holds_what_nothing_beats():
    cheap, good, beaten, same = Point(1, 50), Point(5, 90), Point(6, 80), Point(7, 90)
    assert frontier([same, beaten, good, cheap]) == (cheap, good)


def test_models_share_an_axis_that_begins_near_their_values():
    outcomes = read(PAGE.read_text())
    for outcome in outcomes:
        outcome.document["rows"] = [
            r for r in outcome.document["rows"] if r["method"] in ("none", "evoprune", "divprune")
        ]
    assert "accuracy, % (axis from 60)" in words(comparison_chart(outcomes, budgets(outcomes)))
