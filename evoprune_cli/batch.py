"""`evoprune batch`: many questions about many videos, one JSON line each, in a file that can be gone on with."""

import os
import sys
import traceback
from contextlib import closing
from functools import partial
from typing import Annotated

import typer

from evoprune import methods
from evoprune.errors import UsageError, VideoError
from evoprune.pruning.budget import DEFAULT
from evoprune_cli import options as opt
from evoprune_cli.failures import debugging
from evoprune_cli.render import progress, tell
from evoprune_cli.tally import Tally

SOME_FAILED = 6
DASH = "-"  # stdin, or stdout
USAGE = 'evoprune batch *.mp4 -Q "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct -o answers.jsonl'
ENGINES = ("local", "ray")
_ROWS, _OUTPUT, _ENGINE = "Rows", "Output", "Engine"


def batch(
    videos: Annotated[
        list[str] | None,
        typer.Argument(metavar="VIDEO", help="Video files, or folders of frames.", show_default=False),
    ] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            "-Q",
            "--question",
            metavar="TEXT",
            help="Asked of every video; repeatable.",
            show_default=False,
            rich_help_panel=_ROWS,
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE|-",
            help="Instead: JSONL or CSV rows with video, question and perhaps id, start, end, options (in CSV a|b|c), answer. "
            "Videos are relative to the file; - is stdin. It is read to its end before anything is asked.",
            show_default=False,
            rich_help_panel=_ROWS,
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            metavar="FILE|-",
            help="Where the records go, each as soon as it is finished, those of a video together; - is stdout.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with FILE if it is there: rows that have an answer are skipped, those that failed are asked again.",
            rich_help_panel=_OUTPUT,
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option("--overwrite", help="Do without what is in FILE.", rich_help_panel=_OUTPUT),
    ] = False,
    model: opt.Model = "",
    revision: opt.Revision = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = "none",
    load_format: opt.LoadFormat = "auto",
    offline: opt.Offline = False,
    budget: opt.Budget = DEFAULT,
    method: opt.MethodName = methods.DEFAULT,
    method_arg: opt.MethodArg = None,
    seed: opt.Seed = 0,
    fps: opt.Fps = None,
    frames: opt.Frames = None,
    max_frames: opt.MaxFrames = None,
    max_visual_tokens: opt.MaxVisualTokens = None,
    start: opt.Start = "0",
    end: opt.End = None,
    decoder: opt.Decoder = "auto",
    max_new_tokens: opt.MaxNewTokens = 256,
    temperature: opt.Temperature = 0.0,
    top_p: opt.TopP = 1.0,
    system: opt.System = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine",
            metavar="|".join(ENGINES),
            help="ray: on a Ray cluster, a model a GPU, or a node where there are none. Needs evoprune[ray].",
            rich_help_panel=_ENGINE,
        ),
    ] = ENGINES[0],
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="auto|HOST:PORT",
            help="Of the Ray cluster; default: RAY_ADDRESS, or the one on this machine, made if there is none.",
            show_default=False,
            rich_help_panel=_ENGINE,
        ),
    ] = None,
    quiet: opt.Quiet = False,
    cache: opt.Cache = False,
    debug: opt.Debug = False,
) -> int:
    """Ask many questions about many videos: one JSON line each, the record of `ask --json` with the row's id.

    The model is loaded once, a video encoded once for all its questions, and the next one read meanwhile. A row that fails has a
    record with `error`, and the others go on; the exit code is then 6. Needs -m or EVOPRUNE_MODEL.

    \b
    export EVOPRUNE_MODEL=Qwen/Qwen2.5-VL-3B-Instruct
    evoprune batch *.mp4 -Q "What happens?" -o answers.jsonl
    evoprune batch --from rows.csv -o answers.jsonl --resume
    jq -c 'select(.split == "test")' all.jsonl | evoprune batch --from - -o -
    """
    if output is None:
        raise UsageError("no output", f"name a file with -o: {USAGE}")
    if not model:
        raise UsageError("no model", "name one with -m or EVOPRUNE_MODEL; -m demo is the bundled tiny one")
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", f"one of {', '.join(ENGINES)}")
    if address and engine != "ray":
        raise UsageError("--address is of a Ray cluster", "add --engine ray")
    from evoprune.batch.output import RecordFile
    from evoprune.batch.rows import grouped
    from evoprune.batch.run import Settings, remaining

    settings = Settings.of(
        model=model, revision=revision, device=device, dtype=dtype, quantize=quantize, load_format=load_format,
        offline=offline, budget=budget, method=method, method_args=opt.settings(method_arg), seed=seed, fps=fps,
        frames=frames, max_frames=max_frames, max_visual_tokens=max_visual_tokens, decoder=decoder, system=system,
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p,
    )  # fmt: skip
    _check(settings)
    rows = _rows(videos or [], questions or [], source, start, end)
    _check_videos(rows, quiet)
    read = [row.path for row in rows] + ([source] if source else [])
    if output != DASH and os.path.realpath(output) in map(os.path.realpath, read):
        raise UsageError(f"{output} is what is to be read", "choose another -o")
    tally = Tally(len(rows), quiet)
    with tally, closing(RecordFile(output, resume=resume, overwrite=overwrite)) as file:
        left = remaining(rows, settings, file.found)
        with progress(not quiet) as show:
            ready = partial(tally.start, file, len(left), show)
            if not left:
                ready()
                file.begin()
                return 0
            if engine == "ray":
                made = _on_ray(grouped(left), settings, address, cache, show, ready)
            else:
                made = _here(grouped(left), settings, cache, show, ready)
            with closing(made):
                for record in made:
                    if not file.written:  # what was there before stays until there is something to write
                        file.begin(again={row.id for row in left})
                    file.add(record)
                    tally.add(record)
    return SOME_FAILED if tally.failed else 0


