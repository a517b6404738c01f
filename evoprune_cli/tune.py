"""`evoprune tune`: the fastest setting that changes a model's answers little enough, found without labels."""

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.pruning.budget import parse_budget
from evoprune.report.records import rounded
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.files import check_chart, check_writable, print_text, write_text
from evoprune_cli.terminal import check_output, json_line, note, page_width, print_document, progress

SOME_FAILED = 6
AGREE = 0.98

_asked, _output = partial(opt.option, "What is asked"), partial(opt.option, "Output")

Videos = opt.argument(list[str], "VIDEO", "Video files like those that will be asked about.")
Questions = _asked(
    list[str] | None,
    "-Q",
    "--question",
    "Asked of every video; repeatable. Default: three general ones.",
    metavar="TEXT",
)
QuestionFile = _asked(str | None, "--questions", "A text file with a question on each line.", metavar="FILE")
Agree = _asked(
    float,
    "--agree",
    "Share of the full answers' tokens at which the pruned model must make the same first choice, at the lower end of "
    "the 95% interval.",
    metavar="SHARE",
)
Budgets = opt.swept(
    list[str] | None,
    "-b",
    "--budget",
    "Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
    **completion.BUDGETS,
)
Methods = opt.swept(
    list[str] | None, "--method", "Further methods to try, beside those that are always tried.", **completion.METHODS
)
Operations = opt.swept(bool, "--operations", "Find the recipe of the method operations for this model instead.")
TimeLimit = opt.swept(
    float,
    "--time-limit",
    "Of the whole run, loading included. The most promising settings are tried on all videos, the others on fewer.",
    metavar="SECONDS",
)
NoSave = _output(bool, "--no-save", "Do not save the recommendation, which -b tuned uses.")
Output = _output(str | None, "-o", "--output", "Also write the results there, as JSON.", metavar="FILE.json")
Chart = _output(str | None, "--chart", "Draw agreement against the time to the first token.", metavar="FILE.svg")
Json = _output(bool, "--json", "The results as one JSON line instead of a table.")


@opt.with_options(
    ModelOptions,
    PruneOptions,
    SamplingOptions,
    without=("load_format", "budget", "method", "method_args", "decoder", "subtitles", "max_subtitle_tokens"),
)
def tune(
    *,
    videos: Videos,
    questions: Questions = None,
    question_file: QuestionFile = None,
    agree: Agree = AGREE,
    time_limit: TimeLimit = 600,
    budget: Budgets = None,
    method: Methods = None,
    operations: Operations = False,
    options: opt.MakeOptions,
    no_save: NoSave = False,
    output: Output = None,
    chart: Chart = None,
    json: Json = False,
    quiet: opt.Quiet = False,
) -> int:
    """Find the fastest setting that keeps this model's answers.

    No labels are needed. The unpruned model answers first. Every setting reads these answers, and is judged by the tokens at which
    it would have chosen as the unpruned model did, and by the time to the first token. The fastest one that passes is saved for
    this model; -b tuned uses it. Exit code 6: done, but some videos failed, or no setting is sure to pass.

    With --operations it finds the recipe of the method operations instead: in which order a model's layers can leave out operations
    on visual tokens.

    \b
    evoprune tune *.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune tune *.mp4 -Q "What does the sign say?" --agree 0.95 -m DIR
    evoprune tune *.mp4 -m DIR --time-limit 1800 --chart tune.svg
    evoprune tune *.mp4 -m DIR --operations
    """
    check_output()
    _check_alone(operations and (method or chart or agree != AGREE))
    check_chart(chart, inputs=[*videos, question_file or ""])
    check_writable(output, inputs=[*videos, question_file or ""])
    asked = {
        "videos": _there(videos), "questions": _questions(questions, question_file),
        "agree": agree, "time_limit_s": time_limit,
        "budgets": tuple(map(parse_budget, opt.listed(budget))), "methods": tuple(opt.listed(method)),
    }  # fmt: skip
    for name in asked["methods"]:
        methods.check(name)
    made = options()
    asked |= {"seed": made.pruning.seed, "model": made.model, "sampling": made.sampling}
    deliver = partial(_deliver, json=json, output=output, chart=chart, save=not no_save)
    return _run(asked, deliver, quiet, operations)


def _run(asked: dict[str, Any], deliver: Callable, quiet: bool, operations: bool) -> int:
    """Tunes and delivers; of a run that breaks off, what is known by then. `operations`: finds a recipe, not a setting."""
    tuning = None
    try:
        with progress(not quiet) as show:
            show("loading libraries")
            check_libraries()
            from evoprune.tuning.operations_run import OperationTuning
            from evoprune.tuning.run import Settings, Tuning

            asked = {name: value for name, value in asked.items() if value is not None}
            tuning = (OperationTuning if operations else Tuning)(Settings(**asked))
            show("loading model")
            tuning.load(partial(show, "quantizing"))
            tuning.run(show, lambda text: quiet or note(text))
    except BaseException as problem:
        if tuning is not None and tuning.has_results:
            with suppress(UsageError):  # the first problem is the one to report
                deliver(tuning, failure(problem))
            problem.reported = True
        raise
    document = deliver(tuning)
    return SOME_FAILED if document["failures"] or document.get("recommended", "") is None else 0


def _check_alone(more: Any) -> None:
    """Refuses options that the search for a recipe has no use for."""
    if more:
        hint = "leave out --agree, --method and --chart; the budget is chosen when the recipe is used"
        raise UsageError("--operations finds an order for all budgets", hint)


def _there(videos: list[str]) -> tuple[str, ...]:
    """The videos, each once. Raises VideoError: none of them exists."""
    found = tuple(dict.fromkeys(videos))
    if not any(map(os.path.exists, found)):
        raise VideoError(f"no such file: {found[0]}", "evoprune tune VIDEO... -m MODEL")
    return found


def _questions(texts: list[str] | None, file: str | None) -> tuple[str, ...] | None:
    """The questions, each once; None for the general ones."""
    found = [*(texts or [])]
    if file is not None:
        try:
            lines = [line.strip() for line in Path(file).read_text(encoding="utf-8-sig").splitlines()]
        except (OSError, UnicodeDecodeError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not UTF-8"
            raise UsageError(
                f"--questions {file} cannot be read: {reason}", "a text file with a question on each line"
            ) from problem
        found += (asked := [line for line in lines if line])
        if not asked:
            raise UsageError(f"--questions {file} holds no question", "write a question on each line")
    if not all(text.strip() for text in found):
        raise UsageError("the question is empty", '-Q "What happens?"')
    return tuple(dict.fromkeys(found)) or None


def _deliver(
    tuning, error: dict | None = None, *, json: bool, output: str | None, chart: str | None, save: bool
) -> dict[str, Any]:
    """Saves, prints, writes and draws the results; returns them. `error`: what cut the run short."""
    from evoprune_cli.tune_tables import draw_chart, operations_table, table

    document, problem = {"schema": tuning.schema} | tuning.document(error) | {"saved": None}, None
    table = operations_table if "steps" in document else table
    if save and error is None and tuning.worth_saving:
        try:
            document["saved"] = str(tuning.save())
        except UsageError as unsaved:  # what was measured is printed first
            problem, document["error"] = unsaved, failure(unsaved)
    if json:
        print_document(rounded(document))
    else:
        print_text(table(document, page_width()))
    if output:
        write_text(output, json_line(rounded(document)) + "\n")
    if chart and document["rows"]:
        write_text(chart, draw_chart(document))
    if problem:
        problem.reported = True
        raise problem
    return document
