"""`evoprune batch`: many questions about many videos, one JSON line each, in a file that a later run can go on with."""

import os
import sys
import traceback
from contextlib import closing
from functools import partial

from evoprune.errors import UsageError, VideoError
from evoprune.model.limits import check_libraries
from evoprune.pipeline.options import PipelineOptions, SamplingOptions
from evoprune.text import SOME, some
from evoprune_cli import completion
from evoprune_cli import options as opt
from evoprune_cli.failures import debugging
from evoprune_cli.tally import Tally
from evoprune_cli.terminal import note_bits, note_tuning, progress, tell

SOME_FAILED = 6
DASH = "-"  # stdin, or stdout
USAGE = 'evoprune batch *.mp4 -Q "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct -o answers.jsonl'

ENGINES = ("local", "ray")
_row, _output, _engine = (partial(opt.option, panel) for panel in ("Rows", "Output", "Engine"))

Videos = opt.argument(
    list[str] | None, "VIDEO", "Video files, folders of videos, or folders of images, each of which is one video."
)
Questions = _row(list[str] | None, "-Q", "--question", "Asked of every video; repeatable.", metavar="TEXT")
Source = _row(
    str | None,
    "--from",
    "In place of VIDEO and -Q: JSONL or CSV rows with video, question and perhaps "
    "id, start, end, options (in CSV a|b|c), subtitles, "
    "answer. Files are relative to the file; - is stdin, which is read to its end first.",
    metavar="FILE|-",
)
Output = _output(
    str | None,
    "-o",
    "--output",
    "Where the records go, each as soon as it is finished; - is stdout. Records of a video stand together.",
    metavar="FILE|-",
)
Resume = _output(
    bool,
    "--resume",
    "Go on with FILE if it exists: rows that have an answer are skipped, rows that failed are asked again.",
)
Overwrite = _output(bool, "--overwrite", "Replace what is in FILE.")
Engine = _engine(
    str,
    "--engine",
    "ray: on a Ray cluster, one model for each GPU, or for each node without GPUs. Needs evoprune[ray].",
    **completion.one_of(*ENGINES),
)
Address = _engine(
    str | None,
    "--address",
    "Of the Ray cluster; default: RAY_ADDRESS, else a cluster on this machine.",
    **completion.one_of("auto", "HOST:PORT"),
)


@opt.with_options(*PipelineOptions.KINDS, model={"unless_typed": ""})
def batch(
    *,
    videos: Videos = None,
    questions: Questions = None,
    source: Source = None,
    output: Output = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    options: opt.MakeOptions,
    engine: Engine = ENGINES[0],
    address: Address = None,
    quiet: opt.Quiet = False,
    cache: opt.Cache = False,
) -> int:
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
    _check_flags(output, engine, address)
    made = options()
    settings = _settings(made)
    rows = _rows(videos or [], questions or [], source, made.sampling, quiet)
    named = _check_files(rows, source, output, quiet)
    ask = partial(_on_ray, address=address) if engine == "ray" else partial(_here, quiet=quiet)
    ask, resolved = partial(ask, cache=cache), settings.resolved_here if engine == "ray" else settings.resolved
    return _run(rows, resolved, ask, partial(_open, output, resume, overwrite), Tally(len(rows), quiet, named))


def _run(rows, resolved, ask, open_output, tally: Tally) -> int:
    """Asks what has no answer yet; returns the exit code.

    `resolved`: gives the settings. ask: makes records. open_output: opens the output file.
    """
    from evoprune.batch.output import remaining
    from evoprune.batch.rows import group_by_span

    with tally, closing(open_output()) as file, progress(not tally.quiet) as show:
        settings = resolved()
        left = remaining(rows, settings, file.found)
        ready = partial(tally.start, file, len(left), show)
        tally.note_others(len({record.id for record in file.found} - {row.id for row in rows}))
        if not left:
            ready()
            file.begin()
            return 0
        with closing(ask(group_by_span(left), settings, show, ready)) as records:
            for record in records:
                if not file.written:  # earlier records stay until there is one to write
                    file.begin(again={row.id for row in left})
                file.add(record)
                tally.add(record)
    return SOME_FAILED if tally.failed else 0


def _open(output: str, resume: bool, overwrite: bool):
    from evoprune.batch.output import RecordFile

    return RecordFile(output, resume=resume, overwrite=overwrite)


