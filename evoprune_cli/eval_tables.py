"""The results of `evoprune eval` as tables for a terminal and as a chart."""

from collections.abc import Callable, Sequence
from itertools import cycle, product

from evoprune.bench.chart import COLOURS, INK, PALE, Panel, Point, Series, draw
from evoprune.bench.scores import LEAST_QUESTIONS, TYPE, is_tie, same_tokens
from evoprune.text import budget_text, counted
from evoprune_cli.tables import failures, fitting, folded, model_line, one_line, short_name
from evoprune_cli.tables import table as rendered

Cell = Callable[[dict], str]
# Of columns, those of answers and those of costs.
LEGEND = (
    {
        "accuracy": "accuracy, in percent, with its 95% interval over videos",
        "vs full": "vs full: the paired difference in points, with its interval, a tie where that includes 0",
        "kept": "kept: of full's accuracy",
    },
    {
        "tokens": "tokens that the language model reads, mean of a question and of its layers",
        "live": "live: share of the rows that the tower computes, mean over its layers",
        "TFLOP": "TFLOP: operations of tower and prefill at 3B dimensions",
    },
)
UNPARSED = "unparsed: answers that name none of the options, or several; they count as wrong"


def table(document: dict, width: int = 80) -> str:
    """The results: all questions, then group by group; no line longer than `width`."""
    lines = folded(_head(document), width)
    rows = [row for row in document["rows"] if row["group"] == "all"]
    notes: list[str] = []
    if rows:
        columns = dict(ANSWERS)
        if any(row["unparseable"] for row in rows):
            columns["unparsed"] = lambda row: f"{row['unparseable']:,}"
        made, titles = _fitting(rows, columns, width)
        lines += ["", *made, *_too_small([rows[0]], width)]
        versus, legend = _versus_first(rows, width)
        costs, of_costs = _fitting(rows, COSTS, width)
        lines += [*versus, "", *costs]
        notes = [_explained(LEGEND[0], titles), *legend, _explained(LEGEND[1], of_costs)]
        notes += [UNPARSED] * ("unparsed" in titles)
        names, rest = [row["name"] for row in rows], [row for row in document["rows"] if row["group"] != "all"]
        for title, typed in (("group", False), ("type", True)):
            found = [row for row in rest if row["group"].startswith("type:") == typed]
            lines += _by_group(title, found, names, width)
    lines.append("")
    if document["error"]:
        notes.append(f"{document['error']['message']}: not all videos were evaluated")
    lines += folded((*notes, *failures(document), *document["notes"]), width)
    return "\n".join(lines) + "\n"


def _head(document: dict) -> list[str]:
    videos, questions = document["videos"], counted(document["items"]["answered"], "question")
    about = f"{videos['evaluated']} of {counted(videos['wanted'], 'video')}"
    failed = f", {videos['failed']} failed" if videos["failed"] else ""
    return [
        model_line(document["model"]),
        f"{one_line(document['settings']['data'])}: {questions} about {about}{failed}",
    ]


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _accuracy(row: dict) -> str:
    return f"{_percent(row['accuracy'])} ({_percent(row['low'])}-{_percent(row['high'])})"


def _difference(row: dict, name: str = "difference") -> str:
    if row["row"] == "full":
        return ""
    value, low, high = (_percent(row[f"{name}{end}"], "+") for end in ("", "_low", "_high"))
    if low == "-":  # too few videos
        return value
    return f"{'tie ' if is_tie(row, name) else ''}{value} ({low} to {high})"


# Columns to drop where the terminal has too few characters, in this order: `LEAST`.
ANSWERS: dict[str, Cell] = {
    "accuracy": _accuracy,
    "vs full": _difference,
    "kept": lambda row: "" if row["row"] == "full" else _percent(row["kept_of_full"]),
}
COSTS: dict[str, Cell] = {
    "tokens": lambda row: f"{row['layer_tokens']:,.0f}",
    "of all": lambda row: f"{_percent(row['kept_share'] * row['layer_tokens'] / row['tokens'])}%",
    "live": lambda row: f"{row['live_share']:.2f}",
    "tower": lambda row: f"{row['tflop_3b_tower']:,.3g}",
    "prefill": lambda row: f"{row['tflop_3b_prefill']:,.3g}",
    "TFLOP": lambda row: f"{row['tflop_3b']:,.3g}",
}
LEAST = ("kept", "vs full", "of all", "prefill", "tower", "live", "unparsed")


