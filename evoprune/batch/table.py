"""Batch output as a CSV table, which repeats each row and adds its answer or error. This module does not import torch."""

import csv
import io
from collections.abc import Container, Sequence
from typing import TextIO

from evoprune.batch.output import STDOUT, RecordFile
from evoprune.batch.rows import Row
from evoprune.errors import UsageError
from evoprune.files import OPEN_FILES
from evoprune.report import Report
from evoprune.util import harmless, to_cell

ENDING = ".csv"
COLUMNS = ("answer", "error", "finish_reason", "visual_tokens", "new_tokens", "total_ms")


class TableFile(RecordFile):
    """A CSV output file (RFC 4180, UTF-8, comma-separated). Rows are appended and synced to disk one at a time.

    The table contains the input's columns in order of first appearance, followed by `COLUMNS`. If an input column has the same name
    as one of `COLUMNS`, it is prefixed with `row_`. Cells that a spreadsheet would run as formulas begin with an apostrophe
    (`to_cell`). A table cannot be resumed, because it does not contain the batch's settings.

    Raises:
        UsageError: If `resume` is True. For other errors, see `RecordFile`.
    """

    def __init__(self, path: str, rows: Sequence[Row], *, stdout: TextIO | None = None, resume: bool, overwrite: bool):
        if resume:
            hint = "use -o FILE.jsonl, which can be resumed, or leave out --resume"
            raise UsageError(f"--resume cannot continue {path}: a CSV table does not record the settings", hint)
        self._rows = {row.id: dict(row.cells) for row in rows}
        self._names = list(dict.fromkeys(name for row in rows for name, _ in row.cells))
        super().__init__(path, stdout=stdout, overwrite=overwrite)

    @staticmethod
    def is_meant(path: str) -> bool:
        """Return True if an output path has the extension .csv. Stdout and files that are already open never become CSV tables."""
        return path.lower().endswith(ENDING) and path != STDOUT and not path.startswith(OPEN_FILES)

    @property
    def resumable(self) -> bool:
        return False

    def begin(self, again: Container[str] = ()) -> None:
        """Empty the file and write the header."""
        super().begin(again)
        taken = {*self._names, *COLUMNS}
        titles = []
        for name in self._names:
            title = name
            while title in COLUMNS or (title != name and title in taken):
                title = f"row_{title}"
            titles.append(title)
        self._append([*titles, *COLUMNS])

    def add(self, record: Report) -> None:
        """Append a row and sync it to disk. A signal or a full disk never leaves an incomplete row."""
        cells = self._rows[record.id]
        tokens = record.tokens
        total = record.time_ms.total
        own = (
            harmless(record.answer or ""),
            harmless((record.error or {}).get("message", "")),
            record.finish_reason,
            tokens.visual,
            tokens.new,
            None if total is None else round(total, 3),
        )
        self._append([*(cells.get(name, "") for name in self._names), *own])
        self.written += 1

    def _append(self, cells: Sequence) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerow(map(to_cell, cells))
        # Invalid Unicode characters in a path are written as escape sequences.
        self._writer.submit(self._write, text.getvalue().encode("utf-8", "backslashreplace")).result()
        self.written -= 1  # undo the increment in `_write`, because records should be counted only by `add`

    def _is_own(self) -> bool:
        """Return True if the file begins with the header of a batch's CSV table. Subsequent rows may be missing or incomplete."""
        with open(self.path, encoding="utf-8-sig", errors="replace", newline="") as file:
            try:
                head = next(csv.reader(file), [])
            except csv.Error:  # for example, a cell is too large
                return False
        return tuple(head[-len(COLUMNS) :]) == COLUMNS
