"""`evoprune tune`: finds the fastest pruning setting that preserves a model's answers well enough, without requiring labels."""

import os
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError, VideoError
from evoprune.methods import Budget, MethodText
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.util import cannot_read, missing_hint, shown, some
from evoprune.video import SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli.delivery import check_chart, check_writable, deliver_results, rescuing
from evoprune_cli.running import SOME_FAILED, prepare
from evoprune_cli.terminal import check_output, note, progress
from evoprune_cli.words import check_no_questions

if TYPE_CHECKING:
    from evoprune.bench import TuneSettings, Tuning

AGREE = 0.98
QUESTIONS = "Questions"  # a panel title


@dataclass(frozen=True, kw_only=True)
class TuneArguments:
    """The arguments of `evoprune tune`."""

    videos: opt.argument(list[str], "VIDEO", "Video files like those that you will ask about.")
    questions: opt.option(
        list[str] | None,
        "-Q --question TEXT",
        "Question to ask about every video; repeatable. Default: three general questions.",
        QUESTIONS,
    ) = None
    question_file: opt.option(
        str | None, "--questions FILE", "A text file with a question on each line.", QUESTIONS
    ) = None
    agree: opt.option(
        float,
        "--agree SHARE",
        "Share of the unpruned answers' tokens at which the pruned model must make the same first choice, at the lower end of "
        "the 95% interval.",
        QUESTIONS,
    ) = AGREE
    time_limit: opt.option(
        float,
        "--time-limit SECONDS",
        "Time limit of the whole run, including loading. The most promising settings are tried on all videos, the others on fewer.",
        opt.SWEEP,
    ) = 600
    budget: opt.option(
        list[str] | None,
        "-b --budget",
        "Shares of visual tokens to try, or presets.  [default: 0.5,0.35,0.25,0.15,0.1]",
        opt.SWEEP,
        **opt.BUDGETS,
    ) = None
    method: opt.option(
        list[str] | None,
        "--method",
        "Methods to try in addition to the usual ones.",
        opt.SWEEP,
        **opt.METHODS,
    ) = None
    operations: opt.option(bool, "--operations", "Find a recipe for the method operations instead.", opt.SWEEP) = False
    options: opt.PipelineArguments
    output: opt.option(str | None, "-o --output FILE.json", "Also write the results to FILE as JSON.", opt.OUTPUT) = (
        None
    )
    chart: opt.option(
        str | None, "--chart FILE.svg", "Draw agreement against the time to the first token.", opt.OUTPUT
    ) = None
    json: opt.JsonResults = False
    quiet: opt.Quiet = False


@opt.command(
    *ModelOptions.WEIGHTS,
    "seed",
    *SamplingOptions.RATE,
    *SamplingOptions.SPAN,
    *SamplingOptions.LIMITS,
    "frame_rate",
    "seek",
    "think",
    short="questions agree time_limit budget method model output chart json quiet",
)
def tune(given: TuneArguments) -> int:
    """Find the fastest setting that keeps this model's answers.

    No labels are needed. The unpruned model answers first. Each setting then reads these answers, and is judged by the share of
    tokens at which its first choice is the same, and by the time to the first token. The last line shows the values of -b and
    --method for the fastest setting that passes, or -b full if none does. Exit code 6: the run finished, but some videos failed, or
    no setting is certain to pass.

    With --operations, find a recipe for the method `operations` instead: the order in which a model's layers skip operations on
    visual tokens. -o writes the recipe, for --method operations:recipe=FILE.json.

    \b
    evoprune tune *.mp4 -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune tune *.mp4 -Q "What does the sign say?" --agree 0.95 -m DIR
    evoprune tune *.mp4 -m DIR --time-limit 1800 --chart tune.svg
    evoprune tune *.mp4 -m DIR --operations -o recipe.json
    """
    _check(given)
    return _run(given, _parse(given))


def _check(given: TuneArguments) -> None:
    """Check combinations of options, the output files, and that at least one video exists."""
    check_output()
    if given.operations and (given.method or given.chart or given.agree != AGREE):
        hint = "leave out --agree, --method and --chart; the budget is chosen when the recipe is used"
        raise UsageError("--operations finds one recipe for all budgets", hint)
    if given.operations and not (given.output or given.json):
        raise UsageError("--operations finds a recipe, but there is no file for it", "add -o recipe.json")
    read = [*given.videos, given.question_file or ""]
    check_chart(given.chart, inputs=read)
    check_writable(given.output, inputs=read)
    check_no_questions(given.videos, 'evoprune tune *.mp4 -Q "What does the sign say?" -m DIR')
    if not any(map(os.path.exists, given.videos)):
        hint = missing_hint(given.videos[0], "evoprune tune VIDEO... -m MODEL")
        raise VideoError(f"no such file: {some(list(map(shown, given.videos)))}", hint)