def _fitting(rows: list[dict], columns: dict[str, Cell], width: int) -> tuple[list[str], list[str]]:
    return fitting(rows, lambda row: row["name"], columns, LEAST, width)


def _explained(legend: dict[str, str], titles: Sequence[str]) -> str:
    return "; ".join(text for title, text in legend.items() if title in titles)


def _versus_first(rows: list[dict], width: int) -> tuple[list[str], list[str]]:
    """The other methods against the first one, and a note on it. Nothing for one method, or where the terminal is too narrow."""
    others, of_name = [row for row in rows if row["first"]], {row["name"]: row for row in rows}
    if not others:
        return [], []
    first = one_line(of_name[others[0]["first"]]["method"])
    marks = [" *" * (not same_tokens(row, of_name[row["first"]])) for row in others]
    body = [(row["name"] + mark, _difference(row, "first_difference")) for row, mark in zip(others, marks, strict=True)]
    made, fits = rendered(["", f"vs {first}"], body, width)
    if not fits:
        return [], []
    said = [f"* reads another number of tokens than {first} at this budget; how many: below"] if any(marks) else []
    legend = f"vs {first}: the paired difference to the first method, at the same budget"
    return ["", *made, *folded(said, width)], [legend]


def _by_group(title: str, rows: list[dict], names: list[str], width: int) -> list[str]:
    """Accuracy of each group in percent, a column a row of the table above; in several tables where one is too wide."""
    groups: dict[str, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row
    lines, rest = [], names
    while rest and groups:
        for count in range(len(rest), 0, -1):
            body = []
            for group, found in groups.items():
                cells = [_percent(found[name]["accuracy"]) for name in rest[:count]]
                body.append([group.removeprefix(TYPE), f"{found[names[0]]['n']:,}", *cells])
            made, fits = rendered([title, "n", *rest[:count]], body, width)
            if fits:
                break
        lines += ["", *made]
        rest = rest[count:]
    return lines + _too_small([found[names[0]] for found in groups.values()], width, title)


def _too_small(rows: Sequence[dict], width: int, title: str = "") -> list[str]:
    """A line below a table with too few questions for a measurement. `rows`: one a group; `title`: what groups are called."""
    names = [one_line(row["group"].removeprefix(TYPE)) for row in rows if row["n"] < LEAST_QUESTIONS]
    if not names:
        return []
    where = f" in {f'every {title}' if len(names) == len(rows) else ', '.join(names)}" if title else ""
    said = f"fewer than {LEAST_QUESTIONS} questions{where}: an example, not a measurement"
    return folded([said], width)


def draw_chart(document: dict) -> str:
    """SVG: accuracy against tokens, and against cost, a line a method."""
    rows = [row for row in document["rows"] if row["group"] == "all"]
    fixed = {"full": INK, "blind": PALE}
    methods = dict.fromkeys(row["method"] for row in rows if row["row"] == "method")
    looks = dict(zip(methods, cycle(product((False, True), COLOURS)), strict=False))
    panels = []
    for cost, title, label in (
        ("layer_tokens", "By tokens", "visual tokens read, mean of a question and of the layers"),
        ("tflop_3b", "By cost", "TFLOP of tower and prefill at 3B dimensions"),
    ):
        series = []
        for name, (hollow, colour) in ({name: (False, colour) for name, colour in fixed.items()} | looks).items():
            mine = [row for row in rows if row["row" if name in fixed else "method"] == name]
            labels = [f"-b {budget_text(row['budget'])}" * (row["row"] == "method") for row in mine]
            points = [Point.percent(row[cost], row, "accuracy", label) for row, label in zip(mine, labels, strict=True)]
            points.sort(key=lambda point: point.x)
            if name == "blind" and points:  # a level, not a point: it reads nothing of the video
                points = [Point(0, points[0].y), Point(rows[0][cost], points[0].y)]
            if points:
                series.append(Series(name, tuple(points), colour, dashed=name == "blind", hollow=hollow))
        panels.append(Panel(title, label, "accuracy, %", tuple(series), from_zero=False))
    data = one_line(document["settings"]["data"])
    facts = f"{data}, {counted(rows[0]['n'], 'question')} about {counted(rows[0]['videos'], 'video')}"
    title = f"{short_name(document['model']['id'])}: accuracy against tokens and against cost"
    return draw(title, f"{facts}, 95% intervals over videos", panels)
