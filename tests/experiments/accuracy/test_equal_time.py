"""experiments.accuracy.equal_time: each row of other methods is paired with our most accurate row that is at least as fast."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from experiments.accuracy.equal_time import NONE, OURS, main, speed_of, speeds, worst_in_tables
from experiments.accuracy.frontier import FULL, METHOD, SETS, folder_of

# 20 clips; the full model is right about 16: right answers per row, and the speedup over Hugging Face.
COUNTS = {"evoprune": (14, 10), "tome": (13, 15), "divprune": (5, 5)}
RIGHT = {
    (method, budget): n for method, ns in COUNTS.items() for budget, n in zip(("balanced", "fast"), ns, strict=True)
}
TIMES = """One run:

| | encode, s | times as fast as Hugging Face | as the bound |
|---|---|---|---|
| budget 1.0 | 6.4 | 1.06 | |
| `evoprune -b balanced` | 2.8 | 3.1 | 1.7 |

Another one:

| | -b 0.25 | -b 0.1 |
|---|--:|--:|
| `evoprune` | 3.00 | 4.5 |
| `tome` | 2.00 | 4.0 |
| bound of all methods after the encoder | 1.7 | 5.0 |
| budget 1.0 | 1.1 | 1.1 |
"""


def sample(video: int, right: bool, row: str, method: str, budget: float | str) -> dict:
    about = {"video": str(video), "id": "0", "groups": [], "right": right, "tflop_3b": 4.0 if row == FULL else 1.0}
    return about | {"row": row, "method": method, "budget": budget}


@pytest.fixture
def files(tmp_path):
    for name in SETS:
        made = [sample(video, video < 16, FULL, "none", 1.0) for video in range(20)]
        made += [sample(v, v < count, METHOD, *row) for row, count in RIGHT.items() for v in range(20)]
        (folder := folder_of(tmp_path, name)).mkdir()
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, made)))
    (tmp_path / "times.md").write_text(TIMES)
    return tmp_path


def test_the_committed_times_are_read():
    found = speeds(Path("results/frontier.md").read_text())
    assert {name for name, _ in found} >= {"evoprune", "tome", "fastv", "vitcop"} and min(found.values()) > 1
    assert found["evoprune", 0.1] > found["evoprune", 0.25] > found["evoprune", 0.4] > found[NONE]


def test_each_row_is_compared_with_one_of_ours_that_is_as_fast(files):
    folders = ["--presets", str(files), "--rivals", str(files)]
    main([str(files / "times.md"), *folders, "-o", str(files / "made.md"), "--chart", str(files / "made.svg")])
    text = (files / "made.md").read_text()
    assert "| `tome` | 81.2 / 81.2 | 25% | 2.00 | 93.8 / 93.8 | 25% | 4.00 |" in text
    rows = [line.strip("| ").split(" | ") for line in text.split("## At equal time")[1].split("##")[0].splitlines()[4:]]
    found = {row[0].strip("`"): row[1:] for row in rows if len(row) > 3}
    assert found["tome -b balanced"][:4] == ["2.00", "81.2", "`-b balanced`", "3.00"]
    assert found["tome -b balanced"][4].startswith("tie +5.0 ")
    assert found["tome -b fast"][:4] == ["4.00", "93.8", "`-b fast`", "4.50"]
    assert found["tome -b fast"][4].startswith("worse -25.0 ")
    assert found["divprune -b fast"][:3] == ["5.00", "31.2", "none so fast"]  # as fast as the bound
    drawn = (files / "made.svg").read_text()
    assert "-b balanced" in drawn and "tome" in drawn and "Hugging Face" in drawn


TABLES, COMPARED, CHART = (Path("results", name) for name in ("frontier.md", "comparison.md", "frontier.svg"))


def test_the_committed_chart_is_that_of_the_tables(tmp_path):
    main([str(TABLES), "--tables", str(COMPARED), "--chart", str(tmp_path / "made.svg")])
    made, kept = (ElementTree.fromstring(path.read_text()) for path in (tmp_path / "made.svg", CHART))
    shown = [[node.text for node in root.iter() if node.tag.endswith("text")] for root in (made, kept)]
    assert sorted(shown[0]) == sorted(shown[1])
    assert "after the encoder, if selecting costs nothing" in shown[1]  # the legend explains every color


def test_what_is_said_of_the_chart_is_so():
    """In the chart, the line through the presets is above all other methods except `downscale -b fast`, which is faster."""
    times = TABLES.read_text()
    fast = speeds(times)
    ours, others = worst_in_tables(times, COMPARED.read_text())
    names = ("high", "balanced", "fast")
    assert len(others) == 78  # one of them has no row of ours that is as fast, so 77 are compared
    xs = [fast[NONE], *(speed_of((OURS, name), fast) for name in names)]
    ys = [100.0, *(ours[OURS, name] for name in names)]
    above = {key for key, kept in others.items() if kept >= np.interp(speed_of(key, fast), xs, ys)}
    faster = {key for key in others if speed_of(key, fast) > xs[-1]}
    assert above == set() and faster == {("downscale", "fast")}
    guide = Path("docs/guide.md").read_text()
    shown = [f"{speed:.1f} times" for speed in xs[1:]]
    assert [re.search(rf"`-b {name}`.*?([\d.]+ times)", guide)[1] for name in names] == shown
    assert f"first token {shown[0][:3]}, {shown[1][:3]} and {shown[2][:3]} times as fast as Hugging Face" in times
