import pytest

from evoprune.tuning.results import recommended


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
