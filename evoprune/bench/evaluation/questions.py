"""Questions with known answers, video by video (or picture by picture), from a JSONL or CSV file. No torch."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evoprune.batch.rows import LETTERS, Row, Rules, load_rows
from evoprune.bench.evaluation.grading import chosen_option, normalised


@dataclass(frozen=True)
class Video:
    """A video and the rows that ask about it. Results name it by `name`, and intervals are clustered by it."""

    name: str
    path: Path
    rows: tuple[Row, ...]


def load_questions(path: Path) -> list[Video]:
    """The questions of a file, video by video in the order of their first lines.

    Beside the fields that `batch.rows.read_rows` reads, a row must have `answer` (with `options`: a letter or an option's text),
    and may have `type` and `groups` (in CSV separated by |). Ids default to the line's number.

    Raises UsageError: the file cannot be read, rows are wrong or repeat an id, or there are none.
    """
    videos: dict[str, list[Row]] = {}
    for row in load_rows(str(path), rules=GRADED):
        videos.setdefault(row.video, []).append(row)
    return [Video(name, Path(rows[0].paths[0]), tuple(rows)) for name, rows in videos.items()]


def _complete(row: Row, fields: dict[str, Any]) -> Row:
    texts = [normalised(option) for option in row.options]
    groups, type = fields.get("groups", []), fields.get("type")
    answer = str(row.answer) if isinstance(row.answer, int) else row.answer
    for wrong, problem in (
        (len(set(texts)) < len(texts), f"options are 2 to {len(LETTERS)} different texts"),
        (not isinstance(groups, list) or not all(isinstance(g, str) for g in groups), "groups is not a list of texts"),
        (len(row.inputs) > 1, "an evaluation asks about one video or picture at a time"),
        (row.subtitles is not None, "subtitles are not read in an evaluation"),
        (answer is None, "no answer"),
        (not isinstance(answer, str) or not answer.strip(), "answer is not a text"),
    ):
        if wrong:
            raise ValueError(problem)
    if texts:  # a text goes before a letter
        choice = texts.index(normalised(answer)) if normalised(answer) in texts else chosen_option(answer, row.options)
        if choice is None:
            raise ValueError(f"the answer {answer!r} is none of the options")
        answer = row.options[choice]
    return replace(row, answer=answer, type=None if type is None else str(type), groups=tuple(groups))


GRADED = Rules(
    fields="a row has video, question and answer, and may have id, start, end, fps, frames, frame_rate, max_new_tokens, options, "
    "type and groups",
    file="give a JSONL or CSV file of questions",
    numbered=True,
    complete=_complete,
)
