"""`evoprune tune`: the fastest setting that changes a model's answers little enough, found without labels."""

import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.methods.plans import parse_budget
from evoprune.report.records import rounded
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.text import missing_hint, shown
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.loading import prepare
from evoprune_cli.options import flag, own
from evoprune_cli.results import SOME_FAILED, check_chart, check_writable, rescuing, show, write
from evoprune_cli.terminal import check_output, note, progress

AGREE = 0.98
ASKED = "What is asked"  # the title of a panel


@dataclass(frozen=True, kw_only=True)
class Request:
    videos: opt.argument(list[str], "VIDEO", "Video files like those that will be asked about.")
    questions: list[str] | None = own(
        "-Q --question TEXT", "Asked of every video; repeatable. Default: three general ones."
    )
    question_file: str | None = own("--questions FILE", "A text file with a question on each line.")
    agree: float = own(
        "--agree SHARE",
        "Share of the full answers' tokens at which the pruned model must make the same first choice, at the lower end of "
        "the 95% interval.",
        default=AGREE,
    )
    time_limit: float = own(
        "--time-limit SECONDS",
        "Of the whole run, loading included. The most promising settings are tried on all videos, the others on fewer.",
        default=600,
    )
    budget: list[str] | None = own(
        "-b --budget",
        "Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
        **completion.BUDGETS,
    )
    method: list[str] | None = own(
        "--method", "Further methods to try, beside those that are always tried.", **completion.METHODS
    )
    operations: bool = flag("--operations", "Find the recipe of the method operations for this model instead.")
    options: opt.MakeOptions
    output: str | None = own("-o --output FILE.json", "Also write the results there, as JSON.")
    chart: str | None = own("--chart FILE.svg", "Draw agreement against the time to the first token.")
    json: opt.JsonResults = False
    quiet: opt.Quiet = False


@opt.with_options(
    ModelOptions,
    PruneOptions,
    SamplingOptions,
    without=("load_format", "budget", "method", "method_args", "decoder", "subtitles", "max_subtitle_tokens"),
    panels={"questions": ASKED, "time_limit": opt.SWEEP, "output": "Output"},
)
def tune(asked: Request) -> int:
    """Find the fastest setting that keeps this model's answers.

    No labels are needed. The unpruned model answers first. Every setting reads these answers, and is judged by the tokens at which
    it would have chosen as the unpruned model did, and by the time to the first token. The last line is the two options of the
    fastest one that passes: -b and --method. Exit code 6: done, but some videos failed, or no setting is sure to pass.

    With --operations it finds the recipe of the method operations instead: in which order a model's layers can leave out operations
    on visual tokens. The file of -o is that recipe: --method operations:recipe=FILE.json.

    \b
    evoprune tune *.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune tune *.mp4 -Q "What does the sign say?" --agree 0.95 -m DIR
    evoprune tune *.mp4 -m DIR --time-limit 1800 --chart tune.svg
    evoprune tune *.mp4 -m DIR --operations -o recipe.json
    """
    check_output()
    if asked.operations and (asked.method or asked.chart or asked.agree != AGREE):
        hint = "leave out --agree, --method and --chart; the budget is chosen when the recipe is used"
        raise UsageError("--operations finds an order for all budgets", hint)
    if asked.operations and not (asked.output or asked.json):
        raise UsageError("--operations finds a recipe, and no file is named for it", "-o recipe.json")
    read = [*asked.videos, asked.question_file or ""]
    check_chart(asked.chart, inputs=read)
    check_writable(asked.output, inputs=read)
    settings = {
        "videos": _there(asked.videos), "questions": _questions(asked.questions, asked.question_file),
        "agree": asked.agree, "time_limit_s": asked.time_limit,
        "budgets": tuple(float(parse_budget(text)) for text in opt.listed(asked.budget)),
        "methods": tuple(opt.listed(asked.method)),
    }  # fmt: skip
    for name in settings["methods"]:
        methods.check(name)
    made = asked.options()
    settings |= {"seed": made.pruning.seed, "model": made.model, "sampling": made.sampling}
    return _run(asked, {name: value for name, value in settings.items() if value is not None})


def _run(asked: Request, settings: dict[str, Any]) -> int:
    """Tunes and delivers; of a run that breaks off, what is known by then."""
    tuning, quiet = None, asked.quiet
    rescue = rescuing(lambda: tuning is not None and tuning.has_results, lambda error: _deliver(tuning, error, asked))
    with rescue, progress(not quiet) as tell:
        tell("loading libraries")
        prepare()
        from evoprune.bench.tuning.run import Settings, Tuning
        from evoprune.contrib.operation_search import OperationTuning

        tuning = (OperationTuning if asked.operations else Tuning)(Settings(**settings))
        tell("loading model")
        tuning.load(partial(tell, "quantizing"))
        tuning.run(tell, lambda text: quiet or note(text))
    document = _deliver(tuning, None, asked)
    return SOME_FAILED if document["failures"] or document.get("recommended", "") is None else 0


def _there(videos: list[str]) -> tuple[str, ...]:
    """The videos, each once. Raises VideoError: none of them exists."""
    found = tuple(dict.fromkeys(videos))
    if not any(map(os.path.exists, found)):
        hint = missing_hint(found[0], "evoprune tune VIDEO... -m MODEL")
        raise VideoError(f"no such file: {shown(found[0])}", hint)
    return found


def _questions(texts: list[str] | None, file: str | None) -> tuple[str, ...] | None:
    """The questions, each once; None for the general ones."""
    found = [*(texts or [])]
    if file is not None:
        try:
            lines = Path(file).read_text(encoding="utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            reason = getattr(problem, "strerror", None) or "it is not UTF-8"
            hint = "a text file with a question on each line"
            raise UsageError(f"--questions {file} cannot be read: {reason}", hint) from problem
        if not (asked := [line.strip() for line in lines if line.strip()]):
            raise UsageError(f"--questions {file} holds no question", "write a question on each line")
        found += asked
    if not all(text.strip() for text in found):
        raise UsageError("the question is empty", '-Q "What happens?"')
    return tuple(dict.fromkeys(found)) or None


def _deliver(tuning, error: dict[str, Any] | None, asked: Request) -> dict[str, Any]:
    """Prints, writes and draws the results; returns them. `error`: what cut the run short."""
    from evoprune_cli.tune_tables import draw_chart, operations_table, table

    document = rounded({"schema": tuning.schema} | tuning.document(error))
    show(document, operations_table if "steps" in document else table, asked.json)
    write(document, asked.output, asked.chart, draw_chart)
    return document