def _here(parts, settings, cache: bool, show, ready):
    from evoprune.batch.run import answers
    from evoprune.pipeline.cache import Cache, default_folder

    show("loading model")
    qa = settings.load(lambda done, total: show("quantizing", done, total))
    ready()
    yield from answers(qa, parts, settings, Cache(default_folder()) if cache else None, _tell_failure)


def _on_ray(parts, settings, address: str | None, cache: bool, show, ready):
    from evoprune.batch.ray import answers_on_ray

    show("connecting to Ray")
    yield from answers_on_ray(parts, settings, address=address, cache=cache, on_ready=ready)


def _check(settings) -> None:
    """Checks what the options do not check themselves, as far as that needs no model."""
    from evoprune.batch.rows import is_text
    from evoprune.video.decode import choose_decoder

    choose_decoder(settings.sampling.decoder)
    if settings.generation.system is not None and not is_text(settings.generation.system):
        raise UsageError("the system prompt is not valid text", "write it in UTF-8")


def _rows(videos: list[str], questions: list[str], source: str | None, start: str, end: str | None):
    from evoprune.batch.rows import load_rows, product_rows, read_rows
    from evoprune.video.sampling import parse_time

    span = parse_time(start), parse_time(end) if end else None
    if source is None:
        if not videos or not questions:
            raise UsageError("no videos" if not videos else "no question", f"give both, or --from FILE: {USAGE}")
        if DASH in videos:
            raise UsageError("a batch takes no video from stdin", "evoprune ask - does; a file of that name is ./-")
        return product_rows(videos, questions, *span)
    if videos or questions:
        raise UsageError("--from excludes videos and questions", "the rows of the file name both")
    if source != DASH:
        return load_rows(source, *span)
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or sys.stdin.isatty():
        raise UsageError("--from - reads stdin, and nothing is piped into it", "pipe rows into it, or name a file")
    return read_rows(stdin.read(), "stdin", "", *span)


def _check_videos(rows, quiet: bool) -> None:
    """One that is missing is a failed row, but told at once; where all are, something else is wrong."""
    videos = list(dict.fromkeys(row.path for row in rows))
    missing = [path for path in videos if not os.path.exists(path)]
    if len(missing) == len(videos):
        others = f", and none of the {len(videos) - 1:,} others" if len(videos) > 1 else ""
        hint = "download what is on the web first, e.g. with yt-dlp; paths in a file of rows are relative to it"
        if any(character in missing[0] for character in "*?["):
            hint = "a pattern that matches nothing stays as it is: no file here has such a name"
        raise VideoError(f"no such file: {missing[0]}{others}", hint)
    if missing and not quiet:
        tell(f"missing: {missing[0]}{', ...' if missing[1:] else ''} ({len(missing):,} of {len(videos):,} videos)")


def _tell_failure(problem: Exception) -> None:
    if debugging():
        traceback.print_exception(problem)
