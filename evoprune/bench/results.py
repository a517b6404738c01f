"""Results of `profile`, `eval`, `tune`, and `verify`, and helpers that format them as text, Markdown, or CSV tables."""

import csv
import io
import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from evoprune.report import precision
from evoprune.util import one_line, to_cell

MIN_NAME = 8  # minimum width of a table's first column, in characters, for the other columns to keep their widths
T = TypeVar("T")


class Results(ABC):
    """The results measured by a command so far."""

    @abstractmethod
    def document(self) -> dict[str, Any]:
        """Return the results as a JSON-serializable dict."""

    @abstractmethod
    def table(self, width: int) -> str:
        """Return the results as human-readable text, with lines of at most `width` columns if possible."""

    def to_json(self) -> str:
        """Return the document as a single line of ASCII-only JSON."""
        return json.dumps(self.document(), separators=(",", ":"), allow_nan=False)

    def text(self, form: str, width: int) -> str:
        """Return the results as text. `form` is "table" or "json"."""
        return self.table(width) if form == "table" else f"{self.to_json()}\n"

    def chart(self) -> str | None:
        """Return a chart of the results as an SVG document, or None if there is nothing to draw."""
        return None


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table.

    Attributes:
        title: The column heading.
        cell: A function that takes a row and returns the text of the cell.
        meaning: A note to print below the table, or "" if the title is self-explanatory.
        drop: If the terminal is too narrow, columns with the lowest numbers are dropped first. 0 means that the column is never
            dropped.
    """

    title: str
    cell: Callable[[T], str]
    meaning: str = ""
    drop: int = 0


def fitting(rows: Sequence[T], columns: Sequence[Column[T]], width: int) -> tuple[list[str], list[Column[T]]]:
    """Format a table, dropping columns until it fits into `width` characters. Returns its lines and the remaining columns."""
    droppable = sorted((column for column in columns if column.drop), key=lambda column: column.drop)
    for left_out in (None, *droppable):
        columns = [column for column in columns if column is not left_out]
        cells = [[column.cell(row) for column in columns] for row in rows]
        lines, fits = grid([column.title for column in columns], cells, width)
        if fits:
            break
    return lines, list(columns)


def meanings(columns: Sequence[Column]) -> str:
    return "; ".join(column.meaning for column in columns if column.meaning)


def grid(
    titles: Sequence[str], rows: Iterable[Sequence[str]], width: int, right: bool = True
) -> tuple[list[str], bool]:
    """Format a table. If it does not fit into `width` characters, words are broken, but nothing is truncated.

    Args:
        titles: The column headings.
        rows: The table cells.
        width: The terminal width, in characters.
        right: Whether all columns except the first one contain numbers. They are then right-aligned, and if the table is too wide,
            the first column is narrowed to make room for them.

    Returns:
        The lines of the table, and whether it fits.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="")
    rows = list(rows)
    for number, title in enumerate(titles):
        side = "right" if number and right else "left"
        table.add_column(title, justify=side, overflow="fold")
    for row in rows:
        table.add_row(*row)
    wide = Measurement.get(console, console.options.update(width=10_000), table).maximum
    if right and wide > width:
        cells = [[*title.split(), *(row[number] for row in rows)] for number, title in enumerate(titles)]
        min_widths = [max(map(cell_len, column), default=0) for column in cells[1:]]
        if width - sum(min_widths) - 2 * len(min_widths) >= MIN_NAME:
            for column, min_width in zip(table.columns[1:], min_widths, strict=True):
                column.width = min_width
    with console.capture() as captured:
        console.print(table)
    return [line.rstrip() for line in captured.get().splitlines()], wide <= width


def text_table(titles: Sequence[str], rows: Iterable[Sequence[str]], note: str, width: int) -> str:
    """Format a table of left-aligned text, followed by a note. If it does not fit into `width` characters, words are broken."""
    lines, _ = grid(titles, rows, width, right=False)
    return "\n".join([*lines, "", *folded([note], width)]) + "\n"


def markdown(rows: Iterable[T], columns: Sequence[Column[T]]) -> list[str]:
    """Format rows as a Markdown table, and return its lines."""
    lines = [[column.title for column in columns], ["---"] * len(columns)]
    lines += [[column.cell(row) for column in columns] for row in rows]
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as CSV with a header line, or an empty string if there are no rows."""
    out = io.StringIO()
    if rows:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: to_cell(value) for name, value in row.items()} for row in rows)
    return out.getvalue()


def folded(texts: Iterable[str], width: int, **settings: bool) -> list[str]:
    """Wrap strings to lines of at most `width` characters, indenting continuation lines. An empty string becomes an empty line."""
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ", **settings) or [""]]


def short_name(model: str) -> str:
    """Return the last component of a model ID or path, for use in titles."""
    return one_line(model).rpartition("/")[2]


def model_line(model: dict) -> str:
    """Return a line with the model's ID, precision, and device."""
    return f"{one_line(model['id'])}, {precision(model['dtype'], model.get('quantize'))}, {model['device']}"


def failures(document: dict) -> list[str]:
    """Return one line for each failed video."""
    return [one_line(f"failed: {entry['video']}: {entry['message']}") for entry in document["failures"]]
