"""`evoprune eval`: accuracy against budget, beside what it costs."""

from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from evoprune.bundled import BOTH, SPLITS, WORLDS, demo_knowing
from evoprune.errors import UsageError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import PipelineOptions
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.failures import failure
from evoprune_cli.files import check_chart, print_text, write_text
from evoprune_cli.terminal import check_output, note, page_width, print_document, progress

SOME_FAILED = 6

_data, _output = partial(opt.option, "Data"), partial(opt.option, "Output")

Data = _data(
    str,
    "--data",
    "Questions: JSONL or CSV rows with video, question, answer and perhaps id, options, type, groups. Or demo: clips "
    "of the demo models' generators.",
    **completion.one_of("FILE", "demo"),
)
Limit = _data(
    int | None, "--limit", "At most so many videos; default: all of a file, or 100 demo clips.", metavar="N", min=1
)
World = _data(
    str,
    "--world",
    "The demo's clips: coloured shapes and digits, or crowded scenes with signs.",
    **completion.one_of(*WORLDS, BOTH),
)
Groups = _data(
    list[str] | None,
    "--group",
    "Only questions of these groups; of scenes picture (one frame pair) or video, for example.",
    metavar="LIST",
)
Split = _data(
    str,
    "--split",
    "The demo's clips: to report on, to tune on, or upright ones with a panning camera, to report on.",
    **completion.one_of(*SPLITS),
)
Seed = _data(
    int,
    "--seed",
    "Block of the demo's clips; blocks share no clip. Also the seed of methods that draw at random.",
    metavar="<int>",
    min=0,
    max=2**31 - 1,
)
Blind = opt.swept(bool, "--blind", "Also ask without the video: a grey one of the same size and length.")
Processes = _output(
    int,
    "--processes",
    "Videos at a time, each in a process with its own copy of the model.",
    metavar="N",
    min=1,
    max=256,
)
Output = _output(
    str | None,
    "-o",
    "--output",
    "Write settings, samples and results there; if it exists, to DIR-2 and so on.",
    metavar="DIR",
)
Resume = _output(str | None, "--resume", "Continue the interrupted run in DIR. Needs the same options.", metavar="DIR")
Chart = _output(str | None, "--chart", "Draw accuracy against tokens and against cost.", metavar="FILE.svg")
Json = _output(bool, "--json", "The results as one JSON line instead of a table.")


@opt.with_options(
    *PipelineOptions.KINDS,
    without=(
        "load_format", "budget", "method", "seed", "start_s", "end_s", "decoder", "subtitles", "max_subtitle_tokens",
        "temperature", "top_p", "system",
    ),
    model={
        "unless_typed": "",
        "help": "Hub id, local folder, demo or demo-scenes; default: demo, or demo-scenes for --world scenes.",
    },
    max_new_tokens={"unless_typed": 64},
)  # fmt: skip
def evaluate(
    *,
    data: Data,
    limit: Limit = None,
    world: World = WORLDS[0],
    group: Groups = None,
    split: Split = SPLITS[0],
    seed: Seed = 0,
    budget: opt.Budgets = None,
    method: opt.Methods = None,
    blind: Blind = False,
    options: opt.MakeOptions,
    processes: Processes = 1,
    output: Output = None,
    resume: Resume = None,
    chart: Chart = None,
    json: Json = False,
    quiet: opt.Quiet = False,
) -> int:
    """Measure accuracy against budget, on questions with known answers.

    Every setting answers the same questions, the full budget first. Settings are compared with it, and with the first method at
    the same budget. Intervals are 95%, over videos. Cost is in operations at the 3B model's dimensions. Exit code 6: done, but some
    videos failed.

    \b
    evoprune eval --data samples/questions.jsonl
    evoprune eval --data demo -b 0.25,0.1 --method evoprune,downscale -o runs/a
    evoprune eval --data my.jsonl -m Qwen/Qwen2.5-VL-3B-Instruct --json
    """
    made = options()
    sweep = opt.sweep(budget, method, made.pruning.method_args, named=True)
    _check_flags(world, split, output, resume)
    model = made.model if made.model.model else replace(made.model, model=_knowing(data, world))
    check_chart(chart, beside=output, inputs=[data])
    videos = _questions(data)
    asked = {
        **sweep, "data": data, "blind": blind, "split": split, "seed": seed, "limit": limit,
        "world": world, "groups": tuple(dict.fromkeys(opt.listed(group))),
        "model": model, "sampling": made.sampling, "generation": made.generation,
    }  # fmt: skip
    deliver = partial(_deliver, json=json, chart=chart)
    return _run(asked, videos, output, resume, processes, deliver, quiet)


