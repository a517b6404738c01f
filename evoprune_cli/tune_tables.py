"""The results of `evoprune tune` as a table for a terminal and as a chart."""

import textwrap
from collections.abc import Callable
from itertools import cycle

from evoprune.bench.chart import COLOURS, PALE, Panel, Point, Series, draw
from evoprune.text import counted
from evoprune_cli.tables import failures, fitting, folded, model_line, short_name

# Columns: what they hold, and what that means.
COLUMNS: dict[str, tuple[Callable[[dict], str], str]] = {
    "first token": (
        lambda row: f"{1 / row['first_token']:.2f}x",
        "how much sooner than unpruned, the median over videos",
    ),
    "agree": (
        lambda row: f"{100 * row['agreement']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})",
        "percent of the tokens of the unpruned model's answers at which the first choice is the same, estimated in the order of "
        "KL, with the 95% interval over videos",
    ),
    "KL": (lambda row: f"{row['kl']:.3f}", "mean of KL(unpruned, pruned) in nats a token"),
    "KL 95%": (lambda row: f"{row['kl_p95']:.3f}", "its 95th percentile"),
    "tokens": (lambda row: f"{100 * row['kept_share']:.0f}%", "visual tokens kept"),
    "work": (
        lambda row: f"{100 * row['live_share']:.0f}%",
        "rows that the vision encoder computes, a mean over its layers",
    ),
    "videos": (lambda row: f"{row['videos']}", "on which it was tried"),
}
# The same of recipes of operations.
OPERATIONS: dict[str, tuple[Callable[[dict], str], str]] = {
    "work": (
        lambda row: f"{100 * row['share']:.1f}%",
        "what is left of the work on visual tokens in the layers that leave some out",
    ),
    "operations": (lambda row: f"{row['operations']:,}", "left out"),
    "KL": (
        lambda row: "-" if row["kl"] is None else f"{row['kl']:.3f}",
        "mean of KL(unpruned, pruned) in nats a token; -: not measured",
    ),
    "agree": (
        lambda row: "-" if row["kl"] is None else f"{100 * row['agree']:.1f}%",
        "tokens with the same first choice",
    ),
}
DROPPED = ("KL 95%", "work", "videos", "tokens", "KL")  # in this order, where the terminal has too few characters


def _heading(document: dict, width: int) -> list[str]:
    videos = document["videos"]
    answers = (
        f"{counted(document['answer_tokens'], 'token')} of answers to {counted(document['questions'], 'question')}"
    )
    about = f"{videos['answered']} of {counted(videos['wanted'], 'video')}, {document['seconds']:.0f} s"
    return folded([model_line(document["model"]), f"{answers} about {about}"], width)


def operations_table(document: dict, width: int = 80) -> str:
    lines = _heading(document, width)
    if document["rows"]:
        cells = {title: cell for title, (cell, _) in OPERATIONS.items()}
        made, titles = fitting(
            document["rows"], lambda row: f"-b {row['budget']:g}", cells, ("operations", "agree"), width
        )
        said = "; ".join(f"{title}: {OPERATIONS[title][1]}" for title in titles)
        lines += ["", *made, "", *folded([said], width)]
    else:
        lines.append("no recipe was found: too little time")
    lines += failures(document)
    if document["error"]:
        lines += textwrap.wrap(f"{document['error']['message']}: not everything was measured", width)
    if document["complete"]:
        lines += ["", "the file of -o is the recipe: --method operations:recipe=FILE"]
    return "\n".join(lines) + "\n"


def table(document: dict, width: int = 80) -> str:
    """The results, no line longer than `width` if that is possible."""
    lines = _heading(document, width)
    said = [_verdict(document)]
    if document["rows"]:
        cells = {title: cell for title, (cell, _) in COLUMNS.items()}
        name = document["recommended"]
        made, titles = fitting(
            document["rows"], lambda row: f"{'*' if row['name'] == name else ' '} {row['name']}", cells, DROPPED, width
        )
        lines += ["", *made, ""]
        said.append("; ".join(f"{title}: {COLUMNS[title][1]}" for title in titles))
    said += [*document["notes"], *failures(document)]
    if document["error"]:
        said.append(f"{document['error']['message']}: not everything was tried")
    lines += folded(said, width, break_on_hyphens=False)
    if options := document["options"]:
        lines += ["", f"-b {options['budget']:g} --method {options['method']}"]
    return "\n".join(lines) + "\n"


def _verdict(document: dict) -> str:
    rows = {row["name"]: row for row in document["rows"]}
    goal = f"{100 * document['settings']['agree']:g}%"
    if name := document["recommended"]:
        gain = f"{1 / rows[name]['first_token']:.1f}x as fast, {100 * rows[name]['agreement']:.1f}% agree"
        return f"recommended: {name}, the fastest that is sure to agree at {goal} of the tokens: first token {gain}"
    if not rows:
        return "nothing was tried: too little time"
    row = rows[document["best"]]
    best = f"the best is {row['name']}: at least {100 * row['low']:.1f}%"
    return f"no setting is sure to agree at {goal} of the tokens; {best}"


def draw_chart(document: dict) -> str:
    """SVG: agreement against the time to the first token, a line a method, and the frontier."""
    rows, series = document["rows"], []
    for method, colour in zip(dict.fromkeys(row["method"] for row in rows), cycle(COLOURS), strict=False):
        mine = sorted((row for row in rows if row["method"] == method), key=lambda row: row["budget"])
        labels = {row["name"]: f"-b {row['budget']:g}" * row["frontier"] for row in mine}
        points = (Point.percent(100 * row["first_token"], row, "agreement", labels[row["name"]]) for row in mine)
        series.append(Series(method, tuple(points), colour))
    best = sorted((row for row in rows if row["frontier"]), key=lambda row: row["first_token"])
    edge = tuple(Point(100 * row["first_token"], 100 * row["agreement"]) for row in best)
    series.append(Series("frontier", edge, PALE, dashed=True))
    title = f"{short_name(document['model']['id'])}: agreement with the unpruned model against time to the first token"
    answers, videos = counted(document["answer_tokens"], "token"), counted(document["videos"]["answered"], "video")
    asked = f"{100 * document['settings']['agree']:g}% asked"
    facts = f"{answers} of answers about {videos}, 95% intervals over videos; {asked}"
    label = "first token, % of the unpruned model's"
    return draw(title, facts, [Panel("", label, "tokens that agree, %", tuple(series), from_zero=False)])
