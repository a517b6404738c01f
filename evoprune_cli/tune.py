"""`evoprune tune`: the fastest setting that changes a model's answers little enough, found without labels."""

import os
from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

from evoprune import methods
from evoprune.bench.chart import COLOURS, PALE, Panel, Point, Series, draw
from evoprune.errors import UsageError, VideoError
from evoprune.methods.budget import Budget
from evoprune.report import rounded
from evoprune.session.options import GenerationOptions, ModelOptions, PruneOptions, SamplingOptions
from evoprune.util import counted, missing_hint, shown
from evoprune_cli import options as opt
from evoprune_cli.running import SOME_FAILED, check_chart, check_writable, prepare, rescuing, show, write
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
)

AGREE = 0.98
ASKED = "What is asked"  # the title of a panel


@opt.command(
    ModelOptions,
    PruneOptions,
    SamplingOptions,
    GenerationOptions,
    short="questions agree time_limit budget method model output chart json quiet",
    without=(
        "load_format", "budget", "method", "method_args", "decoder", "subtitles", "max_subtitle_tokens",
        "max_new_tokens", "temperature", "top_p", "top_k", "repetition_penalty", "system", "stop", "logprobs",
        "schema", "regex", "choices", "choice_score",
    ),
)  # fmt: skip
def tune(
    *,
    videos: opt.argument(list[str], "VIDEO", "Video files like those that will be asked about."),
    questions: opt.option(
        list[str] | None, "-Q --question TEXT", "Asked of every video; repeatable. Default: three general ones.", ASKED
    ) = None,
    question_file: opt.option(
        str | None, "--questions FILE", "A text file with a question on each line.", ASKED
    ) = None,
    agree: opt.option(
        float,
        "--agree SHARE",
        "Share of the full answers' tokens at which the pruned model must make the same first choice, at the lower end of "
        "the 95% interval.",
        ASKED,
    ) = AGREE,
    time_limit: opt.option(
        float,
        "--time-limit SECONDS",
        "Of the whole run, loading included. The most promising settings are tried on all videos, the others on fewer.",
        opt.SWEEP,
    ) = 600,
    budget: opt.option(
        list[str] | None,
        "-b --budget",
        "Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
        opt.SWEEP,
        **opt.BUDGETS,
    ) = None,
    method: opt.option(
        list[str] | None,
        "--method",
        "Methods to try beside the usual ones.",
        opt.SWEEP,
        **opt.METHODS,
    ) = None,
    operations: opt.option(bool, "--operations", "Find a recipe for the method operations instead.", opt.SWEEP) = False,
    options: opt.MakeOptions,
    output: opt.option(
        str | None, "-o --output FILE.json", "Also write the results there, as JSON.", opt.OUTPUT
    ) = None,
    chart: opt.option(
        str | None, "--chart FILE.svg", "Draw agreement against the time to the first token.", opt.OUTPUT
    ) = None,
    json: opt.JsonResults = False,
    quiet: opt.Quiet = False,
) -> int:
    """Find the fastest setting that keeps this model's answers.

    No labels are needed. The unpruned model answers first. Every setting then reads these answers, and is judged by the share of
    tokens at which its first choice is the same, and by the time to the first token. The last line has the two options of the
    fastest setting that passes, -b and --method. Exit code 6: done, but some videos failed, or no setting is sure to pass.

    With --operations it finds a recipe for the method operations instead: the order in which a model's layers leave out operations
    on visual tokens. -o writes it, for --method operations:recipe=FILE.json.

    \b
    evoprune tune *.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune tune *.mp4 -Q "What does the sign say?" --agree 0.95 -m DIR
    evoprune tune *.mp4 -m DIR --time-limit 1800 --chart tune.svg
    evoprune tune *.mp4 -m DIR --operations -o recipe.json
    """
    check_output()
    if operations and (method or chart or agree != AGREE):
        hint = "leave out --agree, --method and --chart; the budget is chosen when the recipe is used"
        raise UsageError("--operations finds an order for all budgets", hint)
    if operations and not (output or json):
        raise UsageError("--operations finds a recipe, and no file is named for it", "-o recipe.json")
    read = [*videos, question_file or ""]
    check_chart(chart, inputs=read)
    check_writable(output, inputs=read)
    settings: dict[str, Any] = {"videos": tuple(dict.fromkeys(videos)), "agree": agree, "time_limit_s": time_limit}
    if not any(map(os.path.exists, videos)):
        hint = missing_hint(videos[0], "evoprune tune VIDEO... -m MODEL")
        raise VideoError(f"no such file: {shown(videos[0])}", hint)
    if asked := _questions(questions or [], question_file):
        settings["questions"] = asked
    settings["budgets"] = tuple(Budget.parse(text).video for text in opt.listed(budget))
    settings["methods"] = tuple(opt.listed(method))
    for name in settings["methods"]:
        methods.check(name)
    pipeline = options()
    settings |= {"seed": pipeline.pruning.seed, "model": pipeline.model, "sampling": pipeline.sampling}
    settings["think"] = pipeline.generation.think
    tuning = None

    def deliver(error: dict[str, Any] | None = None) -> dict[str, Any]:
        """Prints, writes and draws the results; returns them. `error`: what cut the run short."""
        document = rounded({"schema": tuning.schema} | tuning.document(error))
        form = render_operations if "steps" in document else render
        try:
            show(document, form, json)
        finally:  # also where nobody reads stdout
            write(document, output, chart, draw_chart)
        return document

    from evoprune.session.ahead import Ahead
    from evoprune.session.loading.description import describe

    with (
        rescuing(lambda: tuning is not None and tuning.has_results, deliver),
        progress(not quiet) as tell,
        Ahead() as ahead,
    ):
        tell("loading libraries")
        prepare()
        # The first video alone: reading others would take time from what is measured.
        model = describe(pipeline.model)
        ahead.begin([(settings["videos"][:1], pipeline.sampling)], model)
        from evoprune.bench.tune import TuneSettings, Tuning
        from evoprune.contrib.operation_search import OperationTuning

        kind = OperationTuning if operations else Tuning
        tuning = kind(TuneSettings(**settings))
        tell("loading model")
        tuning.load(partial(tell, "quantizing"), model)
        tuning.ahead = ahead
        tuning.run(tell, lambda text: quiet or note(text))
    document = deliver()
    return SOME_FAILED if document["failures"] or document.get("recommended", "") is None else 0


