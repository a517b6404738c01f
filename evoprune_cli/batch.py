"""`evoprune batch`: answers many questions about many videos and writes one JSON line per answer. Runs can be resumed."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from evoprune.batch import RowReader
from evoprune.errors import UsageError, VideoError
from evoprune.language import GenerationOptions
from evoprune.report import Report, VideoFacts, warned
from evoprune.session import ModelOptions, PipelineOptions, PruneOptions
from evoprune.util import SOME, clock, counted, is_text, is_url, listed, missing_hint, roughly, shown, some
from evoprune.video import SamplingOptions
from evoprune_cli import options as opt
from evoprune_cli.delivery import is_one_of
from evoprune_cli.running import SOME_FAILED, note_model, prepare
from evoprune_cli.terminal import encoding, print_traceback, print_warning, progress, stdout, tell
from evoprune_cli.words import check_no_questions

if TYPE_CHECKING:
    from evoprune.batch import Captions, RecordFile, Row, Settings
    from evoprune_cli.via import Server

DASH = "-"  # stdin or stdout
USAGE = 'evoprune batch *.mp4 -Q "What happens?" -m Qwen/Qwen2.5-VL-3B-Instruct -o answers.jsonl'
PLACES = ("local", "ray")
TELL_EVERY_S = 60.0


@dataclass(frozen=True, kw_only=True)
class BatchArguments:
    """The arguments of `evoprune batch`."""

    videos: opt.argument(
        list[str] | None, "VIDEO", "Video files, folders of videos, or folders of images, each of which is one video."
    ) = None
    questions: opt.option(
        list[str] | None, "-Q --question TEXT", "Question to ask about every video; repeatable.", "Rows"
    ) = None
    source: opt.option(
        str | None,
        "--from FILE|-",
        "Instead of VIDEO and -Q: JSONL or CSV rows with video, question and optionally "
        f"{RowReader.MAY_HAVE} (in CSV a|b|c), subtitles, "
        "answer; in JSONL also messages instead of question. Paths are relative to the file; - is stdin, "
        "which is read completely first.",
        "Rows",
    ) = None
    recursive: opt.option(
        bool, "-r --recursive", "Also read the videos in subfolders, except hidden ones and links.", "Rows"
    ) = False
    output: opt.option(
        str | None,
        "-o --output FILE|-",
        "Write each record to FILE as soon as it is finished; - is stdout. Records of a video are adjacent. FILE.csv gets a "
        "table: the columns of the rows, then answer, error, finish_reason, visual_tokens, new_tokens, total_ms.",
        opt.OUTPUT,
    ) = None
    resume: opt.option(
        bool,
        "--resume",
        "Continue FILE if it exists: answered rows are skipped, and failed rows are asked again.",
        opt.OUTPUT,
    ) = False
    overwrite: opt.Overwrite = False
    captions: opt.option(
        str | None,
        "--captions DIR",
        "Also write the answer about each video to DIR, in a .txt file named after the video. Takes one question per video, and "
        "never replaces a file that is not named by a record in FILE.",
        opt.OUTPUT,
    ) = None
    options: opt.PipelineArguments
    on: opt.option(
        str,
        "--on",
        "Where to run; ray: a Ray cluster, with one model per GPU, or per node without GPUs. Needs evoprune[ray].",
        "Machines",
        **opt.one_of(*PLACES),
    ) = PLACES[0]
    address: opt.option(
        str | None,
        "--address",
        "Address of the Ray cluster; default: RAY_ADDRESS, otherwise a new cluster on this machine.",
        "Machines",
        **opt.one_of("auto", "HOST:PORT"),
    ) = None
    quiet: opt.Quiet = False
    cache: opt.Cache = False
    via: opt.Via = None


@opt.command(
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    *SamplingOptions.FILES,
    *GenerationOptions.ANSWER,
    short="questions source output resume overwrite model budget fps quiet",
    model={"unless_typed": ""},
)
def batch(given: BatchArguments) -> int:
    """Ask many questions about many videos: one JSON line each.

    Each line is a record as printed by `ask --json`, with the row's id. The model is loaded once, and each video is encoded once
    for all its questions, while the next videos are being read. If a row fails, its record has an `error`, the other rows continue,
    and the exit code is 6. Needs -m or EVOPRUNE_MODEL.

    \b
    export EVOPRUNE_MODEL=Qwen/Qwen2.5-VL-3B-Instruct
    evoprune batch *.mp4 -Q "What happens?" -o answers.jsonl
    evoprune batch --from rows.csv -o answers.jsonl --resume
    jq -c 'select(.split == "test")' all.jsonl | evoprune batch --from - -o -
    """
    pipeline = _parse(given)
    server = _server(given)
    batch = _check(given, pipeline, server)
    return _run(batch, given, server)


def _parse(given: BatchArguments) -> PipelineOptions:
    """Return the options that determine the answers, after checking the others."""
    if not given.output:
        raise UsageError("no output file", f"name a file with -o: {USAGE}")
    if given.output.startswith("--"):
        message = f"-o has no file: {given.output} is an option"
        raise UsageError(message, "give -o FILE; if that is the file's name, write ./--...")
    if given.on not in PLACES:
        raise UsageError(f"--on {given.on} is unknown", f"use {' or '.join(PLACES)}")
    if given.address and given.on != "ray":
        raise UsageError("--address applies only to a Ray cluster", "add --on ray")
    return replace(given.options, check_model=not given.via).parse()


def _server(given: BatchArguments) -> "Server | None":
    """Return the server to ask (`--via`), or None if the model is to be loaded here."""
    if not given.via:
        return None
    from evoprune_cli.via import find_server

    others = {"--cache": given.cache, "--on": given.on != PLACES[0]}
    with progress(not given.quiet) as show:
        return find_server(given.via, given.options, others, show, given.quiet)


@dataclass(frozen=True)
class Batch:
    """Checked rows and settings of a batch, and where its records go.

    Attributes:
        captions: The folder of captions, or None.
        missing: The names of missing videos, which have been reported.
    """

    rows: list["Row"]
    settings: "Settings"
    captions: "Captions | None"
    missing: list[str]

    def open_file(self, given: BatchArguments) -> "RecordFile":
        from evoprune.batch import RecordFile, TableFile

        kind = partial(TableFile, rows=self.rows) if TableFile.is_meant(given.output) else RecordFile
        return kind(given.output, stdout=stdout(), resume=given.resume, overwrite=given.overwrite)


def _check(given: BatchArguments, pipeline: PipelineOptions, server: "Server | None") -> Batch:
    """Read the rows, and check everything that can be checked before loading the model or asking the server."""
    from evoprune.batch import Captions, Settings, TableFile
    from evoprune.video import choose_decoder

    if not (pipeline.model.model or server):
        raise UsageError("no model", "name one with -m or EVOPRUNE_MODEL; -m demo is a tiny bundled one")
    choose_decoder(pipeline.sampling.decoder)
    if pipeline.generation.system is not None and not is_text(pipeline.generation.system):
        raise UsageError("the system prompt is not valid text", "write it in UTF-8")
    table = TableFile.is_meant(given.output)
    if given.captions is not None and (table or not given.captions):
        raise UsageError(
            "--captions needs a folder, and records that name its files", "use --captions DIR -o FILE.jsonl"
        )
    if pipeline.generation.logprobs is not None and table:
        raise UsageError("--logprobs cannot be written to a table", "use -o FILE.jsonl")
    settings = Settings(pipeline.model, pipeline.pruning, pipeline.sampling, pipeline.generation)
    if server:
        from evoprune_cli.remote_batch import settings_of

        settings = settings_of(server, given.options, pipeline)
    rows = _rows(given, RowReader(passes_on=table, sampling=pipeline.sampling))
    if any(row.earlier for row in rows):
        pipeline.pruning.config().method.check_conversation()
    if pipeline.generation.choices_from_rows:
        if given.source is None:
            raise UsageError("--choices options needs rows with options", "give --from FILE, or the texts")
        rows = [row.with_scored_options() for row in rows]
    replaced = given.output if given.overwrite and os.path.isfile(given.output) else None
    captions = None if given.captions is None else Captions(given.captions, rows, replaced)
    return Batch(rows, settings, captions, _check_files(rows, given.source, given.output, given.quiet))


def _run(batch: Batch, given: BatchArguments, server: "Server | None") -> int:
    """Answer the rows that have no record yet, and write the records."""
    from evoprune.batch import Sources

    tally = Tally(len(batch.rows), given.quiet, batch.missing)
    shows = not given.quiet and sys.stderr.isatty()  # otherwise, the tally reports the progress
    with tally, closing(batch.open_file(given)) as file, progress(shows) as show:
        sources = Sources(batch.settings)
        left = sources.remaining(batch.rows, file.earlier_records)
        ready = partial(tally.start, file, len(left), show)
        _note_others(batch.rows, file, given.quiet)
        if batch.captions:
            batch.captions.start(left, file)
        if not left:
            ready()
            file.begin()
            return 0
        files = {row.id: sources.of(row) | (batch.captions.of(row) if batch.captions else {}) for row in left}
        with closing(_answers(left, batch.settings, given, show, ready, tally, server)) as records:
            for record in records:
                sources.check_revision(record.model.revision)
                if not record.error:
                    sources.check_sizes(record.pruning.after_tower_below or 0)
                record.batch["files"] = files[record.id]
                if not file.written:  # keep the earlier records until there is a new record to write
                    file.begin(again={row.id for row in left})
                file.add(record)
                if batch.captions:
                    batch.captions.add(record)
                tally.add(record)
    return SOME_FAILED if tally.failed else 0


def _note_others(rows: Sequence["Row"], file: "RecordFile", quiet: bool) -> None:
    """Print a note if the output has records of other rows."""
    others = len({record.id for record in file.earlier_records} - {row.id for row in rows})
    if others and not quiet:
        are = "is" if others == 1 else "are"
        tell(f"the output has {counted(others, 'record')} that {are} not in this batch; kept")


def _answers(
    left: Sequence["Row"],
    settings: "Settings",
    given: BatchArguments,
    show,
    ready,
    tally: "Tally",
    server: "Server | None",
):
    """Answer rows and yield their records. `ready` is called once the model is loaded, or the cluster is connected.

    In this process, `tally` receives encoding progress updates and read wait times.
    """
    from evoprune.batch import Span

    spans = Span.group(left)
    if server:
        from evoprune_cli.remote_batch import answers_via

        ready()
        yield from answers_via(server, spans, settings, print_traceback, tally.encoding)
        return
    if given.on == "ray":
        from evoprune.batch import answers_on_ray

        show("connecting to Ray")
        yield from answers_on_ray(spans, settings, address=given.address, cache=given.cache, on_ready=ready)
        return
    from evoprune.session import ReadAhead, describe

    show("loading model")
    prepare()
    model = describe(settings.model)
    first = [] if given.cache else spans  # with the disk cache, inputs may not need to be read at all
    asked = ((span.rows[0].paths, settings.sampling.with_overrides(**span.sampling)) for span in first)
    with ReadAhead(model, asked, settings.pruning) as ahead:
        from evoprune.batch import answers
        from evoprune.session import Cache

        session = settings.load(partial(show, "quantizing"), model)
        note_model(session, settings.generation, given.quiet)
        ready()
        stored = Cache() if given.cache else None
        on_progress = encoding(tally.encoding)
        yield from answers(
            session, spans, settings, stored, print_traceback, ahead, progress=on_progress, on_wait=tally.wait
        )


def _rows(given: BatchArguments, reader: RowReader) -> list["Row"]:
    """Return the rows from the --from file, or one row for each combination of video and question.

    Raises:
        UsageError: If the options are incomplete or incompatible.
    """
    if given.source is None:
        return _pairs(given, reader)
    if given.recursive:
        raise UsageError("-r applies only to folders, but --from names every video", "leave out one of the two")
    if given.videos or given.questions:
        raise UsageError("--from cannot be combined with videos or questions", "the rows in the file contain both")
    if given.source != DASH:
        return reader.load(given.source)
    stdin = getattr(sys.stdin, "buffer", None)
    if stdin is None or sys.stdin.isatty():
        raise UsageError("--from - reads stdin, but nothing is piped into it", "pipe rows into it, or name a file")
    return replace(reader, file="name a file with --from").read(stdin, "stdin")


def _pairs(given: BatchArguments, reader: RowReader) -> list["Row"]:
    """Return one row for each combination of video and question, and report skipped files on stderr. For errors, see `_rows`."""
    from evoprune.batch import left_out

    if not given.videos:
        raise UsageError("no videos", f"give videos and questions, or --from FILE: {USAGE}")
    if not given.questions:
        raise UsageError("no question", f"put -Q before each question, or give --from FILE: {USAGE}")
    if DASH in given.videos:
        message = "a batch cannot read a video from stdin"
        raise UsageError(message, "evoprune ask - can; for a file with that name, write ./-")
    check_no_questions(given.videos, USAGE)
    pictures = not reader.sampling.has_span  # --start and --end don't apply to images
    rows = reader.pairs(given.videos, given.questions, given.recursive, pictures)
    if not given.quiet and not given.recursive:
        for line in filter(None, (left_out(video, pictures) for video in given.videos)):
            tell(line)
    return rows


def _check_files(rows: list["Row"], source: str | None, output: str, quiet: bool) -> list[str]:
    """Report missing videos on stderr because their rows will fail. Returns the names of these videos.

    Raises:
        VideoError: If all videos are missing.
        UsageError: If the output would overwrite one of the inputs.
    """
    videos = {path: name for row in rows for path, name in zip(row.paths, row.inputs, strict=True)}
    missing = [path for path in videos if not is_url(path) and not os.path.exists(path)]
    names = [shown(path) for path in missing]
    if len(missing) == len(videos):
        usual = "check the path" if source is None else "paths in a file of rows are relative to that file"
        hint = missing_hint(missing[0], usual)
        if any(character in missing[0] for character in "*?["):
            hint = "no file matches this pattern"
        raise VideoError(f"no such file: {some(names)}", hint)
    if missing and not quiet:
        failing = "its rows"
        if len(missing) > 1:
            failing = f"{len(missing):,} of {len(videos):,} videos, whose rows"
        tell(f"no such file: {some(names)} ({failing} will fail)")
    read = filter(None, [*videos, *(row.subtitles_path for row in rows), source])
    if output != DASH and is_one_of(output, read):
        raise UsageError(f"{output} is one of the inputs", "choose another -o")
    return [] if quiet else [videos[path] for path in missing[:SOME]]


class Tally:
    """Counts the records in a batch and reports the batch's progress on stderr.

    As a context manager, it prints a summary at the end, even if the batch is interrupted.

    Args:
        total: The number of rows, including rows answered in an earlier run.
        quiet: Whether to print only warnings.
        named: Missing videos already reported.

    Attributes:
        failed: The number of failed rows in this run.
    """

    def __init__(self, total: int, quiet: bool, named: Sequence[str] = ()):
        self.failed = 0
        self.quiet = quiet
        self._total = total
        self._reported_missing = frozenset(named)
        self._file: RecordFile | None = None
        self._warnings: dict[str, dict[str | None, VideoFacts]] = {}  # videos by warning and path
        # `_cut_answers` is the number of answers truncated at the limit set by -n.
        self._last_failure = ""
        self._cut_answers = 0
        # Time spent waiting for reads, or None if unknown, for example on a Ray cluster.
        self._waited_s: float | None = None

    def start(self, file: "RecordFile", left: int, show) -> None:
        """Start counting once the model is loaded. `left` is the number of unanswered rows. For `show`, see `terminal.progress`."""
        self._file, self._before, self._show = file, self._total - left, show
        self._started_at = self._reported_at = time.monotonic()
        self._show_rows()

    def encoding(self, what: str, done: int, total: int) -> None:
        """Show the encoding progress of the current row's inputs."""
        self._show_rows(f"{what} {done:,}/{total:,}")

    def _show_rows(self, detail: str = "") -> None:
        failed = f"{self.failed:,} failed" if self.failed else ""
        said = "; ".join(filter(None, [failed, detail]))
        self._show("row", self._before + self._file.written, self._total, said)

    def wait(self, seconds: float) -> None:
        """Add to the total time the model has spent waiting for video reads."""
        self._waited_s = (self._waited_s or 0.0) + seconds

    def add(self, record: Report) -> None:
        """Count a record written to the output file, and report its failure, if any."""
        self._cut_answers += record.finish_reason == "length"
        for name, video in warned(record):
            if name in ("answer_cut", "thoughts_cut"):
                continue  # truncated answers are counted rather than reported for each video
            self._warnings.setdefault(name, {}).setdefault(video.path, video)
        if record.error:
            self.failed += 1
            inputs = [facts.path for facts in record.inputs]
            message = record.error["message"]
            said = f"failed: {message}"
            if not any(path in message for path in inputs):
                said = f"failed: {listed(inputs)}: {message}"
            if not (self._reported_missing & set(inputs) and message.startswith("no such file")):
                if said != self._last_failure and not self.quiet:  # all rows of a video fail with the same message
                    tell(said)
                self._last_failure = said
        self._show_rows()
        if time.monotonic() - self._reported_at >= TELL_EVERY_S and not self.quiet and not sys.stderr.isatty():
            self._reported_at = time.monotonic()
            tell(self._line(self._before + self._file.written))

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, category, problem, trace) -> None:
        if isinstance(problem, BrokenPipeError | SystemExit):
            return
        if problem and not isinstance(problem, Exception):
            problem.reported = True
        if problem and not (self._file and self._file.written):
            if not isinstance(problem, Exception) and not self.quiet:
                tell("interrupted before any record was written; to continue, repeat the same command")
            return
        for name, videos in self._warnings.items():
            print_warning(name, next(iter(videos.values())), len(videos) - 1)
        if self.quiet:
            return
        new = self._file.written
        seconds = time.monotonic() - self._started_at
        done = self._before + new - self.failed
        said = f"{done:,} of {counted(self._total, 'row')} answered"
        if self._before:
            said += f", {self._before:,} of them earlier"
        said += self._failed()
        if new:
            said += f": {clock(seconds)}, {pace(new, seconds)}"
            if self._waited_s is not None:
                said += f"; waited {self._waited_s:,.1f} s for video reading"
        tell(said)
        if self._cut_answers:
            tell(f"{counted(self._cut_answers, 'answer')} may be incomplete: -n (max_new_tokens) allows no more tokens")
        if self._file.resumable and problem:
            tell("to continue, repeat the same command with --resume")
        elif self._file.regular and problem:
            tell("a table cannot be resumed, but records can: -o FILE.jsonl")
        elif self._file.resumable and self.failed:
            tell("to ask the failed rows again, fix the cause and repeat the same command with --resume")

    def _line(self, done: int) -> str:
        seconds = time.monotonic() - self._started_at
        new = self._file.written
        said = f"{done:,} of {counted(self._total, 'row')}{self._failed()}"
        if new:
            said += f", {pace(new, seconds)}, {roughly(seconds / new * (self._total - done))} left"
        return said

    def _failed(self) -> str:
        return f", {self.failed:,} failed" if self.failed else ""


def pace(count: int, seconds: float) -> str:
    """Format a processing rate in rows per second, minute, or hour, using the shortest unit with a rate of at least 1."""
    units = (("s", 1), ("min", 60), ("h", 3600))
    unit, length = next((unit for unit in units if count * unit[1] >= seconds), units[-1])
    return f"{count * length / max(seconds, 1e-3):,.3g} rows/{unit}"
