"""`evoprune batch`: many questions about many videos, one JSON line each, in a file that a later run can go on with."""

import os
import sys
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from evoprune.errors import UsageError, VideoError
from evoprune.session.options import PipelineOptions, SamplingOptions
from evoprune.text import SOME, missing_hint, shown, some
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.loading import note_model, prepare
from evoprune_cli.options import flag, own
from evoprune_cli.results import SOME_FAILED, one_of
from evoprune_cli.tally import Tally
from evoprune_cli.terminal import print_traceback, progress, stdout, tell

DASH = "-"  # stdin, or stdout
USAGE = 'evoprune batch *.mp4 -Q "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct -o answers.jsonl'
ENGINES = ("local", "ray")


@dataclass(frozen=True, kw_only=True)
class Request:
    videos: opt.argument(
        list[str] | None, "VIDEO", "Video files, folders of videos, or folders of images, each of which is one video."
    ) = None
    questions: list[str] | None = own("-Q --question TEXT", "Asked of every video; repeatable.")
    source: str | None = own(
        "--from FILE|-",
        "In place of VIDEO and -Q: JSONL or CSV rows with video, question and perhaps "
        "id, start, end, fps, frames, frame_rate, max_new_tokens, options (in CSV a|b|c), subtitles, "
        "answer. Files are relative to the file; - is stdin, which is read to its end first.",
    )
    output: str | None = own(
        "-o --output FILE|-",
        "Where the records go, each as soon as it is finished; - is stdout. Records of a video stand together.",
    )
    resume: bool = flag(
        "--resume",
        "Go on with FILE if it exists: rows that have an answer are skipped, rows that failed are asked again.",
    )
    overwrite: bool = flag("--overwrite", "Replace the records in FILE; a file that holds anything else stays.")
    options: opt.MakeOptions
    engine: str = own(
        "--engine",
        "ray: on a Ray cluster, one model for each GPU, or for each node without GPUs. Needs evoprune[ray].",
        default=ENGINES[0],
        **completion.one_of(*ENGINES),
    )
    address: str | None = own(
        "--address",
        "Of the Ray cluster; default: RAY_ADDRESS, else a cluster on this machine.",
        **completion.one_of("auto", "HOST:PORT"),
    )
    quiet: opt.Quiet = False
    cache: opt.Cache = False


@opt.with_options(
    *PipelineOptions.KINDS,
    model={"unless_typed": ""},
    panels={"questions": "Rows", "output": "Output", "engine": "Engine"},
)
def batch(asked: Request) -> int:
    """Ask many questions about many videos: one JSON line each.

    A line is the record of `ask --json` with the row's id. The model is loaded once, a video encoded once for all its questions,
    and the next one read meanwhile. A row that fails has a record with `error`, and the others go on; the exit code is then 6.
    Needs -m or EVOPRUNE_MODEL.

    \b
    export EVOPRUNE_MODEL=Qwen/Qwen2.5-VL-3B-Instruct
    evoprune batch *.mp4 -Q "What happens?" -o answers.jsonl
    evoprune batch --from rows.csv -o answers.jsonl --resume
    jq -c 'select(.split == "test")' all.jsonl | evoprune batch --from - -o -
    """
    _check_flags(asked)
    made = asked.options()
    settings = _settings(made)
    rows = _rows(asked, made.sampling)
    tally = Tally(len(rows), asked.quiet, _check_files(asked, rows))
    return _run(asked, rows, settings, tally)


def _run(asked: Request, rows, settings, tally: Tally) -> int:
    """Asks what has no answer yet; returns the exit code."""
    from evoprune.batch.output import RecordFile, remaining
    from evoprune.batch.rows import group_by_span

    opened = partial(RecordFile, asked.output, stdout=stdout(), resume=asked.resume, overwrite=asked.overwrite)
    with tally, closing(opened()) as file, progress(not asked.quiet) as show:
        left = remaining(rows, settings, file.found)
        ready = partial(tally.start, file, len(left), show)
        tally.note_others(len({record.id for record in file.found} - {row.id for row in rows}))
        if not left:
            ready()
            file.begin()
            return 0
        answers = _on_ray if asked.engine == "ray" else _here
        with closing(answers(asked, group_by_span(left), settings, show, ready)) as records:
            for record in records:
                if not file.written:  # earlier records stay until there is one to write
                    file.begin(again={row.id for row in left})
                file.add(record)
                tally.add(record)
    return SOME_FAILED if tally.failed else 0


