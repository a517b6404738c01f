"""What a batch asks: rows from a JSONL or CSV file, or every question about every video. No torch."""

import csv
import hashlib
import io
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from evoprune.errors import EvopruneError, UsageError
from evoprune.evaluation.questions import LETTERS, Item
from evoprune.video.sampling import parse_time

FIELDS = "a row has video and question, and may have id, start, end, options and answer"
BETWEEN_OPTIONS = "|"  # in a cell of a CSV file
Place = tuple[str, dict[str, Any] | ValueError]  # where a row stands, and its fields, or why there are none


@dataclass(frozen=True)
class Row:
    """A question about a video, or about a part of it.

    Attributes:
        id: what names it in the results; where none was given, made of all the others but the answer.
        video: as it was written. `path`: where it is.
        start_s, end_s: the part to look at, in seconds; None for the end of the video.
        options: what there is to choose from, or nothing for an open question.
        answer: the expected one, whatever it is; only passed on.
    """

    id: str
    video: str
    path: str
    question: str
    start_s: float = 0.0
    end_s: float | None = None
    options: tuple[str, ...] = ()
    answer: Any = None

    @property
    def prompt(self) -> str:
        """What is asked, options included."""
        return Item(self.id, self.question, "", self.options).prompt

    @property
    def asked(self) -> dict[str, Any]:
        """What makes it this question and no other, as plain data."""
        facts = {name: getattr(self, name) for name in ("video", "question", "start_s", "end_s")}
        return facts | {"options": list(self.options)}


@dataclass(frozen=True)
class Part:
    """A part of a video, which is encoded once for all rows that ask about it. There is at least one."""

    rows: tuple[Row, ...]

    @property
    def video(self) -> str:
        return self.rows[0].video

    @property
    def path(self) -> str:
        return self.rows[0].path

    @property
    def range(self) -> dict[str, float | None]:
        """The fields of `SamplingOptions` that a row gives."""
        return {"start_s": self.rows[0].start_s, "end_s": self.rows[0].end_s}


def grouped(rows: Iterable[Row]) -> list[Part]:
    """Rows put together that one encoding serves; videos, their parts, and the rows of each in the order of their first rows."""
    videos: dict[str, dict[tuple, list[Row]]] = {}
    for row in rows:
        videos.setdefault(row.path, {}).setdefault((row.start_s, row.end_s), []).append(row)
    return [Part(tuple(found)) for ranges in videos.values() for found in ranges.values()]


def product_rows(
    videos: Sequence[str], questions: Sequence[str], start_s: float = 0.0, end_s: float | None = None
) -> list[Row]:
    """Every question about every video.

    Raises:
        UsageError: a video or a question that is empty or there twice, or a question that is no text.
    """
    for what, texts in (("video", videos), ("question", questions)):
        if twice := [text for i, text in enumerate(texts) if text in texts[:i]]:
            raise UsageError(f"the {what} {twice[0]!r} is there twice", f"name every {what} once")
    fields = [{"video": video, "question": question} for video in videos for question in questions]
    return _rows(((f"{row['video']}: {row['question']!r}", row) for row in fields), "", start_s, end_s)


def load_rows(path: str, start_s: float = 0.0, end_s: float | None = None) -> list[Row]:
    """The rows of a file, as `read_rows`; videos are named relative to it.

    Raises:
        UsageError: it cannot be read, and what `read_rows` raises.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
    except OSError as problem:
        raise UsageError(f"cannot read {path}: {problem.strerror}", "give a JSONL or CSV file of rows") from problem
    return read_rows(content, path, os.path.dirname(path), start_s, end_s)


def read_rows(content: bytes, name: str, folder: str, start_s: float = 0.0, end_s: float | None = None) -> list[Row]:
    """The rows of a file: JSON objects, one a line, or CSV with a head; which of them it is shows in its first character.

    Fields are `video` (relative to `folder`) and `question`, and perhaps `id`, `start` and `end` (seconds, or texts like 1:30),
    `options` (in CSV with | between them) and `answer`. Others are left alone; null, or an empty cell, is as good as missing.

    Args:
        content: UTF-8. name: of the file, for errors.
        start_s, end_s: for rows that have none of their own.

    Raises:
        UsageError: a line that is no such row, a row that is there twice, or no rows at all.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as problem:
        raise UsageError(f"{name} is not UTF-8", "give a JSONL or CSV file of rows") from problem
    lines = _json_lines if text.lstrip()[:1] in ("{", "[", "") else _csv_lines
    rows = _rows(((f"{name}, line {number}", row) for number, row in lines(text)), folder, start_s, end_s)
    if not rows:
        raise UsageError(f"{name} holds no rows", FIELDS)
    return rows


