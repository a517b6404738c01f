"""Calibration: which questions get which choices, and what the tables count."""

from pathlib import Path

import pytest

from evoprune.batch.rows import Row
from evoprune.bench.questions import VideoQuestions
from experiments.accuracy import calibration


def question(number, type, answer, options=()):
    return Row(str(number), ("a",), ("a.mp4",), "Which?", type=type, answer=answer, options=options)


def test_questions_without_options_get_the_answers_of_their_type():
    rows = [question(0, "colour", "red"), question(1, "colour", "blue"), question(2, "digit", "4")]
    own = question(3, "digit", "5", ("5", "6"))
    videos = [VideoQuestions("a", Path("a.mp4"), (*rows, own)), VideoQuestions("b", Path("b.mp4"), (rows[0],))]
    first, second = calibration.with_choices(videos)
    assert [row.options for row in first.rows] == [("blue", "red")] * 2 + [("4", "5"), ("5", "6")]
    same = calibration.without_the_others(videos, [second])
    assert [(video.name, video.rows) for video in same] == [("a", (rows[0],)), ("b", (rows[0],))]


def sample(probability, right):
    choices = [{"text": "red", "probability": probability}, {"text": "blue", "probability": 1 - probability}]
    return {
        "row": "full", "method": "none", "budget": 1.0, "choices": choices, "right": right,
        "expected": "red" if right else "blue",
    }  # fmt: skip


def test_a_reliability_table_counts_every_answer_once():
    samples = [sample(0.6, True), sample(0.6, False), sample(0.95, True), sample(1.0, True), sample(0.99, False)]
    lines = calibration.reliability(samples)
    assert [line[:2] for line in lines] == [("0.5 to 0.7", 2), ("0.9 to 0.99", 1), ("0.99 to 1", 2)]
    assert [line[3] for line in lines] == [0.5, 1.0, 0.5]
    error = (2 * 0.1 + 0.05 + 2 * 0.495) / 5
    assert calibration.calibration_error(samples) == pytest.approx(error)


def test_the_tables_have_a_line_for_each_row():
    text = calibration.tables({"shapes": ([sample(1.0, True)], [sample(1.0, True), sample(0.75, False)])})
    assert "| demo | nothing pruned | 2 | 100.0% | 50.0% | 0.562 | 0.375 |" in text
    assert "| demo | nothing pruned | 0.99 to 1 | 1 | 1.000 | 100.0% |" in text
