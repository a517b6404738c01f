"""Tables and folded lines of text, for a terminal."""

import io
import textwrap
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from evoprune.report import precision

T = TypeVar("T")
LEAST_NAME = 8  # characters of the first column for which the others keep their width


def one_line(name: str) -> str:
    """A path as one line of printable text."""
    return "".join(c if c.isprintable() else "?" for c in name)


def short_name(model: str) -> str:
    """What titles call a model: the last part of its id or path."""
    return one_line(model).rpartition("/")[2]


def model_line(model: dict) -> str:
    """Its id, precision and device. `model`: of a document of results."""
    return f"{one_line(model['id'])}, {precision(model['dtype'], model.get('quantize'))}, {model['device']}"


def failures(document: dict) -> list[str]:
    """A line for each video that failed. `document`: of results."""
    return [one_line(f"failed: {each['video']}: {each['message']}") for each in document["failures"]]


def folded(texts: Iterable[str], width: int, **settings: bool) -> list[str]:
    """Lines no longer than `width`; those that continue one are indented, empty ones stay."""
    return [line for text in texts for line in textwrap.wrap(text, width, subsequent_indent="  ", **settings) or [""]]


def table(
    titles: Sequence[str], rows: Iterable[Sequence[str]], width: int, right: bool = True
) -> tuple[list[str], bool]:
    """The lines of a table, and whether it fits into `width` as it is. Where it does not, words are broken and none is cut.

    `right`: the columns after the first hold numbers, and the first gives way to them.
    """
    from rich.cells import cell_len
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    console = Console(file=io.StringIO(), width=width, color_system=None, highlight=False, markup=False, emoji=False)
    made, rows = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style=""), list(rows)
    for number, title in enumerate(titles):
        made.add_column(title, justify="right" if number and right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    wide = Measurement.get(console, console.options.update(width=10_000), made).maximum
    if right and wide > width:
        cells = [[*title.split(), *(row[number] for row in rows)] for number, title in enumerate(titles)]
        least = [max(map(cell_len, column), default=0) for column in cells[1:]]
        if width - sum(least) - 2 * len(least) >= LEAST_NAME:
            for column, columns in zip(made.columns[1:], least, strict=True):
                column.width = columns
    with console.capture() as captured:
        console.print(made)
    return [line.rstrip() for line in captured.get().splitlines()], wide <= width


def fitting(
    rows: Sequence[T], name: Callable[[T], str], columns: dict[str, Callable[[T], str]], drop: Iterable[str], width: int
) -> tuple[list[str], list[str]]:
    """A table of as many columns as there is room for: its lines, and their titles. Those of `drop` are left out, in this order.

    `name`: of a row, in the first column. `columns`: title and cell of the others.
    """
    for title in (None, *drop):
        columns = {each: cell for each, cell in columns.items() if each != title}
        body = [[name(row), *(cell(row) for cell in columns.values())] for row in rows]
        lines, fits = table(["", *columns], body, width)
        if fits:
            break
    return lines, list(columns)
