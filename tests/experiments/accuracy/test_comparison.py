"""The comparison: its rows, its ties, the files that it writes, and an interrupted run."""

from functools import partial
from xml.etree import ElementTree

import pytest

from evoprune import methods
from evoprune.bench import eval as evaluation
from evoprune.bench.chart import COLOURS
from evoprune.bench.scores import score_rows
from evoprune.session.encoding import OpenInput
from evoprune.session.options import GenerationOptions, PruneOptions
from experiments.accuracy import comparison
from experiments.accuracy.comparison import chart, compared, main
from experiments.accuracy.comparison_tables import (
    Outcome,
    document,
    equal_cost,
    short,
    standings,
)
from tests.bench.test_chart import marks

COST = dict.fromkeys(("tokens", "kept_share", "live_share", "tflop_3b", "tflop_3b_tower", "tflop_3b_prefill"), 0.5)


def samples(right: dict[str, str], budget: float = 0.5) -> list[dict]:
    """Of each method, right answers as a row of ones and zeros: two questions a clip."""
    return [
        COST
        | {
            "video": f"v{i // 2}",
            "id": f"q{i}",
            "row": "method",
            "method": name,
            "budget": budget,
            "right": answer == "1",
        }
        | {"unparseable": False, "type": "order", "groups": ["time" if i % 2 else "space"], "prune_ms": float(i % 2)}
        for name, answers in right.items()
        for i, answer in enumerate(answers)
    ]


