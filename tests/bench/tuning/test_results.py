import pytest

from evoprune.bench.tuning.results import recommended, result_rows
from evoprune.bench.tuning.search import Candidate, Trial


def row(method: str, first_token: float, passes: bool = True) -> dict:
    return {"method": method, "first_token": first_token, "passes": passes}


@pytest.mark.parametrize(
    ("rows", "chosen"),
    [
        ([row("evoprune:floor=1", 0.200), row("evoprune", 0.209)], "evoprune"),  # as fast, and plainer
        ([row("evoprune:floor=1", 0.200), row("evoprune", 0.211)], "evoprune:floor=1"),
        ([row("evoprune:floor=1", 0.200), row("tome", 0.206), row("evoprune", 0.203)], "evoprune"),
        ([row("evoprune", 0.1, False), row("evoprune:depth=0.5", 0.2)], "evoprune:depth=0.5"),
        ([row("evoprune", 0.1, False)], None),
        ([], None),
    ],
)
def test_the_fastest_that_passes(rows, chosen):
    found = recommended(rows)
    assert (found and found["method"]) == chosen


def test_settings_that_do_the_same_work_share_their_times():
    def trials(first_s: list[float], live: float) -> list[Trial]:
        return [Trial(9, 10, [0.1] * 10, first, 1.0, 1.0, 0.1, live) for first in first_s]

    known = {
        Candidate("evoprune", 0.1): trials([0.30, 0.40], 0.2),
        Candidate("evoprune:floor=1", 0.1): trials([0.10, 0.20], 0.2),
        Candidate("evoprune:depth=0.5", 0.1): trials([0.15, 0.15], 0.5),
    }
    rows = {row["name"]: row["first_token"] for row in result_rows(known, 0.9)}
    assert rows["evoprune -b 0.1"] == rows["evoprune:floor=1 -b 0.1"] == pytest.approx(0.25)
    assert rows["evoprune:depth=0.5 -b 0.1"] == pytest.approx(0.15)
