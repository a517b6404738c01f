"""`evoprune eval`: accuracy against budget, beside what it costs."""

import json as jsonlib
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from evoprune.errors import UsageError
from evoprune.pipeline.choices import SPLITS
from evoprune.pipeline.options import GenerationOptions, ModelOptions, SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.files import check_chart, print_text, write_text
from evoprune_cli.render import WIDTH, note, progress

SCHEMA = "evoprune/eval@1"
SOME_FAILED = 6
_DATA, _SWEEP, _OUTPUT = "Data", opt.SWEEP, "Output"


def evaluate(
    data: Annotated[
        str,
        typer.Option(
            "--data",
            metavar="FILE.jsonl|demo",
            help="Questions: lines with video, question, answer and perhaps id, options, type, groups. Or demo: clips of the "
            "demo model's generator.",
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ],
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit",
            metavar="N",
            help="At most so many videos; default: all of a file, 100 demo clips.",
            min=1,
            show_default=False,
            rich_help_panel=_DATA,
        ),
    ] = None,
    split: Annotated[
        str,
        typer.Option(
            "--split",
            metavar="|".join(SPLITS),
            help="Of the demo: clips to report on, to tune on, or upright ones with a panning camera, to report on.",
            rich_help_panel=_DATA,
        ),
    ] = SPLITS[0],
    seed: Annotated[
        int,
        typer.Option(
            "--seed",
            metavar="<int>",
            help="Which block of the demo's clips, none of which meet; and of methods that draw lots.",
            min=0,
            max=2**31 - 1,
            rich_help_panel=_DATA,
        ),
    ] = 0,
    budget: opt.Budgets = None,
    method: opt.Methods = None,
    method_arg: opt.MethodArg = None,
    blind: Annotated[
        bool,
        typer.Option(
            "--blind",
            help="Also ask without the video: a grey one of the same size and length.",
            rich_help_panel=_SWEEP,
        ),
    ] = False,
    model: opt.Model = "demo",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = "none",
    offline: opt.Offline = False,
    fps: opt.Fps = None,
    frames: opt.Frames = None,
    max_frames: opt.MaxFrames = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    max_new_tokens: opt.MaxNewTokens = 64,
    processes: Annotated[
        int,
        typer.Option(
            "--processes",
            metavar="N",
            help="Show so many videos at a time, each in a process with its own copy of the model.",
            min=1,
            max=256,
            rich_help_panel=_OUTPUT,
        ),
    ] = 1,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="DIR",
            help="Write settings, samples and results there; if it exists, to DIR-2 and so on.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(
            "--resume",
            metavar="DIR",
            help="Go on with the run in DIR that was cut short, given the same options.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    chart: Annotated[
        str | None,
        typer.Option(
            "--chart",
            metavar="FILE.svg",
            help="Draw accuracy against tokens and against cost.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option("--json", help="The results as one JSON line instead of a table.", rich_help_panel=_OUTPUT),
    ] = False,
    quiet: opt.Quiet = False,
    debug: opt.Debug = False,
) -> int:
    """Measure accuracy against budget, on questions with known answers.

    Every row answers the same questions, the full budget first. Intervals are 95%, over videos. Cost is in operations at the 3B
    model's dimensions. Exit code 6: done, but some videos failed.

    \b
    evoprune eval --data samples/questions.jsonl
    evoprune eval --data demo -b 0.25,0.1 --method evoprune,downscale -o runs/a
    evoprune eval --data my.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --json
    """
    sweep = opt.sweep(budget, method, method_arg)
    _check_flags(split, output, resume)
    check_chart(chart, beside=output)
    videos, evaluation = _questions(data), None
    try:
        with progress(not quiet) as show:
            show("loading libraries")
            from evoprune.evaluation.run import Evaluation, Settings, digest

            settings = Settings(
                data, **sweep, blind=blind, split=split, seed=seed, limit=limit,
                model=ModelOptions(model, revision, device, dtype, quantize, offline=offline),
                sampling=SamplingOptions(fps, frames, max_frames=max_frames, max_visual_tokens=max_visual_tokens),
                generation=GenerationOptions(max_new_tokens),
                digest=None if videos is None else digest(Path(data)),
            )  # fmt: skip
            evaluation = Evaluation(settings, videos)
            if resume:
                evaluation.keep_in(Path(resume), resume=True)
            show("loading model")
            evaluation.load(lambda done, total: show("quantizing", done, total))
            if output:
                evaluation.keep_in(Path(output))
                if not quiet and evaluation.folder.path != Path(output):
                    note(f"{output} is there already: writing to {evaluation.folder.path}")
            evaluation.run(show, processes)
    except BaseException as problem:
        if evaluation is not None and evaluation.loaded and not isinstance(problem, BrokenPipeError | SystemExit):
            with suppress(UsageError):  # what went wrong first is what counts
                _deliver(evaluation, failure(problem), json, chart)
            problem.reported = True
            if evaluation.folder and not quiet:
                note(f"to go on: the same command with --resume {evaluation.folder.path} instead of -o")
        raise
    _deliver(evaluation, None, json, chart)
    return SOME_FAILED if evaluation.failed else 0


def _check_flags(split, output, resume) -> None:
    if split not in SPLITS:
        raise UsageError(f"--split {split!r} is unknown", f"one of {', '.join(SPLITS)}")
    if output is not None and resume is not None:
        raise UsageError("-o and --resume exclude each other", "--resume goes on in its own folder")


def _questions(data: str):
    """The videos of a file; None for the demo's own clips."""
    if data == "demo":
        return None
    from evoprune.evaluation.questions import load_items

    return load_items(Path(data))


def _deliver(evaluation, error: dict | None, json: bool, chart: str | None) -> None:
    """The results so far: to stdout first, into the folder, as a chart."""
    from evoprune_cli.eval_tables import draw_chart, table

    document = evaluation.document(error)
    if json:
        print_document(document)
    elif document["rows"] or error is None:
        print_text(table(document, min(WIDTH, shutil.get_terminal_size((WIDTH, 24)).columns)))
    if evaluation.folder:
        evaluation.folder.finish(document)
    if chart and document["rows"]:
        write_text(chart, draw_chart(document))


def print_document(document: dict) -> None:
    """As one line on stdout, in plain ASCII."""
    print(
        jsonlib.dumps({"schema": SCHEMA} | document, separators=(",", ":"), allow_nan=False),
        flush=True,
        file=sys.stdout,
    )