def _here(asked: Request, spans, settings, show, ready):
    show("loading model")
    prepare()
    from evoprune.batch.run import answers
    from evoprune.session.cache import Cache

    qa = settings.load(partial(show, "quantizing"))
    note_model(qa.engine, settings.generation, asked.quiet)
    ready()
    yield from answers(qa, spans, settings, Cache() if asked.cache else None, print_traceback)


def _on_ray(asked: Request, spans, settings, show, ready):
    from evoprune.batch.ray import answers_on_ray

    show("connecting to Ray")
    yield from answers_on_ray(spans, settings, address=asked.address, cache=asked.cache, on_ready=ready)


def _check_flags(asked: Request) -> None:
    if asked.output is None:
        raise UsageError("no output", f"name a file with -o: {USAGE}")
    if asked.output.startswith("--"):
        raise UsageError(f"-o has no file: {asked.output} is an option", "-o FILE; a file of that name is ./--...")
    if asked.engine not in ENGINES:
        raise UsageError(f"no engine {asked.engine!r}", f"one of {', '.join(ENGINES)}")
    if asked.address and asked.engine != "ray":
        raise UsageError("--address is of a Ray cluster", "add --engine ray")


def _settings(options: PipelineOptions):
    """The settings of the batch. Refuses those that are wrong whatever the model and the videos are."""
    from evoprune.batch.output import Settings
    from evoprune.text import is_text
    from evoprune.video.frames import choose_decoder

    if not options.model.model:
        raise UsageError("no model", "name one with -m or EVOPRUNE_MODEL; -m demo is a bundled tiny one")
    choose_decoder(options.sampling.decoder)
    if options.generation.system is not None and not is_text(options.generation.system):
        raise UsageError("the system prompt is not valid text", "write it in UTF-8")
    return Settings(options.model, options.pruning, options.sampling.timeless, options.generation)


def _rows(asked: Request, sampling: SamplingOptions):
    from evoprune.batch.rows import left_out, load_rows, product_rows, read_all, read_rows

    span, source, videos = (sampling.start_s, sampling.end_s), asked.source, asked.videos or []
    if source is None:
        if not videos:
            raise UsageError("no videos", f"give videos and questions, or --from FILE: {USAGE}")
        if not asked.questions:
            raise UsageError("no question", f"put -Q before each question, or give --from FILE: {USAGE}")
        if DASH in videos:
            raise UsageError("a batch takes no video from stdin", "evoprune ask - does; a file of that name is ./-")
        rows = product_rows(videos, asked.questions, *span)
        for line in filter(None, map(left_out, [] if asked.quiet else videos)):
            tell(line)
        return rows
    if videos or asked.questions:
        raise UsageError("--from excludes videos and questions", "the rows of the file name both")
    if source != DASH:
        return load_rows(source, *span)
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or sys.stdin.isatty():
        raise UsageError("--from - reads stdin, and nothing is piped into it", "pipe rows into it, or name a file")
    return read_rows(read_all(stdin, "stdin", "name a file with --from"), "stdin", "", *span)


def _check_files(asked: Request, rows) -> list[str]:
    """Names missing videos, and returns them, though their rows only fail later. If all are missing, the command is wrong.

    Also refuses to write into a file that is read.
    """
    videos = {path: name for row in rows for path, name in zip(row.paths, row.inputs, strict=True)}
    missing = [path for path in videos if not os.path.exists(path)]
    names = [shown(path) for path in missing]
    if len(missing) == len(videos):
        pattern = any(character in missing[0] for character in "*?[")
        hint = "a pattern that matches nothing stays as it is: no file here has such a name"
        usual = "check the path" if asked.source is None else "paths in a file of rows are relative to it"
        raise VideoError(f"no such file: {some(names)}", hint if pattern else missing_hint(missing[0], usual))
    if missing and not asked.quiet:
        their = "its rows" if len(missing) == 1 else f"{len(missing):,} of {len(videos):,} videos, whose rows"
        tell(f"no such file: {some(names)} ({their} will fail)")
    read = filter(None, [*videos, *(row.subtitles_path for row in rows), asked.source])
    if asked.output != DASH and one_of(asked.output, read):
        raise UsageError(f"{asked.output} is what is to be read", "choose another -o")
    return [] if asked.quiet else [videos[path] for path in missing[:SOME]]
