"""Many questions about many videos: reading rows, also for `evoprune eval`, answering them here or on Ray, and writing records."""

from typing import TYPE_CHECKING

from evoprune.doors import door

if TYPE_CHECKING:
    from evoprune.batch.moments import FoundVideo, MomentsFile, SearchSettings, search_rows
    from evoprune.batch.output import (
        OPEN_FILES,
        SIZE_HINT,
        RecordFile,
        Settings,
        Sources,
        append,
        differences,
        file_changes,
        remaining,
        remove_unfinished,
        size_rule_changes,
        write_file,
    )
    from evoprune.batch.ray import answers_on_ray
    from evoprune.batch.rows import (
        BATCH,
        LETTERS,
        MAY_HAVE,
        Row,
        Rules,
        Span,
        group_by_span,
        left_out,
        load_rows,
        product_rows,
        read_all,
        read_rows,
        with_scored_options,
    )
    from evoprune.batch.run import answers
    from evoprune.batch.table import TableFile, is_table

__all__ = [
    "BATCH",
    "LETTERS",
    "MAY_HAVE",
    "OPEN_FILES",
    "SIZE_HINT",
    "FoundVideo",
    "MomentsFile",
    "RecordFile",
    "Row",
    "Rules",
    "SearchSettings",
    "Settings",
    "Sources",
    "Span",
    "TableFile",
    "answers",
    "answers_on_ray",
    "append",
    "differences",
    "file_changes",
    "group_by_span",
    "is_table",
    "left_out",
    "load_rows",
    "product_rows",
    "read_all",
    "read_rows",
    "remaining",
    "remove_unfinished",
    "search_rows",
    "size_rule_changes",
    "with_scored_options",
    "write_file",
]

__getattr__, __dir__ = door(
    __name__,
    {
        "moments": ["FoundVideo", "MomentsFile", "SearchSettings", "search_rows"],
        "output": [
            "OPEN_FILES",
            "RecordFile",
            "SIZE_HINT",
            "Settings",
            "Sources",
            "append",
            "differences",
            "file_changes",
            "remaining",
            "remove_unfinished",
            "size_rule_changes",
            "write_file",
        ],
        "ray": ["answers_on_ray"],
        "rows": [
            "BATCH",
            "LETTERS",
            "MAY_HAVE",
            "Row",
            "Rules",
            "Span",
            "group_by_span",
            "left_out",
            "load_rows",
            "product_rows",
            "read_all",
            "read_rows",
            "with_scored_options",
        ],
        "run": ["answers"],
        "table": ["TableFile", "is_table"],
    },
)