def outcome(name: str, right: dict[str, str], budgets=(0.5,)) -> Outcome:
    made = [s for budget in budgets for s in samples(right, budget)]
    n = len(next(iter(right.values())))
    full = [s | {"row": "full", "method": "none", "budget": 1.0} for s in samples({"": "1" * n})]
    about = {
        "settings": {"data": "shapes (heldout, block 3)"},
        "videos": {"wanted": n // 2, "evaluated": n // 2, "failed": 0},
    }
    found = about | {"items": {"answered": n, "failed": 0}, "rows": score_rows(full + made)}
    return Outcome(name, found, full + made)


RIGHT = {"pool": "1110" * 10, "random": "1111" * 10, "evs": "1111" * 9 + "1110", "dart": "1111" * 10, "mmr": "0" * 40}


def test_all_methods_are_rows_and_every_selector_also_after_reuse():
    names = compared()
    after = [name for name in methods.built_in() if methods.parse(name).acts == "after"]
    assert len(after) > 10 and len(set(names)) == len(names)
    expected = {*methods.built_in(), "evoprune:depth=1", *(f"reuse+{name}" for name in after)}
    assert set(names) == expected - {"none", "operations"}
    assert all(PruneOptions(0.5, name).config().prunes for name in names)


def test_a_tie_is_called_a_tie():
    found = standings([*samples(RIGHT), *samples({"mmr": "1" * 40}, 0.25), {"video": "v", "error": {}}], 0.5)
    assert list(found) == list(RIGHT)
    assert [name for name, s in found.items() if s.best] == ["random"]  # and not dart, which is as good
    assert {name for name, s in found.items() if s.tie} == {"random", "evs", "dart"}
    assert (found["dart"].difference, found["dart"].low, found["dart"].high) == (0, 0, 0)
    assert found["evs"].difference == pytest.approx(-1 / 40) and found["evs"].low < 0 == found["evs"].high
    assert found["pool"].difference == pytest.approx(-0.25) and found["pool"].high < 0
    assert (found["mmr"].low, found["mmr"].high) == (-1, -1)  # paired: the best is right whatever is drawn
    assert [str(found[name]) for name in ("random", "dart", "mmr")] == [
        "best", "tie +0.0 (+0.0 to +0.0)", "-100.0 (-100.0 to -100.0)"
    ]  # fmt: skip
    assert standings(samples(RIGHT), 0.1) == {}


def test_differences_are_paired_by_video():
    """Two rows that are wrong about different videos differ less surely than rows that are wrong about the same ones."""
    apart = standings(samples({"a": "11110000" * 4, "b": "00111100" * 4}), 0.5)["b"]
    alike = standings(samples({"a": "11110000" * 4, "b": "11110000" * 4}), 0.5)["b"]
    assert apart.difference == alike.difference == 0 and apart.low < alike.low == 0 == alike.high < apart.high


def test_the_document():
    """By accuracy, then as given; what is best in all models; and the columns of a row."""
    worse = RIGHT | {"evs": "0011" * 10, "dart": "1" * 40}
    outcomes = [outcome("one", RIGHT, (0.5, 0.1)), outcome("two", worse, (0.5, 0.1))]
    text = document(outcomes, (0.5, 0.1), "a.svg", "python -m x")
    lines = text.splitlines()
    assert "`python -m x`" in lines and "![Accuracy of each method](a.svg)" in lines and "(heldout, block 3)" in text
    assert "- `-b 0.5`: `random`, `dart`" in lines and "- `-b 0.1`: `random`, `dart`" in lines
    first = lines[lines.index("### `-b 0.5`") + 2 :]
    assert first[2] == "| `random` | 100.0 (83.9-100.0) | 100.0 (100.0-100.0) | best | 0.5 | 0.50 | 0.5 | 0.50 |"
    assert [line.split("`")[1] for line in first[2:7]] == ["random", "dart", "evs", "pool", "mmr"]
    assert "tie" in first[4].split(" | ")[3] and "tie" not in first[5].split(" | ")[3]
    groups = lines[lines.index("### By group of questions") + 4 :]
    assert groups[0] == "| -b 0.5 | space | time |" and groups[2].startswith("| nothing pruned | ")
    assert "in all models" not in document(outcomes[:1], (0.5,), "a.svg", "")


def test_more_tokens_than_the_budget_are_marked():
    """The samples keep half of their tokens."""
    made = [outcome("one", RIGHT, (0.5, 0.25))]
    row = next(line for line in short(made, (0.5, 0.25)).splitlines() if line.startswith("| `random`"))
    assert row == "| `random` | 100.0 | 100% | 100.0 † | 100% |"
    text = document(made, (0.5, 0.25), "", "")
    assert text.split("### `-b 0.25`")[1].count("| 0.5 † |") == len(RIGHT)
    assert "†" not in text.split("### `-b 0.5`")[1].split("###")[0]


def test_equal_cost_is_the_most_expensive_of_ours_that_costs_no_more():
    """It is found by the costs alone, whatever is right; variants of evoprune and reuse before others take no part."""
    costs = {"evoprune": 3.0, "evoprune:depth=1": 0.1, "reuse+evs": 0.1, "evs": 2.9, "pool": 9.0, "dart": 1.0}
    right = {name: "1" * 40 for name in costs} | {"evoprune": "0" * 40, "pool": "0011" * 10}
    cheap = samples({"evoprune": "0011" * 10}, 0.25)
    made = []
    for sample in samples(right) + cheap:
        camera = "static" if int(sample["video"][1:]) % 2 else "panning"
        flop = 2.0 if sample["budget"] == 0.25 else costs[sample["method"]]
        made.append(sample | {"tflop_3b": flop, "groups": [camera]})
    matches = equal_cost(
        Outcome(
            "",
            {"rows": score_rows(made), "settings": {"data": "shapes (heldout, block 3)"}},
            [*made, {"video": "v0", "error": {}}],
        )
    )
    assert [(m.other["method"], m.ours and m.ours["name"]) for m in matches] == [
        ("pool", "evoprune -b 0.5"), ("evs", "evoprune -b 0.25"), ("dart", None)
    ]  # fmt: skip
    assert matches[0].differences["all"][0] == -0.5 and matches[0].differences["panning"] == (0, 0, 0)
    assert matches[0].differences["static"] == (-1, -1, -1)
    assert set(matches[1].differences) == {"all", "static", "panning"}
    assert matches[1].differences["all"][0] == -0.5 and matches[2].differences == {}
    shown = Outcome("x", outcome("x", RIGHT).document | {"rows": score_rows(made)}, made)
    lines = document([shown], (), "", "").splitlines()
    row = next(line for line in lines if line.startswith("| `pool"))
    assert row.startswith("| `pool -b 0.5` | 9 | `evoprune -b 0.5` | 3 | -50.0 (")
    assert row.endswith("| -100.0 (-100.0 to -100.0) | tie +0.0 (+0.0 to +0.0) |")
    assert next(line for line in lines if line.startswith("| `dart")).endswith(" | all cost more |  |  |  |  |")


def test_the_chart():
    outcomes = [outcome(name, RIGHT, (0.5, 0.1)) for name in ("one", "two")]
    root = ElementTree.fromstring(chart(outcomes, (0.5, 0.1)))
    words = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for word in (*RIGHT, "-b 0.5", "-b 0.1", "full", "one", "two"):
        assert words.count(word) == 1
    at = {element.text: float(element.get("y")) for element in root.iter("{http://www.w3.org/2000/svg}text")}
    assert sorted(RIGHT, key=at.get) == ["random", "dart", "evs", "pool", "mmr"]
    for colour in COLOURS[:2]:
        dots = marks(root, colour)[:-1]  # without the legend's
        assert len(dots) == 2 * 5
        for name in RIGHT:  # in every panel a dot near its row
            assert sum(abs(y + 3 - at[name]) < 6 for _, y in dots) == 2
        best, worst = (max(x for x, y in dots[:5] if abs(y + 3 - at[name]) < 6) for name in ("random", "mmr"))
        assert best > worst + 100


@pytest.fixture
def asked(saved, tmp_path, monkeypatch):
    """The command on the tiny model, two clips, two rows, and answers of two tokens."""
    names = ["random", "reuse+cdpruner"]
    generation = GenerationOptions(max_new_tokens=2)
    monkeypatch.setattr(comparison, "EvalSettings", partial(evaluation.EvalSettings, generation=generation))
    monkeypatch.setattr(comparison, "compared", lambda: names)
    table, picture = tmp_path / "table.md", tmp_path / "chart.svg"
    files = ["-o", tmp_path / "runs", "--table", table, "--chart", picture]
    args = ["--model", saved, "-b", "0.1", "--limit", "2", "--split", "validation", *files]
    return names, [*map(str, args)], table, picture


def test_the_command_writes_its_files_and_resumes_an_interrupted_run(asked, monkeypatch):
    names, args, table, picture = asked
    seen, real = [], evaluation.open_inputs

    def opened(session, *args, **more):
        if more["kind"] is not OpenInput:  # what is only read ahead
            seen.append(session.pruning.name)
            if len(seen) == 6:
                raise KeyboardInterrupt
        return real(session, *args, **more)

    monkeypatch.setattr(evaluation, "open_inputs", opened)
    with pytest.raises(KeyboardInterrupt):  # in the second clip
        main(args)
    assert not table.exists() and not picture.exists()
    main(args)
    assert len(seen) == 6 + 4  # in full, blind, and both rows of the second clip; the first clip is not encoded again
    text = table.read_text()
    in_short, of_budget = (text.split(heading)[1].split("\n#")[0] for heading in ("## In short\n", "### `-b 0.1`\n"))
    assert of_budget.count("| best |") == 1 and all(of_budget.count(f"| `{name}` |") == 1 for name in names)
    assert [in_short.count(f"| `{name}` |") for name in names] == [1, 0]  # without combinations
    assert "of 2 clips" in text and "-b 0.1" in text and "(chart.svg)" in text and "2 of 2" in text
    ElementTree.fromstring(picture.read_text())
    main(args)  # nothing is left to do
    assert len(seen) == 10 and table.read_text() == text