@dataclass(frozen=True)
class Parsed:
    """The values of the options. An empty tuple stands for the defaults."""

    questions: tuple[str, ...]
    budgets: tuple[float, ...]
    methods: tuple[str, ...]
    pipeline: PipelineOptions


def _parse(given: TuneArguments) -> Parsed:
    """Return the values of the options. Reads the file of questions."""
    asked = _questions(given.questions or [], given.question_file)
    budgets = tuple(Budget.parse(text).video for text in opt.listed(given.budget))
    methods = tuple(opt.listed(given.method))
    for name in methods:
        MethodText(name).check()
    return Parsed(asked, budgets, methods, given.options.parse())


def _settings(given: TuneArguments, parsed: Parsed) -> "TuneSettings":
    """Return the settings of the run. Imports torch."""
    from evoprune.bench import TuneSettings

    settings = TuneSettings(
        videos=tuple(dict.fromkeys(given.videos)),
        agree=given.agree,
        time_limit_s=given.time_limit,
        budgets=parsed.budgets,
        methods=parsed.methods,
        seed=parsed.pipeline.pruning.seed,
        model=parsed.pipeline.model,
        sampling=parsed.pipeline.sampling,
        think=parsed.pipeline.generation.think,
    )
    return replace(settings, questions=parsed.questions) if parsed.questions else settings


def _run(given: TuneArguments, parsed: Parsed) -> int:
    """Load the model, try the settings, and deliver the results, even if the run is interrupted. Returns the exit code."""
    from evoprune.session import ReadAhead, describe

    tuning = None
    with (
        rescuing(lambda: tuning is not None and tuning.has_results, lambda error: _deliver(given, tuning, error)),
        progress(not given.quiet) as tell,
        ExitStack() as cleanup,
    ):
        tell("loading libraries")
        prepare()
        # Prefetch only the first video because reading other videos in parallel would distort the measurements.
        model = describe(parsed.pipeline.model)
        ahead = cleanup.enter_context(ReadAhead(model, [(given.videos[:1], parsed.pipeline.sampling)]))
        from evoprune.bench import OperationTuning, Tuning

        kind = OperationTuning if given.operations else Tuning
        tuning = kind(_settings(given, parsed))
        tell("loading model")
        tuning.load(partial(tell, "quantizing"), model)
        tuning.ahead = ahead
        tuning.run(tell, lambda text: given.quiet or note(text))
    document = _deliver(given, tuning)
    return SOME_FAILED if document["failures"] or document.get("recommended", "") is None else 0


def _deliver(given: TuneArguments, tuning: "Tuning", error: dict[str, Any] | None = None) -> dict[str, Any]:
    """Print and return the results, and write the output file and the chart. `error` explains why the run ended early."""
    results = tuning.results(error)
    deliver_results(results, "json" if given.json else "table", given.output, given.chart)
    return results.document()


def _questions(texts: list[str], file: str | None) -> tuple[str, ...]:
    """Return the questions from the command line and the file, without duplicates. If there aren't any, the caller uses defaults.

    Raises:
        UsageError: If the file can't be read or contains no questions, or a question is empty.
    """
    if file is not None:
        from evoprune.files import read_all

        hint = "a text file with a question on each line"
        try:
            with open(file, "rb") as opened:
                lines = read_all(opened, f"--questions {file}", hint).decode("utf-8-sig").splitlines()
        except OSError as problem:
            raise UsageError(cannot_read(file, problem), missing_hint(file, hint)) from problem
        except UnicodeDecodeError as problem:
            raise UsageError(f"cannot read {shown(file)}: it is not UTF-8", hint) from problem
        if not (asked := [line.strip() for line in lines if line.strip()]):
            raise UsageError(f"--questions {file} contains no questions", "write a question on each line")
        texts = [*texts, *asked]
    if not all(text.strip() for text in texts):
        raise UsageError("the question is empty", '-Q "What happens?"')
    return tuple(dict.fromkeys(texts))
