"""`evoprune eval`: accuracy against budget, beside what it costs, as tables and as a chart."""

import csv
import io
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle, product
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.bench.chart import COLOURS, INK, PALE, Panel, Point, Series, draw
from evoprune.errors import UsageError
from evoprune.session.options import PipelineOptions, SamplingOptions
from evoprune.util import budget_text, counted, one_line
from evoprune_cli import options as opt
from evoprune_cli.running import SOME_FAILED, check_chart, check_new_folder, prepare, rescuing, show, write
from evoprune_cli.terminal import (
    check_output,
    failures,
    fitting,
    folded,
    model_line,
    naming_pipe,
    note,
    progress,
    short_name,
    table,
)

if TYPE_CHECKING:
    from evoprune.bench.questions import VideoQuestions
    from evoprune.session.ahead import Asked

# What may be given beside --resume DIR alone: all that results do not depend on.
BESIDE_RESUME = (
    "--resume", "--processes", "--chart", "--format", "--json", "-q", "--quiet", "--debug", "--device", "--threads", "--offline",
    "--store-quantized",
)  # fmt: skip


@opt.command(
    *PipelineOptions.KINDS,
    short="data limit budget method blind model output resume chart form json quiet",
    without=(
        "load_format", "budget", "method", "seed", "start_s", "end_s", "decoder", "subtitles", "max_subtitle_tokens",
        "temperature", "top_p", "top_k", "system", "stop", "logprobs", "schema",
        "regex", "choices", "choice_score",
    ),
    max_new_tokens={"unless_typed": 64},
)  # fmt: skip
def evaluate(
    *,
    data: opt.option(
        str | None,
        "--data FILE",
        "Questions: JSONL or CSV rows with video, question, answer and perhaps id, options, type, groups.",
        "Data",
    ) = None,
    limit: opt.option(int | None, "--limit N", "At most N videos; default: all.", "Data", min=1) = None,
    group: opt.option(list[str] | None, "--group LIST", "Only questions of these groups.", "Data") = None,
    seed: opt.option(int, "--seed <int>", "Seed of methods that draw at random.", "Data", min=0, max=2**31 - 1) = 0,
    budget: opt.Budgets = None,
    method: opt.Methods = None,
    blind: opt.option(
        bool, "--blind", "Also ask about a grey video of the same size and length, to measure guessing.", opt.SWEEP
    ) = False,
    score: opt.option(
        str,
        "--score",
        "How questions with options are graded: by the text of the answer; or the most likely option is the answer, without "
        "letters, and the table has a Brier score.",
        opt.SWEEP,
        **opt.one_of("text", "likelihood"),
    ) = "text",
    options: opt.MakeOptions,
    processes: opt.option(
        int,
        "--processes N",
        "Videos at a time, each in a process with its own copy of the model.",
        opt.OUTPUT,
        min=1,
        max=256,
    ) = 1,
    output: opt.option(
        str | None,
        "-o --output DIR",
        "Write settings, samples and results there; if it exists, to DIR-2 and so on.",
        opt.OUTPUT,
    ) = None,
    resume: opt.option(
        str | None,
        "--resume DIR",
        "Continue the interrupted run in DIR with its settings.",
        opt.OUTPUT,
    ) = None,
    chart: opt.option(
        str | None, "--chart FILE.svg", "Draw accuracy against tokens and against cost.", opt.OUTPUT
    ) = None,
    form: opt.option(
        str,
        "--format",
        "As a table, or as CSV: a line for each row and group.",
        opt.OUTPUT,
        **opt.one_of("table", "csv"),
    ) = "table",
    json: opt.JsonResults = False,
    quiet: opt.Quiet = False,
) -> int:
    """Measure accuracy against budget, on questions with known answers.

    Every setting answers the same questions, the full budget first. Settings are compared with it, and with the first method at
    the same budget. Intervals are 95%, over videos. Cost is in operations at the 3B model's dimensions. Exit code 6: done, but some
    videos failed.

    \b
    evoprune eval --data samples/questions.jsonl
    evoprune eval --data my.jsonl -b 0.25,0.1 --method evoprune,divprune -o runs/a
    evoprune eval --data my.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --json
    """
    pipeline = options()
    if form not in FORMATS:
        raise UsageError(f"--format {form!r} is unknown", f"one of {', '.join(FORMATS)}")
    if json and form != "table":
        raise UsageError(f"--json and --format {form} exclude each other", "leave one out")
    if data is None and resume is None:
        raise UsageError("no questions", "--data FILE, a JSONL or CSV file whose rows have video, question and answer")
    from evoprune.bench.eval_folder import no_folder, stored_settings
    from evoprune.bench.questions import load_questions

    # settings: of the run to go on with, or of the command line
    record = None
    given = {}
    if data is None:
        check_output()
        if refused := [arg for arg in sys.argv[2:] if arg[:1] == "-" and arg.partition("=")[0] not in BESIDE_RESUME]:
            hint = "leave it out, or give all settings, --data included"
            raise UsageError(f"{refused[0]} is given beside --resume, which has the settings of its run", hint)
        record = stored_settings(Path(resume))
        data = str(record.get("data"))
    else:
        sweep = opt.sweep(budget, method, pipeline.pruning.method_args, named=True)
        check_output()
        if output is not None and resume is not None:
            raise UsageError("-o and --resume exclude each other", "--resume goes on in its own folder")
        groups = tuple(dict.fromkeys(opt.listed(group)))
        given = {**sweep, "data": data, "blind": blind, "seed": seed, "score": score, "limit": limit, "groups": groups}
        given |= {"model": pipeline.model, "sampling": pipeline.sampling, "generation": pipeline.generation}
    if output is not None:
        check_new_folder(output)
    check_chart(chart, beside=output, inputs=[data])
    with naming_pipe(data):
        videos = load_questions(Path(data))
    if score == "likelihood" and not any(row.options for video in videos for row in video.rows):
        raise UsageError(
            "--score likelihood is about options, and no question has any", "leave it out, or give options"
        )
    evaluation = None

    def deliver(error: dict[str, Any] | None = None) -> None:
        """Writes the results so far: to stdout first, then into the folder, then as a chart."""
        document = evaluation.document(error)
        try:
            if json or document["rows"] or error is None:
                show(document, FORMATS[form], json)
                if form == "csv" and not quiet:
                    for line in (*failures(document), *document["notes"]):
                        note(line)
        finally:  # also where nobody reads stdout
            if evaluation.folder:
                evaluation.folder.finish(document)
            write(document, None, chart, draw_chart)

    def rescue(error: dict[str, Any]) -> None:
        try:
            deliver(error)
        finally:
            if evaluation.folder and not quiet:
                note(f"to go on: evoprune eval --resume {shlex.quote(str(evaluation.folder.path))}")

    from evoprune.session.ahead import Ahead
    from evoprune.session.loading.description import describe

    with (
        rescuing(lambda: evaluation is not None and evaluation.loaded, rescue),
        progress(not quiet) as tell,
        Ahead() as ahead,
    ):
        tell("loading libraries")
        prepare()
        model = None
        if record is None:
            model = describe(pipeline.model)
            if processes == 1:
                ahead.begin(_first(videos, groups, limit, pipeline.sampling), model)
        from evoprune.bench.eval import EvalSettings, Evaluation, digest

        try:
            settings = EvalSettings(**given) if record is None else EvalSettings.of_record(record, pipeline.model)
        except (KeyError, TypeError, ValueError) as problem:
            if record is None:
                raise
            raise no_folder(Path(resume)) from problem
        evaluation = Evaluation(replace(settings, digest=digest(Path(data))), videos)
        if resume is not None:
            evaluation.keep_in(Path(resume), resume=True)
        tell("loading model")
        evaluation.load(partial(tell, "quantizing"), model)
        if output is not None:
            evaluation.keep_in(Path(output))
            if not quiet and evaluation.folder.path != Path(output):
                note(f"{output} is there already: writing to {evaluation.folder.path}")
        evaluation.ahead = ahead
        evaluation.run(tell, processes)
    deliver()
    return SOME_FAILED if evaluation.failed else 0


