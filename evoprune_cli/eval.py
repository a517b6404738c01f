"""`evoprune eval`: accuracy against budget, beside what it costs."""

import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from evoprune.errors import UsageError
from evoprune.session.options import ModelOptions, PipelineOptions
from evoprune_cli import options as opt
from evoprune_cli.loading import prepare
from evoprune_cli.options import flag, own
from evoprune_cli.results import SOME_FAILED, check_chart, rescuing, show, write
from evoprune_cli.terminal import check_output, note, progress


@dataclass(frozen=True, kw_only=True)
class Request:
    data: str | None = own(
        "--data FILE",
        "Questions: JSONL or CSV rows with video, question, answer and perhaps id, options, type, groups.",
    )
    limit: int | None = own("--limit N", "At most so many videos; default: all.", min=1)
    group: list[str] | None = own("--group LIST", "Only questions of these groups.")
    seed: int = own("--seed <int>", "Seed of methods that draw at random.", default=0, min=0, max=2**31 - 1)
    budget: opt.Budgets = None
    method: opt.Methods = None
    blind: bool = flag("--blind", "Also ask without the video: a grey one of the same size and length.")
    options: opt.MakeOptions
    processes: int = own(
        "--processes N",
        "Videos at a time, each in a process with its own copy of the model.",
        default=1,
        min=1,
        max=256,
    )
    output: str | None = own(
        "-o --output DIR", "Write settings, samples and results there; if it exists, to DIR-2 and so on."
    )
    resume: str | None = own(
        "--resume DIR",
        "Continue the interrupted run in DIR, with its settings; or give the same ones, --data included.",
    )
    chart: str | None = own("--chart FILE.svg", "Draw accuracy against tokens and against cost.")
    json: opt.JsonResults = False
    quiet: opt.Quiet = False


@opt.with_options(
    *PipelineOptions.KINDS,
    without=(
        "load_format", "budget", "method", "seed", "start_s", "end_s", "decoder", "subtitles", "max_subtitle_tokens",
        "temperature", "top_p", "top_k", "system",
    ),
    max_new_tokens={"unless_typed": 64},
    panels={"data": "Data", "blind": opt.SWEEP, "processes": "Output"},
)  # fmt: skip
def evaluate(asked: Request) -> int:
    """Measure accuracy against budget, on questions with known answers.

    Every setting answers the same questions, the full budget first. Settings are compared with it, and with the first method at
    the same budget. Intervals are 95%, over videos. Cost is in operations at the 3B model's dimensions. Exit code 6: done, but some
    videos failed.

    \b
    evoprune eval --data samples/questions.jsonl
    evoprune eval --data my.jsonl -b 0.25,0.1 --method evoprune,divprune -o runs/a
    evoprune eval --data my.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --json
    """
    made = asked.options()
    if asked.resume is not None and asked.data is None:
        return _resumed(asked, made.model)
    if asked.data is None:
        raise UsageError("no questions", "--data FILE, a JSONL or CSV file whose rows have video, question and answer")
    sweep = opt.sweep(asked.budget, asked.method, made.pruning.method_args, named=True)
    check_output()
    if asked.output is not None and asked.resume is not None:
        raise UsageError("-o and --resume exclude each other", "--resume goes on in its own folder")
    settings = {
        **sweep, "data": asked.data, "blind": asked.blind, "seed": asked.seed, "limit": asked.limit,
        "groups": tuple(dict.fromkeys(opt.listed(asked.group))),
        "model": made.model, "sampling": made.sampling, "generation": made.generation,
    }  # fmt: skip
    return _run(asked, asked.data, lambda cls: cls(**settings))


# What may be given beside --resume DIR alone: all that results do not depend on.
BESIDE_RESUME = (
    "--resume", "--processes", "--chart", "--json", "-q", "--quiet", "--debug", "--device", "--threads", "--offline",
    "--store-quantized",
)  # fmt: skip


def _resumed(asked: Request, model: ModelOptions) -> int:
    """Goes on with a run by its folder alone."""
    from evoprune.bench.eval_folder import no_folder, stored_settings

    check_output()
    if other := [word for word in sys.argv[2:] if word.startswith("-") and word.partition("=")[0] not in BESIDE_RESUME]:
        hint = "leave it out, or give all settings, --data included"
        raise UsageError(f"{other[0]} is given beside --resume, which has the settings of its run", hint)
    folder = Path(asked.resume)
    record = stored_settings(folder)

    def settings(cls: type):
        try:
            return cls.of_record(record, model)
        except (KeyError, TypeError, ValueError) as problem:
            raise no_folder(folder) from problem

    return _run(asked, str(record.get("data")), settings)


def _run(asked: Request, data: str, settings: Callable[[type], Any]) -> int:
    """Runs an evaluation; returns the exit code. A run that breaks off delivers the results so far.

    `settings`: makes `evaluation.run.Settings`, the class that it is called with.
    """
    from evoprune.bench.questions import load_questions

    check_chart(asked.chart, beside=asked.output, inputs=[data])
    videos = load_questions(Path(data))
    evaluation = None

    def rescue(error: dict[str, Any]) -> None:
        try:
            _deliver(evaluation, error, asked)
        finally:
            if evaluation.folder and not asked.quiet:
                note(f"to go on: evoprune eval --resume {shlex.quote(str(evaluation.folder.path))}")

    with rescuing(lambda: evaluation is not None and evaluation.loaded, rescue), progress(not asked.quiet) as tell:
        tell("loading libraries")
        prepare()
        from evoprune.bench.eval import EvalSettings, Evaluation, digest

        evaluation = Evaluation(replace(settings(EvalSettings), digest=digest(Path(data))), videos)
        if asked.resume:
            evaluation.keep_in(Path(asked.resume), resume=True)
        tell("loading model")
        evaluation.load(partial(tell, "quantizing"))
        if asked.output:
            evaluation.keep_in(Path(asked.output))
            if not asked.quiet and evaluation.folder.path != Path(asked.output):
                note(f"{asked.output} is there already: writing to {evaluation.folder.path}")
        evaluation.run(tell, asked.processes)
    _deliver(evaluation, None, asked)
    return SOME_FAILED if evaluation.failed else 0


def _deliver(evaluation, error: dict[str, Any] | None, asked: Request) -> None:
    """Writes the results so far: to stdout first, then into the folder, then as a chart."""
    from evoprune_cli.eval_tables import draw_chart, table

    document = evaluation.document(error)
    if asked.json or document["rows"] or error is None:
        show(document, table, asked.json)
    if evaluation.folder:
        evaluation.folder.finish(document)
    write(document, None, asked.chart, draw_chart)
