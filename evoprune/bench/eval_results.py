"""The results of `evoprune eval` (accuracy and cost at each budget) as tables, CSV, and a chart. Does not import torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from evoprune.bench.chart import INK, PALE, Panel, Point, draw, lines
from evoprune.bench.results import (
    Column,
    Results,
    as_csv,
    failures,
    fitting,
    folded,
    grid,
    meanings,
    model_line,
    short_name,
)
from evoprune.bench.scores import ALL, FULL, LEAST_QUESTIONS, METHOD, TYPE, is_tie, same_tokens
from evoprune.util import budget_text, counted, one_line

Row = dict[str, Any]  # from `scores.score_rows`


@dataclass
class EvalResults(Results):
    """The results of an evaluation, stored in a document with the schema `evoprune/eval@1`."""

    found: dict[str, Any]

    def document(self) -> dict[str, Any]:
        return self.found

    def text(self, form: str, width: int) -> str:
        """Return the results as text. `form` is "table", "csv" or "json"."""
        return self._csv() if form == "csv" else super().text(form, width)

    def table(self, width: int) -> str:
        """Return tables of accuracy and cost for all questions, followed by accuracy by group and by question type."""
        found = self.found
        videos = found["videos"]
        asked = counted(found["items"]["answered"], "question")
        about = f"{asked} about {videos['evaluated']} of {counted(videos['wanted'], 'video')}"
        if videos["failed"]:
            about += f", {videos['failed']} failed"
        output = folded([model_line(found["model"]), f"{one_line(found['settings']['data'])}: {about}"], width)
        rows = [row for row in found["rows"] if row["group"] == ALL]
        notes: list[str] = []
        if rows:
            columns = [NAME, *ANSWERS]
            if any(row["brier"] is not None for row in rows):
                columns.append(BRIER)
            if any(row["unparseable"] for row in rows):
                columns.append(UNPARSED)
            answers, of_answers = fitting(rows, columns, width)
            output += ["", *answers, *_too_small([rows[0]], width)]
            versus, legend = _versus_first(rows, width)
            costs, of_costs = fitting(rows, [NAME, *COSTS], width)
            output += [*versus, "", *costs]
            notes = [meanings([column for column in of_answers if column in ANSWERS]), *legend, meanings(of_costs)]
            notes += [column.meaning for column in (UNPARSED, BRIER) if column in of_answers]
            names = [row["name"] for row in rows]
            rest = [row for row in found["rows"] if row["group"] != ALL]
            for title, typed in (("group", False), ("type", True)):
                matching = [row for row in rest if row["group"].startswith(TYPE) == typed]
                output += _by_group(title, matching, names, width)
        output.append("")
        if found["error"]:
            notes.append(f"{found['error']['message']}: not all videos were evaluated")
        output += folded((*notes, *self.remarks()), width)
        return "\n".join(output) + "\n"

    def remarks(self) -> list[str]:
        """Return a line for each failed video, followed by the notes."""
        return [*failures(self.found), *self.found["notes"]]

    def _csv(self) -> str:
        """Return all rows as CSV. Every row repeats the model and the data, and unknown values are left blank."""
        model = {f"model_{name}": one_line(self.found["model"][name]) for name in ("id", "dtype", "device")}
        common = {"data": one_line(self.found["settings"]["data"])} | model
        return as_csv([row | common for row in self.found["rows"]])

    def chart(self) -> str | None:
        """Draw two plots with one line per method: accuracy against tokens, and accuracy against cost."""
        found = self.found
        rows = [row for row in found["rows"] if row["group"] == ALL]
        if not rows:
            return None
        panels = []
        for cost, title, label in (
            ("layer_tokens", "By tokens", "visual tokens read, averaged over questions and layers"),
            ("tflop_3b", "By cost", "TFLOP of tower and prefill at 3B dimensions"),
        ):
            points: dict[str, list[Point]] = {}
            for row in rows:
                pruned = row["row"] == METHOD
                text = f"-b {budget_text(row['budget'])}" if pruned else ""
                name = row["method"] if pruned else row["row"]
                points.setdefault(name, []).append(Point.percent(row[cost], row, "accuracy", text))
            if "blind" in points:  # drawn as a horizontal line, because it does not read the video
                y = points["blind"][0].y
                points["blind"] = [Point(0, y), Point(rows[0][cost], y)]
            series = lines(points, {FULL: INK, "blind": PALE}, ["blind"])
            panels.append(Panel(title, label, "accuracy, %", series, from_zero=False))
        data = one_line(found["settings"]["data"])
        facts = f"{data}, {counted(rows[0]['n'], 'question')} about {counted(rows[0]['videos'], 'video')}"
        title = f"{short_name(found['model']['id'])}: accuracy against tokens and against cost"
        return draw(title, f"{facts}, 95% intervals over videos", panels)


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _difference(row: Row, name: str = "difference") -> str:
    if row["row"] == FULL:
        return ""
    value, low, high = (_percent(row[f"{name}{end}"], "+") for end in ("", "_low", "_high"))
    if low == "-":  # too few videos for an interval
        return value
    interval = f"{value} ({low} to {high})"
    return f"tie {interval}" if is_tie(row, name) else interval


NAME: Column[Row] = Column("", lambda row: row["name"])
ANSWERS: list[Column[Row]] = [
    Column(
        "accuracy",
        lambda row: f"{_percent(row['accuracy'])} ({_percent(row['low'])}-{_percent(row['high'])})",
        "accuracy in percent, with its 95% interval over videos",
    ),
    Column(
        "vs full",
        _difference,
        "vs full: paired difference in points with its interval; a tie if the interval includes 0",
        drop=2,
    ),
    Column(
        "kept",
        lambda row: "" if row["row"] == FULL else _percent(row["kept_of_full"]),
        "kept: percent of full's accuracy",
        drop=1,
    ),
]
BRIER: Column[Row] = Column(
    "Brier",
    lambda row: "-" if row["brier"] is None else f"{row['brier']:.3f}",
    "Brier: squared error of the options' probabilities, averaged over questions with options; 0 is certain and right, "
    "2 certain and wrong",
)
UNPARSED: Column[Row] = Column(
    "unparsed",
    lambda row: f"{row['unparseable']:,}",
    "unparsed: answers that name no option or several; they count as wrong",
    drop=3,
)
COSTS: list[Column[Row]] = [
    Column(
        "tokens",
        lambda row: f"{row['layer_tokens']:,.0f}",
        "tokens: visual tokens read by the language model, averaged over questions and layers",
    ),
    Column("of all", lambda row: f"{_percent(row['kept_share'] * row['layer_tokens'] / row['tokens'])}%", drop=1),
    Column(
        "live",
        lambda row: f"{row['live_share']:.2f}",
        "live: share of rows computed by the tower, averaged over its layers",
        drop=4,
    ),
    Column("tower", lambda row: f"{row['tflop_3b_tower']:,.3g}", drop=3),
    Column("prefill", lambda row: f"{row['tflop_3b_prefill']:,.3g}", drop=2),
    Column("TFLOP", lambda row: f"{row['tflop_3b']:,.3g}", "TFLOP: operations of tower and prefill at 3B dimensions"),
]


def _versus_first(rows: list[Row], width: int) -> tuple[list[str], list[str]]:
    """Return a table that compares the first method with all other methods, along with an explanatory note.

    Both are empty if there is only one method, or if the terminal is too narrow.
    """
    others = [row for row in rows if row["first"]]
    of_name = {row["name"]: row for row in rows}
    if not others:
        return [], []
    first = one_line(of_name[others[0]["first"]]["method"])
    marks = [" *" * (not same_tokens(row, of_name[row["first"]])) for row in others]
    body = [(row["name"] + mark, _difference(row, "first_difference")) for row, mark in zip(others, marks, strict=True)]
    drawn, fits = grid(["", f"vs {first}"], body, width)
    if not fits:
        return [], []
    if any(marks):
        drawn += folded(
            [f"* reads a different number of tokens than {first} at this budget; see the table below"], width
        )
    legend = f"vs {first}: paired difference from the first method at the same budget"
    return ["", *drawn], [legend]


def _by_group(title: str, rows: list[Row], names: list[str], width: int) -> list[str]:
    """Return tables of accuracy by group, with one column per main table row. Tables that are too wide are split."""
    groups: dict[str, dict[str, Row]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row
    output = []
    rest = names
    while rest and groups:
        for count in range(len(rest), 0, -1):
            body = []
            for group, by_name in groups.items():
                cells = [_percent(by_name[name]["accuracy"]) for name in rest[:count]]
                body.append([group.removeprefix(TYPE), f"{by_name[names[0]]['n']:,}", *cells])
            drawn, fits = grid([title, "n", *rest[:count]], body, width)
            if fits:
                break
        output += ["", *drawn]
        rest = rest[count:]
    return output + _too_small([by_name[names[0]] for by_name in groups.values()], width, title)


def _too_small(rows: Sequence[Row], width: int, title: str = "") -> list[str]:
    """Return a line-wrapped note that lists the groups with too few questions for a measurement.

    Args:
        rows: One row per group.
        width: The maximum width of a line, in characters.
        title: The word for a group, for example "type". Empty if there is only one group.
    """
    names = [one_line(row["group"].removeprefix(TYPE)) for row in rows if row["n"] < LEAST_QUESTIONS]
    if not names:
        return []
    where = ""
    if title and len(names) == len(rows):
        where = f" in every {title}"
    elif title:
        where = f" in {', '.join(names)}"
    note = f"fewer than {LEAST_QUESTIONS} questions{where}: an example, not a measurement"
    return folded([note], width)