def _here(spans, settings, show, ready, *, cache: bool, quiet: bool):
    """Records made in this process."""
    show("loading model")
    check_libraries()
    from evoprune.batch.run import answers
    from evoprune.pipeline.cache import Cache

    qa = settings.load(partial(show, "quantizing"))
    if not quiet:
        note_tuning(qa.engine)
        note_bits(qa.engine)
    ready()
    yield from answers(qa, spans, settings, Cache() if cache else None, _print_traceback)


def _on_ray(spans, settings, show, ready, **where):
    """Records made on a Ray cluster."""
    from evoprune.batch.ray import answers_on_ray

    show("connecting to Ray")
    yield from answers_on_ray(spans, settings, **where, on_ready=ready)


def _check_flags(output: str | None, engine: str, address: str | None) -> None:
    if output is None:
        raise UsageError("no output", f"name a file with -o: {USAGE}")
    if output.startswith("--"):
        raise UsageError(f"-o has no file: {output} is an option", "-o FILE; a file of that name is ./--...")
    if engine not in ENGINES:
        raise UsageError(f"no engine {engine!r}", f"one of {', '.join(ENGINES)}")
    if address and engine != "ray":
        raise UsageError("--address is of a Ray cluster", "add --engine ray")


def _settings(options: PipelineOptions):
    """The settings of the batch. Refuses those that are wrong whatever the model and the videos are."""
    from evoprune.batch.settings import Settings
    from evoprune.text import is_text
    from evoprune.video.frames import choose_decoder

    if not options.model.model:
        raise UsageError("no model", "name one with -m or EVOPRUNE_MODEL; -m demo is a bundled tiny one")
    choose_decoder(options.sampling.decoder)
    if options.generation.system is not None and not is_text(options.generation.system):
        raise UsageError("the system prompt is not valid text", "write it in UTF-8")
    return Settings(options.model, options.pruning, options.sampling.timeless, options.generation)


def _check_files(rows, source: str | None, output: str, quiet: bool) -> list[str]:
    """As `_check_videos`; also refuses to write into a file that is read."""
    named = _check_videos(rows, source is not None, quiet)
    read = [path for row in rows for path in (*row.paths, row.subtitles_path) if path] + ([source] if source else [])
    if output != DASH and os.path.realpath(output) in map(os.path.realpath, read):
        raise UsageError(f"{output} is what is to be read", "choose another -o")
    return named


def _rows(videos: list[str], questions: list[str], source: str | None, sampling: SamplingOptions, quiet: bool):
    from evoprune.batch.inputs import left_out
    from evoprune.batch.rows import load_rows, product_rows, read_rows
    from evoprune.batch.table import read_all

    span = sampling.start_s, sampling.end_s
    if source is None:
        if not videos or not questions:
            if videos:
                raise UsageError("no question", f"put -Q before each question, or give --from FILE: {USAGE}")
            raise UsageError("no videos", f"give videos and questions, or --from FILE: {USAGE}")
        if DASH in videos:
            raise UsageError("a batch takes no video from stdin", "evoprune ask - does; a file of that name is ./-")
        rows = product_rows(videos, questions, *span)
        for line in filter(None, map(left_out, [] if quiet else videos)):
            tell(line)
        return rows
    if videos or questions:
        raise UsageError("--from excludes videos and questions", "the rows of the file name both")
    if source != DASH:
        return load_rows(source, *span)
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or sys.stdin.isatty():
        raise UsageError("--from - reads stdin, and nothing is piped into it", "pipe rows into it, or name a file")
    return read_rows(read_all(stdin, "stdin", "name a file with --from"), "stdin", "", *span)


def _check_videos(rows, in_rows: bool, quiet: bool) -> list[str]:
    """Names missing videos at once, though their rows only fail later. If all are missing, the command is wrong.

    Returns the videos that it named.
    """
    from evoprune.batch.inputs import missing_hint

    videos = {path: name for row in rows for path, name in zip(row.paths, row.inputs, strict=True)}
    missing = [path for path in videos if not os.path.exists(path)]
    if len(missing) == len(videos):
        pattern = any(character in missing[0] for character in "*?[")
        hint = "a pattern that matches nothing stays as it is: no file here has such a name"
        hint = hint if pattern else missing_hint(missing[0], in_rows)
        raise VideoError(f"no such file: {some(missing)}", hint)
    if not missing or quiet:
        return []
    their = "its rows" if len(missing) == 1 else f"{len(missing):,} of {len(videos):,} videos, whose rows"
    tell(f"no such file: {some(missing)} ({their} will fail)")
    return [videos[path] for path in missing[:SOME]]


def _print_traceback(problem: Exception) -> None:
    if debugging():
        traceback.print_exception(problem)
