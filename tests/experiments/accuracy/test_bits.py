"""experiments.accuracy.bits: answers of both sides, and their table."""

from experiments.accuracy.bits import BUDGETS, start, table_row
from experiments.demo.write import clips_asked
from tests.threads import one_thread  # noqa: F401


def test_the_table_compares_both_sides_on_the_same_questions(tmp_path):
    answer = start("demo", "int8", str(tmp_path))
    answers = [each for clip in clips_asked("shapes", "validation", 53, 2) for each in answer(clip)]
    assert [a["budget"] for a in answers] == [budget for _ in range(2) for budget in BUDGETS for _ in range(6)]
    assert all(len(a["agrees"]) == len(a["kl"]) > 0 for a in answers)
    cells = table_row("shapes", 1.0, [a for a in answers if a["budget"] == 1.0])
    assert cells[:3] == ["shapes", 1.0, "12"] and cells[5].endswith("(too few videos for an interval)")
    assert float(cells[6].rstrip("%")) > 90 and float(cells[7]) < 0.1
