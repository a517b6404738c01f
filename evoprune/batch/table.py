"""Tables of plain values: a JSONL file, or a CSV file with a head, line by line. No torch."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from evoprune.errors import LFS, LFS_HINT, UsageError
from evoprune.model.config import loads
from evoprune.text import shorten

LIST_COLUMNS = ("inputs", "options", "groups")  # columns whose cells in a CSV file are lists
SEPARATOR = "|"  # between the entries of such a cell
MAX_BYTES = 2**28  # of a file: all rows are held in memory
LONGEST_HEAD = 80  # characters of a wrong head that an error shows
# "line" or, in an array, "row"; its number from 1; and its fields or why it has none.
Line = tuple[str, int, dict[str, Any] | ValueError]


def read_file(path: str, hint: str) -> bytes:
    """The content of a file. Raises UsageError with that hint if it cannot be read."""
    try:
        with open(path, "rb") as file:
            return read_all(file, path, hint)
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}", hint) from problem


def read_all(file: BinaryIO, name: str, hint: str) -> bytes:
    """All that is in an open file, which may be endless; raises UsageError at more than `MAX_BYTES`."""
    content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise UsageError(f"{name} has more than {MAX_BYTES // 2**20} MiB", f"give it in pieces; {hint}")
    return content


def read_lines(content: bytes, name: str, required: tuple[tuple[str, ...], ...], hint: str) -> Iterator[Line]:
    """The lines of a file that are not empty: JSON objects, one array of them, or CSV, by the first character. Empty cells are no
    fields, and names of columns may be in any case.

    Raises UsageError: the content is not UTF-8, an array is not JSON, or the head of a CSV file lacks a column: one of each tuple
    in `required`.
    """
    if content.startswith(LFS):
        raise UsageError(f"{name} is a git-lfs pointer", LFS_HINT)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{name} is not UTF-8", "save it as UTF-8") from problem
    first = text.lstrip()[:1]
    if first == "[":
        return _array(text, name, hint)
    return _json_lines(text) if first in ("{", "") else _csv_lines(text, name, required, hint)


def _array(text: str, file: str, hint: str) -> Iterator[Line]:
    try:
        rows = loads(text)
    except ValueError as problem:
        raise UsageError(f"{file} is not JSON: {problem}", hint) from problem
    for number, fields in enumerate(rows, 1):
        yield "row", number, fields if isinstance(fields, dict) else ValueError("not a JSON object")


def _json_lines(text: str) -> Iterator[Line]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                fields = loads(line)
            except ValueError as problem:
                fields = ValueError(f"not JSON: {problem}") if isinstance(problem, json.JSONDecodeError) else problem
            yield "line", number, fields if isinstance(fields, dict | ValueError) else ValueError("not a JSON object")


def _csv_lines(text: str, file: str, required: tuple[tuple[str, ...], ...], hint: str) -> Iterator[Line]:
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        if missing := [names for names in required if not set(names) & set(reader.fieldnames or ())]:
            needed = f"the first line must name the columns, unless the lines are JSON; `{missing[0][0]}` is missing"
            found = shorten(", ".join(reader.fieldnames or ()), LONGEST_HEAD)
            raise UsageError(f"{file}: {needed} (found: {found})", hint)
        for row in reader:
            cells = {name: cell for name, cell in row.items() if cell}
            for name in LIST_COLUMNS:
                if name in cells:
                    cells[name] = [entry.strip() for entry in cells[name].split(SEPARATOR)]
            yield "line", reader.line_num, ValueError("more cells than the head has") if None in row else cells
    except csv.Error as problem:
        yield "line", reader.line_num + 1, ValueError(str(problem))  # line_num counts the last line that was whole