def _first(
    videos: list["VideoQuestions"], groups: Sequence[str], limit: int | None, sampling: SamplingOptions
) -> list["Asked"]:
    """Return what is looked at of the first videos."""
    from evoprune.batch.rows import group_by_span
    from evoprune.bench.questions import of_groups
    from evoprune.session.ahead import FIRST

    chosen = of_groups(videos, groups)[:limit]
    spans = ((video, group_by_span(video.rows)[0]) for video in chosen[:FIRST])
    return [([video.path], sampling.but(**span.sampling)) for video, span in spans]


# The tables.

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
BRIER = (
    "Brier: squared error of the options' probabilities, mean of questions with options; 0 is certain and right, "
    "2 certain and wrong"
)
UNPARSED = "unparsed: answers that name none of the options, or several; they count as wrong"


def render(document: dict, width: int = 80) -> str:
    """Return the results: all questions, then group by group; no line longer than `width`."""
    videos = document["videos"]
    asked = counted(document["items"]["answered"], "question")
    about = f"{asked} about {videos['evaluated']} of {counted(videos['wanted'], 'video')}"
    if videos["failed"]:
        about += f", {videos['failed']} failed"
    lines = folded([model_line(document["model"]), f"{one_line(document['settings']['data'])}: {about}"], width)
    rows = [row for row in document["rows"] if row["group"] == "all"]
    notes: list[str] = []
    if rows:
        name = itemgetter("name")
        columns = dict(ANSWERS)
        if any(row["brier"] is not None for row in rows):
            columns["Brier"] = lambda row: "-" if row["brier"] is None else f"{row['brier']:.3f}"
        if any(row["unparseable"] for row in rows):
            columns["unparsed"] = lambda row: f"{row['unparseable']:,}"
        answers, titles = fitting(rows, name, columns, DROPPED, width)
        lines += ["", *answers, *_too_small([rows[0]], width)]
        versus, legend = _versus_first(rows, width)
        costs, of_costs = fitting(rows, name, COSTS, DROPPED, width)
        lines += [*versus, "", *costs]
        notes = [_explained(LEGEND[0], titles), *legend, _explained(LEGEND[1], of_costs)]
        notes += [UNPARSED] * ("unparsed" in titles) + [BRIER] * ("Brier" in titles)
        names = [row["name"] for row in rows]
        rest = [row for row in document["rows"] if row["group"] != "all"]
        for title, typed in (("group", False), ("type", True)):
            matching = [row for row in rest if row["group"].startswith("type:") == typed]
            lines += _by_group(title, matching, names, width)
    lines.append("")
    if document["error"]:
        notes.append(f"{document['error']['message']}: not all videos were evaluated")
    lines += folded((*notes, *failures(document), *document["notes"]), width)
    return "\n".join(lines) + "\n"


