"""Batches, which answer many questions about many videos, either on this machine or on Ray, and write a record for each answer.

The code that reads rows is also used by `evoprune eval`.
"""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.batch.captions import Captions
    from evoprune.batch.output import RecordFile, Settings, Sources, check_size_rule
    from evoprune.batch.ray import answers_on_ray
    from evoprune.batch.rows import Row, RowReader, Span, left_out
    from evoprune.batch.run import answers
    from evoprune.batch.table import TableFile

__all__ = [
    "Captions",
    "RecordFile",
    "Row",
    "RowReader",
    "Settings",
    "Sources",
    "Span",
    "TableFile",
    "answers",
    "answers_on_ray",
    "check_size_rule",
    "left_out",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "captions": ["Captions"],
        "output": ["RecordFile", "Settings", "Sources", "check_size_rule"],
        "ray": ["answers_on_ray"],
        "rows": ["Row", "RowReader", "Span", "left_out"],
        "run": ["answers"],
        "table": ["TableFile"],
    },
)