def _questions(texts: list[str], file: str | None) -> tuple[str, ...]:
    """Return the questions, each once; none for the general ones."""
    if file is not None:
        from evoprune.batch.rows import read_all

        hint = "a text file with a question on each line"
        try:
            with naming_pipe(file), open(file, "rb") as opened:
                lines = read_all(opened, f"--questions {file}", hint).decode("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not UTF-8"
            raise UsageError(f"--questions {file} cannot be read: {reason}", missing_hint(file, hint)) from problem
        if not (asked := [line.strip() for line in lines if line.strip()]):
            raise UsageError(f"--questions {file} holds no question", "write a question on each line")
        texts = [*texts, *asked]
    if not all(text.strip() for text in texts):
        raise UsageError("the question is empty", '-Q "What happens?"')
    return tuple(dict.fromkeys(texts))


# The tables. Columns: what they hold, and what that means.

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


def _if_measured(row: dict, form: str) -> str:
    """Fill in figures of a row; a dash where they were not measured."""
    if row["kl"] is None:
        return "-"
    return form.format(**row)


# The same of recipes of operations.
OPERATIONS: dict[str, tuple[Callable[[dict], str], str]] = {
    "work": (
        lambda row: f"{100 * row['share']:.1f}%",
        "what is left of the work on visual tokens in the layers that leave some out",
    ),
    "operations": (lambda row: f"{row['operations']:,}", "left out"),
    "KL": (
        lambda row: _if_measured(row, "{kl:.3f}"),
        "mean of KL(unpruned, pruned) in nats a token; -: not measured",
    ),
    "agree": (
        lambda row: _if_measured(row, "{agree:.1%}"),
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


def _fitting(document: dict, name, columns: dict, drop: tuple[str, ...], width: int) -> tuple[list[str], str]:
    """Return the lines of a table, and what its columns mean."""
    body, titles = fitting(document["rows"], name, {title: cell for title, (cell, _) in columns.items()}, drop, width)
    return body, "; ".join(f"{title}: {columns[title][1]}" for title in titles)


def render_operations(document: dict, width: int = 80) -> str:
    lines = _heading(document, width)
    if document["rows"]:
        body, said = _fitting(document, lambda row: f"-b {row['budget']:g}", OPERATIONS, ("operations", "agree"), width)
        lines += ["", *body, "", *folded([said], width)]
    else:
        lines.append("no recipe was found: too little time")
    lines += failures(document)
    if document["error"]:
        lines += folded([f"{document['error']['message']}: not everything was measured"], width)
    if document["complete"]:
        lines += ["", "the file of -o is the recipe: --method operations:recipe=FILE"]
    return "\n".join(lines) + "\n"


def render(document: dict, width: int = 80) -> str:
    """Return the results, no line longer than `width` if that is possible."""
    lines = _heading(document, width)
    said = [_verdict(document)]
    if document["rows"]:
        marks = {document["recommended"]: "*"}
        body, meanings = _fitting(
            document, lambda row: f"{marks.get(row['name'], ' ')} {row['name']}", COLUMNS, DROPPED, width
        )
        lines += ["", *body, ""]
        said.append(meanings)
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
    rows = document["rows"]
    series = []
    for method, colour in zip(dict.fromkeys(row["method"] for row in rows), cycle(COLOURS), strict=False):
        line = sorted((row for row in rows if row["method"] == method), key=lambda row: row["budget"])
        labels = {row["name"]: f"-b {row['budget']:g}" * row["frontier"] for row in line}
        points = (Point.percent(100 * row["first_token"], row, "agreement", labels[row["name"]]) for row in line)
        series.append(Series(method, tuple(points), colour))
    best = sorted((row for row in rows if row["frontier"]), key=lambda row: row["first_token"])
    edge = tuple(Point(100 * row["first_token"], 100 * row["agreement"]) for row in best)
    series.append(Series("frontier", edge, PALE, dashed=True))
    title = f"{short_name(document['model']['id'])}: agreement with the unpruned model against time to the first token"
    answers = counted(document["answer_tokens"], "token")
    videos = counted(document["videos"]["answered"], "video")
    asked = f"{100 * document['settings']['agree']:g}% asked"
    facts = f"{answers} of answers about {videos}, 95% intervals over videos; {asked}"
    label = "first token, % of the unpruned model's"
    return draw(title, facts, [Panel("", label, "tokens that agree, %", tuple(series), from_zero=False)])