def as_csv(document: dict, width: int = 0) -> str:
    """Return the rows of all groups as CSV, each complete in itself, and empty where a value is unknown; nothing without rows."""
    model = {f"model_{name}": one_line(document["model"][name]) for name in ("id", "dtype", "device")}
    common = {"data": one_line(document["settings"]["data"])} | model
    out = io.StringIO()
    if rows := [row | common for row in document["rows"]]:
        writer = csv.DictWriter(out, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return out.getvalue()


FORMATS = {"table": render, "csv": as_csv}


def _percent(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{100 * value:{sign}.1f}"


def _accuracy(row: dict) -> str:
    return f"{_percent(row['accuracy'])} ({_percent(row['low'])}-{_percent(row['high'])})"


def _difference(row: dict, name: str = "difference") -> str:
    if row["row"] == "full":
        return ""
    from evoprune.bench.scores import is_tie

    value, low, high = (_percent(row[f"{name}{end}"], "+") for end in ("", "_low", "_high"))
    if low == "-":  # too few videos
        return value
    said = f"{value} ({low} to {high})"
    return f"tie {said}" if is_tie(row, name) else said


def _kept(row: dict) -> str:
    if row["row"] == "full":
        return ""
    return _percent(row["kept_of_full"])


# Columns to drop where the terminal has too few characters, in this order: `DROPPED`.
ANSWERS: dict[str, Callable[[dict], str]] = {
    "accuracy": _accuracy,
    "vs full": _difference,
    "kept": _kept,
}
COSTS: dict[str, Callable[[dict], str]] = {
    "tokens": lambda row: f"{row['layer_tokens']:,.0f}",
    "of all": lambda row: f"{_percent(row['kept_share'] * row['layer_tokens'] / row['tokens'])}%",
    "live": lambda row: f"{row['live_share']:.2f}",
    "tower": lambda row: f"{row['tflop_3b_tower']:,.3g}",
    "prefill": lambda row: f"{row['tflop_3b_prefill']:,.3g}",
    "TFLOP": lambda row: f"{row['tflop_3b']:,.3g}",
}
DROPPED = ("kept", "vs full", "of all", "prefill", "tower", "live", "unparsed")


def _explained(legend: dict[str, str], titles: Sequence[str]) -> str:
    return "; ".join(text for title, text in legend.items() if title in titles)


def _versus_first(rows: list[dict], width: int) -> tuple[list[str], list[str]]:
    """Return the other methods against the first one, and a note on it.

    Nothing for one method, or where the terminal is too narrow.
    """
    others = [row for row in rows if row["first"]]
    of_name = {row["name"]: row for row in rows}
    if not others:
        return [], []
    from evoprune.bench.scores import same_tokens

    first = one_line(of_name[others[0]["first"]]["method"])
    marks = [" *" * (not same_tokens(row, of_name[row["first"]])) for row in others]
    body = [(row["name"] + mark, _difference(row, "first_difference")) for row, mark in zip(others, marks, strict=True)]
    drawn, fits = table(["", f"vs {first}"], body, width)
    if not fits:
        return [], []
    if any(marks):
        drawn += folded([f"* reads another number of tokens than {first} at this budget; how many: below"], width)
    legend = f"vs {first}: the paired difference to the first method, at the same budget"
    return ["", *drawn], [legend]


def _by_group(title: str, rows: list[dict], names: list[str], width: int) -> list[str]:
    """Draw the accuracy of each group in percent, a column a row of the table above; in several tables where one is too wide."""
    from evoprune.bench.scores import TYPE

    groups: dict[str, dict[str, dict]] = {}
    for row in rows:
        groups.setdefault(row["group"], {})[row["name"]] = row
    lines = []
    rest = names
    while rest and groups:
        for count in range(len(rest), 0, -1):
            body = []
            for group, by_name in groups.items():
                cells = [_percent(by_name[name]["accuracy"]) for name in rest[:count]]
                body.append([group.removeprefix(TYPE), f"{by_name[names[0]]['n']:,}", *cells])
            drawn, fits = table([title, "n", *rest[:count]], body, width)
            if fits:
                break
        lines += ["", *drawn]
        rest = rest[count:]
    return lines + _too_small([by_name[names[0]] for by_name in groups.values()], width, title)


def _too_small(rows: Sequence[dict], width: int, title: str = "") -> list[str]:
    """Return a line below a table with too few questions for a measurement.

    `rows`: one a group; `title`: what groups are called.
    """
    from evoprune.bench.scores import LEAST_QUESTIONS, TYPE

    names = [one_line(row["group"].removeprefix(TYPE)) for row in rows if row["n"] < LEAST_QUESTIONS]
    if not names:
        return []
    where = ""
    if title and len(names) == len(rows):
        where = f" in every {title}"
    elif title:
        where = f" in {', '.join(names)}"
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
            field = "row" if name in fixed else "method"
            line = [row for row in rows if row[field] == name]
            labels = [f"-b {budget_text(row['budget'])}" * (row["row"] == "method") for row in line]
            points = [Point.percent(row[cost], row, "accuracy", label) for row, label in zip(line, labels, strict=True)]
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
