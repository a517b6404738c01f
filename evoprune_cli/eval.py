"""`evoprune eval`: measures accuracy and cost at each budget, and reports the results as tables and a chart."""

import shlex
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.session import ModelOptions, PipelineOptions
from evoprune.video import SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli.delivery import check_chart, check_new_folder, deliver_results, rescuing
from evoprune_cli.running import SOME_FAILED, prepare
from evoprune_cli.terminal import check_output, note, progress
from evoprune_cli.typed import typed

if TYPE_CHECKING:
    from evoprune.bench import EvalSettings, Evaluation, VideoQuestions

FORMATS = ("table", "csv")
# Options allowed with --resume DIR even without --data, because they don't affect the results.
ALLOWED_WITH_RESUME = (
    "resume", "processes", "chart", "form", "json", "quiet", "debug", "device", "threads", "offline", "store_quantized",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """The arguments of `evoprune eval`."""

    data: opt.option(
        str | None,
        "--data FILE",
        "Questions: JSONL or CSV rows with video, question, answer and optionally id, options, type, groups.",
        "Data",
    ) = None
    limit: opt.option(int | None, "--limit N", "Maximum number of videos; default: all.", "Data", min=1) = None
    group: opt.option(list[str] | None, "--group LIST", "Ask only the questions of these groups.", "Data") = None
    seed: opt.option(int, "--seed <int>", "Random seed of the methods.", "Data", min=0, max=2**31 - 1) = 0
    budget: opt.Budgets = None
    method: opt.Methods = None
    blind: opt.option(
        bool, "--blind", "Also ask about a gray video of the same size and length, to measure guessing.", opt.SWEEP
    ) = False
    score: opt.option(
        str,
        "--score",
        "How to grade questions with options. text: by the text of the answer. likelihood: the most likely option is the answer; "
        "options get no letters, and the table has a Brier score.",
        opt.SWEEP,
        **opt.one_of("text", "likelihood"),
    ) = "text"
    options: opt.PipelineArguments
    processes: opt.option(
        int,
        "--processes N",
        "Number of processes, each with its own copy of the model and one video at a time.",
        opt.OUTPUT,
        min=1,
        max=256,
    ) = 1
    output: opt.option(
        str | None,
        "-o --output DIR",
        "Write settings, samples and results to DIR, or to DIR-2 and so on if it exists.",
        opt.OUTPUT,
    ) = None
    resume: opt.option(
        str | None,
        "--resume DIR",
        "Continue the interrupted run in DIR with its settings.",
        opt.OUTPUT,
    ) = None
    chart: opt.option(str | None, "--chart FILE.svg", "Draw accuracy against tokens and against cost.", opt.OUTPUT) = (
        None
    )
    form: opt.option(
        str,
        "--format",
        "Print a table, or CSV with a line for each row and group.",
        opt.OUTPUT,
        **opt.one_of("table", "csv"),
    ) = "table"
    json: opt.JsonResults = False
    quiet: opt.Quiet = False


@opt.command(
    *ModelOptions.WEIGHTS,
    *SamplingOptions.RATE,
    *SamplingOptions.LIMITS,
    "frame_rate",
    "seek",
    "max_subtitle_tokens",
    "speech",
    "max_new_tokens",
    "repetition_penalty",
    "think",
    short="data limit budget method blind model output resume chart form json quiet",
    max_new_tokens={"unless_typed": 64},
)
def evaluate(given: EvalArguments) -> int:
    """Measure accuracy at each budget, on questions with known answers.

    The model answers the same questions with every setting, starting with the full budget. Each setting is compared with the full
    budget, and with the first method at the same budget. Intervals are 95% confidence intervals over videos. The cost is the number
    of operations in a model with the 3B model's dimensions. Exit code 6: the run finished, but some videos failed.

    \b
    evoprune eval --data samples/questions.jsonl
    evoprune eval --data my.jsonl -b 0.25,0.1 --method evoprune,divprune -o runs/a
    evoprune eval --data my.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --json
    """
    pipeline = _parse(given)
    settings, videos = _check(given, pipeline)
    return _run(given, settings, videos)


def _parse(given: EvalArguments) -> PipelineOptions:
    """Return the options that determine the answers, after checking the others."""
    pipeline = given.options.parse()
    if given.form not in FORMATS:
        raise UsageError(f"--format {given.form!r} is unknown", f"one of {', '.join(FORMATS)}")
    if given.json and given.form != "table":
        raise UsageError(f"--json and --format {given.form} cannot be combined", "leave one out")
    if given.data is None and given.resume is None:
        raise UsageError(
            "no questions",
            "give --data FILE, a JSONL or CSV file whose rows have video, question and answer: evoprune eval --data my.jsonl",
        )
    return pipeline


def _check(given: EvalArguments, pipeline: PipelineOptions) -> "tuple[EvalSettings, Sequence[VideoQuestions]]":
    """Return the settings and the questions, after checking the output files."""
    from evoprune.bench import EvalSettings

    if given.data is None:
        check_output()
        if refused := [flag for name, flag in typed().options().items() if name not in ALLOWED_WITH_RESUME]:
            hint = "leave it out, or give all settings, including --data"
            raise UsageError(f"{refused[0]} cannot be used with --resume, which has the settings of its run", hint)
        settings = EvalSettings.stored(Path(given.resume), pipeline.model)
    else:
        sweep = opt.sweep(given.budget, given.method, named=True)
        check_output()
        if given.output is not None and given.resume is not None:
            raise UsageError("-o and --resume cannot be combined", "--resume continues in its own folder")
        settings = EvalSettings(
            **sweep,
            data=given.data,
            blind=given.blind,
            seed=given.seed,
            score=given.score,
            limit=given.limit,
            groups=tuple(dict.fromkeys(opt.listed(given.group))),
            model=pipeline.model,
            sampling=pipeline.sampling,
            generation=pipeline.generation,
        )
    if given.output is not None:
        check_new_folder(given.output)
    check_chart(given.chart, beside=given.output, inputs=[settings.data])
    return settings.read_questions()


def _run(given: EvalArguments, settings: "EvalSettings", videos: "Sequence[VideoQuestions]") -> int:
    """Load the model, ask the questions, and deliver the results, even if the run is interrupted. Returns the exit code."""
    from evoprune.session import ReadAhead, describe

    evaluation = None
    with (
        rescuing(lambda: evaluation is not None and evaluation.loaded, lambda error: _rescue(given, evaluation, error)),
        progress(not given.quiet) as tell,
        ExitStack() as cleanup,
    ):
        tell("loading libraries")
        prepare()
        model = describe(settings.model)
        asked = settings.inputs(videos) if given.resume is None and given.processes == 1 else ()
        ahead = cleanup.enter_context(ReadAhead(model, asked))
        from evoprune.bench import Evaluation

        evaluation = Evaluation(settings, videos)
        if given.resume is not None:
            evaluation.keep_in(Path(given.resume), resume=True)
        tell("loading model")
        evaluation.load(partial(tell, "quantizing"), model)
        if given.output is not None:
            evaluation.keep_in(Path(given.output))
            if not given.quiet and evaluation.folder.path != Path(given.output):
                note(f"{given.output} already exists: writing to {evaluation.folder.path}")
        evaluation.ahead = ahead
        evaluation.run(tell, given.processes)
    _deliver(given, evaluation)
    return SOME_FAILED if evaluation.failed else 0


def _deliver(given: EvalArguments, evaluation: "Evaluation", error: dict[str, Any] | None = None) -> None:
    """Print the results so far, draw the chart, and write the results to the output folder."""
    results = evaluation.results(error)
    document = results.document()
    try:
        if given.json or document["rows"] or error is None:
            deliver_results(results, "json" if given.json else given.form, chart=given.chart)
            if given.form == "csv" and not given.quiet:
                for line in results.remarks():
                    note(line)
    finally:  # even if the reader of stdout has exited
        if evaluation.folder:
            evaluation.folder.finish(document)


def _rescue(given: EvalArguments, evaluation: "Evaluation", error: dict[str, Any]) -> None:
    """Deliver the results of an interrupted run, and say how to continue it."""
    try:
        _deliver(given, evaluation, error)
    finally:
        if evaluation.folder and not given.quiet:
            note(f"to continue: evoprune eval --resume {shlex.quote(str(evaluation.folder.path))}")