def _run(
    asked: dict[str, Any], videos, output: str | None, resume: str | None, processes: int, deliver, quiet: bool
) -> int:
    """Runs an evaluation; returns the exit code. A run that breaks off delivers the results so far.

    Args:
        asked: fields of `evaluation.run.Settings`. videos: see `Evaluation`.
        output, resume: the folder to write to, or the one to go on in.
        deliver: writes the results so far; called with the evaluation and the error that ended it, or None.
    """
    evaluation = None
    try:
        with progress(not quiet) as show:
            evaluation = _checked(asked, videos, resume, show)
            show("loading model")
            evaluation.load(partial(show, "quantizing"))
            if output:
                evaluation.keep_in(Path(output))
                if not quiet and evaluation.folder.path != Path(output):
                    note(f"{output} is there already: writing to {evaluation.folder.path}")
            evaluation.run(show, processes)
    except BaseException as problem:
        if evaluation is not None and evaluation.loaded and not isinstance(problem, BrokenPipeError | SystemExit):
            with suppress(UsageError):  # the first problem is the one to report
                deliver(evaluation, failure(problem))
            problem.reported = True
            if evaluation.folder and not quiet:
                note(f"to go on: the same command with --resume {evaluation.folder.path} instead of -o")
        raise
    deliver(evaluation, None)
    return SOME_FAILED if evaluation.failed else 0


def _checked(asked: dict[str, Any], videos, resume: str | None, show):
    """The evaluation, without a model. Wrong settings and a wrong folder are refused here."""
    show("loading libraries")
    check_libraries()
    from evoprune.evaluation.run import Evaluation, Settings, digest

    made = Evaluation(Settings(**asked, digest=None if videos is None else digest(Path(asked["data"]))), videos)
    if resume:
        made.keep_in(Path(resume), resume=True)
    return made


def _check_flags(world, split, output, resume) -> None:
    check_output()
    if world not in (*WORLDS, BOTH):
        raise UsageError(f"--world {world!r} is unknown", f"one of {', '.join((*WORLDS, BOTH))}")
    if split not in SPLITS:
        raise UsageError(f"--split {split!r} is unknown", f"one of {', '.join(SPLITS)}")
    if output is not None and resume is not None:
        raise UsageError("-o and --resume exclude each other", "--resume goes on in its own folder")


def _knowing(data: str, world: str) -> str:
    """The bundled model that knows what is asked about. Of a file nothing is known, and samples have questions for `demo`."""
    if data != "demo":
        return "demo"
    if world == BOTH:
        hint = f"evaluate one after the other (--world {', then --world '.join(WORLDS)}), or name a model with -m"
        raise UsageError("no bundled model knows both worlds", hint)
    return demo_knowing(world)


def _questions(data: str):
    """The videos of a file of questions; None for the demo's own clips."""
    if data == "demo":
        return None
    from evoprune.evaluation.questions import load_questions

    return load_questions(Path(data))


def _deliver(evaluation, error: dict | None, json: bool, chart: str | None) -> None:
    """Writes the results so far: to stdout first, then into the folder, then as a chart."""
    from evoprune_cli.eval_tables import draw_chart, table

    document = evaluation.document(error)
    if json:
        print_document(document)
    elif document["rows"] or error is None:
        print_text(table(document, page_width()))
    if evaluation.folder:
        evaluation.folder.finish(document)
    if chart and document["rows"]:
        write_text(chart, draw_chart(document))