def _json_lines(text: str) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as problem:
                row = problem
            yield number, row if isinstance(row, dict | ValueError) else ValueError("not a JSON object")


def _csv_lines(text: str) -> Iterator[tuple[int, Any]]:
    head = text.partition("\n")[0]
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=head.count), strict=True)
    try:
        if missing := [name for name in ("video", "question") if name not in (reader.fieldnames or ())]:
            yield 1, ValueError(f"no JSON object, nor the head of a table with {missing[0]}")
            return
        for row in reader:
            cells = {name: cell for name, cell in row.items() if cell}
            if "options" in cells:
                cells["options"] = [option.strip() for option in cells["options"].split(BETWEEN_OPTIONS)]
            yield reader.line_num, ValueError("more cells than the head has") if None in row else cells
    except csv.Error as problem:
        yield reader.line_num + 1, ValueError(str(problem))  # the last one that was whole is counted


def _rows(places: Iterable[Place], folder: str, start_s: float, end_s: float | None) -> list[Row]:
    """Told is the first row that is wrong, and how many more there are."""
    rows: dict[str, Row] = {}
    seen: dict[str, str] = {}
    wrong: list[tuple[str, str]] = []
    for place, fields in places:
        try:
            row = _row(fields, folder, start_s, end_s)
        except (ValueError, EvopruneError) as problem:
            wrong.append((f"{place}: {problem}", FIELDS))
            continue
        if row.id in rows:
            wrong.append((f"{place}: the same id, or question, as {seen[row.id]}", "give every row an id of its own"))
        rows[row.id], seen[row.id] = row, place
    if wrong:
        message, hint = wrong[0]
        raise UsageError(message + (f" (and {len(wrong) - 1:,} more)" if len(wrong) > 1 else ""), hint)
    return list(rows.values())


def _row(fields: dict[str, Any] | ValueError, folder: str, start_s: float, end_s: float | None) -> Row:
    if isinstance(fields, ValueError):
        raise fields
    fields = {"start": start_s, "end": end_s} | {name: value for name, value in fields.items() if value is not None}
    start, end = _seconds(fields, "start"), None if fields["end"] is None else _seconds(fields, "end")
    if end is not None and end <= start:
        raise ValueError(f"end {end:g} s is not after start {start:g} s")
    options = fields.get("options", [])
    if not isinstance(options, list) or len(options) == 1 or len(options) > len(LETTERS):
        raise ValueError(f"options are not a list of 2 to {len(LETTERS)} texts")
    video = _filled(fields, "video")
    row = Row(
        id="",
        video=video,
        path=os.path.join(folder, video),
        question=_text(fields, "question"),
        start_s=start,
        end_s=end,
        options=tuple(_text({"option": option}, "option") for option in options),
        answer=fields.get("answer"),
    )
    name = fields.get("id", _digest(row))
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise ValueError("id is neither a text nor a whole number")
    return replace(row, id=str(name))


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(row.asked, sort_keys=True).encode()).hexdigest()[:16]


def _filled(fields: dict, name: str) -> str:
    value = fields.get(name)
    if value is None:
        raise ValueError(f"no {name}")
    if not isinstance(value, str):
        raise ValueError(f"{name} is not a text")
    if not value.strip():
        raise ValueError(f"{name} is empty")
    return value


def _text(fields: dict, name: str) -> str:
    value = _filled(fields, name)
    if not is_text(value):
        raise ValueError(f"{name} is not valid text")
    return value


def is_text(value: str) -> bool:
    """Whether it is Unicode; what the shell hands over in another encoding is not."""
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _seconds(fields: dict, name: str) -> float:
    value = fields[name]
    if isinstance(value, str):
        return parse_time(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise ValueError(f"{name} is not a time in seconds")
    return float(value)
