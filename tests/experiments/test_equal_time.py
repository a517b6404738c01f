"""experiments.equal_time: each row of the others has the most accurate of ours that takes no longer."""

import json

import pytest

from evoprune.evaluation.scores import FULL, METHOD
from evoprune.profiling.results import BOUND
from experiments.equal_time import main
from experiments.frontier import SETS, folder_of

# Of 20 clips, of which the full model knows 16, how many each row knows; and how many times as fast as Hugging Face it is.
RIGHT = {
    ("evoprune", "balanced"): 14,
    ("evoprune", "fast"): 10,
    ("tome", 0.25): 13,
    ("tome", 0.1): 15,
    ("divprune", 0.1): 5,
}
SPEED = {("evoprune", 0.25): 3.0, ("evoprune", 0.1): 4.5, ("tome", 0.25): 2.0, ("tome", 0.1): 4.0, (BOUND, 0.1): 5.0}


def sample(video: int, right: bool, row: str, method: str, budget: float | str) -> dict:
    return {
        "video": str(video),
        "id": "0",
        "groups": [],
        "right": right,
        "row": row,
        "method": method,
        "budget": budget,
    }


@pytest.fixture
def files(tmp_path):
    for name in SETS:
        made = [sample(video, video < 16, FULL, "none", 1.0) for video in range(20)]
        made += [sample(v, v < count, METHOD, *row) for row, count in RIGHT.items() for v in range(20)]
        (folder := folder_of(tmp_path, name)).mkdir()
        (folder / "samples.jsonl").write_text("\n".join(map(json.dumps, made)))
    rows = [{"row": "full", "method": "none", "budget": 1.0, "ratio": {"first_token_to_hugging_face": 1.1}}]
    for (method, budget), speed in SPEED.items():
        kind = {"row": BOUND, "method": None} if method == BOUND else {"row": METHOD, "method": method}
        rows.append(kind | {"budget": budget, "ratio": {"first_token_to_hugging_face": speed}})
    (tmp_path / "profile.json").write_text(json.dumps({"rows": rows}))
    return tmp_path


def test_each_row_is_compared_with_one_of_ours_that_is_as_fast(files):
    folders = ["--presets", str(files), "--rivals", str(files)]
    main([str(files / "profile.json"), *folders, "-o", str(files / "made.md"), "--chart", str(files / "made.svg")])
    rows = [line.strip("| ").split(" | ") for line in (files / "made.md").read_text().splitlines()[2:]]
    found = {row[0].strip("`"): row[1:] for row in rows if len(row) > 3}
    assert found["tome -b 0.25"][:4] == ["2.00", "81.2", "`-b balanced`", "3.00"]
    assert found["tome -b 0.25"][4].startswith("tie +5.0 ")
    assert found["tome -b 0.1"][:4] == ["4.00", "93.8", "`-b fast`", "4.50"]
    assert found["tome -b 0.1"][4].startswith("worse -25.0 ")
    assert found["divprune -b 0.1"][:3] == ["5.00", "31.2", "none so fast"]  # as fast as the bound
    drawn = (files / "made.svg").read_text()
    assert "-b balanced" in drawn and "tome" in drawn and "Hugging Face" in drawn
