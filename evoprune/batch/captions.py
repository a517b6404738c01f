"""Caption files, each containing the answer for one video, in the layout required for training on captioned videos.

A caption is written after its video's record, which contains the caption's path. This way, a later run can tell which existing
files are captions and which captions are still missing. This module does not import torch.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from evoprune.batch.output import RECORD_LEVELS, RecordFile
from evoprune.batch.rows import Row
from evoprune.errors import UsageError
from evoprune.files import write_file
from evoprune.report import Report
from evoprune.untrusted import loads
from evoprune.util import is_url, shown
from evoprune.video import Folder

ENDING = ".txt"


class Captions:
    """A batch's caption files.

    Each caption has the same name as its video, with the extension .txt. If the videos are in different subfolders of a common
    folder, the captions are placed in subfolders with the same names.

    Args:
        folder: Output folder for the captions.
        rows: All rows in the batch.
        replaced: Existing output file to be overwritten by the batch. Captions listed in its records may be replaced.

    Raises:
        UsageError: If a row has multiple inputs or a URL as its input, or if two rows would share a caption file.
    """

    def __init__(self, folder: str, rows: Sequence[Row], replaced: str | None = None):
        self._folder = os.path.abspath(folder)
        self._paths: dict[str, str] = {}
        self._own = {record["batch"]["files"].get("caption") for record in _answered(replaced)} if replaced else set()
        videos: dict[str, str] = {}
        for row in rows:
            if len(row.paths) > 1 or is_url(row.paths[0]):
                raise UsageError(f"--captions takes a file per row, not {shown(row.video)}", "leave out --captions")
        every = [os.path.abspath(row.paths[0]) for row in rows]
        top = os.path.commonpath([os.path.dirname(path) for path in every])
        for row, path in zip(rows, every, strict=True):
            name = os.path.relpath(path if Folder.is_at(path) else os.path.splitext(path)[0], top) + ENDING
            if name in videos:
                both = f"two rows, about {shown(videos[name])} and {shown(row.video)}"
                hint = "ask one question about every video, and rename videos that differ only in the ending"
                raise UsageError(f"{both}, would have the caption {shown(name)}", hint)
            videos[name] = row.video
            self._paths[row.id] = os.path.join(self._folder, name)

    def start(self, left: Iterable[Row], file: RecordFile) -> None:
        """Check that captions can be written, and write any captions missing from an earlier run.

        Args:
            left: The unanswered rows.
            file: The output file containing the records of rows that have already been answered.

        Raises:
            UsageError: If an existing non-caption file has the same name as a caption, or if the folder is not writable.
        """
        for row in left:
            self._check(self._paths[row.id])
        try:
            os.makedirs(self._folder, exist_ok=True)
        except OSError as problem:
            raise _cannot_write(self._folder, problem) from problem
        for record in _answered(file.path) if file.earlier_records else ():
            path = self._paths.get(record["id"])
            if path and not os.path.lexists(path):
                self._write(path, record["answer"])

    def of(self, row: Row) -> dict[str, str]:
        """Return the caption path as an entry for the `batch.files` object in the row's record."""
        return {"caption": self._paths[row.id]}

    def add(self, record: Report) -> None:
        """Write the caption for a record that is already on disk. Failed rows are skipped.

        Raises:
            UsageError: See `start`.
        """
        if not record.error:
            self._check(self._paths[record.id])
            self._write(self._paths[record.id], record.answer)

    def _check(self, path: str) -> None:
        if os.path.lexists(path) and path not in self._own:
            problem = f"{shown(path)} exists, and no record of the output names it as a caption"
            raise UsageError(problem, "move it away, or choose another --captions")

    def _write(self, path: str, answer: str) -> None:
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            write_file(path, (answer.strip() + "\n").encode(errors="replace"))
        except OSError as problem:
            raise _cannot_write(path, problem) from problem


def _cannot_write(path: str, problem: OSError) -> UsageError:
    return UsageError(f"cannot write {shown(path)}: {problem.strerror}", "choose another --captions")


def _answered(path: str) -> Iterator[dict[str, Any]]:
    """Yield the records of answered rows from an output file, skipping all other lines."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = loads(line, levels=RECORD_LEVELS)
                answered = isinstance(record["id"] + record["answer"], str) and record["batch"]["files"].keys()
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if answered:
                yield record
