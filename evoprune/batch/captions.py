"""A text file per video with its answer, as programs that train on captioned videos read them. Imports no torch.

A caption is written after its record, which names it. So a later run knows which files are captions, and which are missing.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from evoprune.batch.output import RecordFile
from evoprune.batch.rows import Row
from evoprune.errors import UsageError
from evoprune.files import write_file
from evoprune.report import Report
from evoprune.untrusted import loads
from evoprune.util import is_url, shown

ENDING = ".txt"


class Captions:
    """The captions of a batch. They are named like the videos, and keep their folders below the folder that has all videos.

    Args:
        replaced: An output file that will be overwritten. The captions that its records name may be replaced.

    Raises:
        UsageError: a row has several inputs or a URL, or two rows would have the same caption.
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
            name = os.path.relpath(path if os.path.isdir(path) else os.path.splitext(path)[0], top) + ENDING
            if name in videos:
                both = f"two rows, about {shown(videos[name])} and {shown(row.video)}"
                hint = "ask one question about every video, and rename videos that differ only in the ending"
                raise UsageError(f"{both}, would have the caption {shown(name)}", hint)
            videos[name] = row.video
            self._paths[row.id] = os.path.join(self._folder, name)

    def start(self, left: Iterable[Row], file: RecordFile) -> None:
        """Check that the captions of the rows that are left can be written, and write those that answered rows lack.

        Raises:
            UsageError: another file is in the way, or the folder cannot be written.
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
        """Return the entry for `batch.files` in the record of a row."""
        return {"caption": self._paths[row.id]}

    def add(self, record: Report) -> None:
        """Write the caption of a record that is on disk, unless its row failed. Raises UsageError like `start`."""
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
    """Yield the records of answered rows in a file, and skip anything else."""
    with open(path, "rb") as file:
        for line in file:
            try:
                record = loads(line)
                answered = isinstance(record["id"] + record["answer"], str) and record["batch"]["files"].keys()
            except (ValueError, KeyError, TypeError, AttributeError):
                continue
            if answered:
                yield record
