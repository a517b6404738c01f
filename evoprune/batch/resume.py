"""Resumes an earlier output: the settings must match, and finished rows are skipped."""

from collections.abc import Sequence
from typing import Any

from evoprune.batch.output import Found
from evoprune.batch.rows import Row
from evoprune.batch.settings import Settings
from evoprune.errors import UsageError
from evoprune.report.records import rounded


def remaining(rows: Sequence[Row], settings: Settings, found: Sequence[Found]) -> list[Row]:
    """The rows that have no answer yet. Rows that failed are asked again.

    Raises:
        UsageError: a record was made with other settings, or its row has changed.
    """
    now, asked, done = rounded(settings.record()), {row.id: rounded(row.asked) for row in rows}, set()
    for record in found:
        if other := differences(record.settings, now):
            raise UsageError(f"the output was begun with other settings: {other}", "give the same ones, or another -o")
        if record.id in asked and (
            other := differences(record.row | {"answer": None}, asked[record.id] | {"answer": None})
        ):
            hint = "give changed rows ids of their own, or choose another -o"
            raise UsageError(f"the row {record.id!r} is not what it was: {other}", hint)
        if not record.failed:
            done.add(record.id)
    return [row for row in rows if row.id not in done]


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The entries in which two dicts differ, in words; empty where they are equal."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)
