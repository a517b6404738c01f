"""`evoprune find`: finds the moments in videos that match a query."""

import os
from collections.abc import Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from itertools import zip_longest
from textwrap import wrap
from typing import TYPE_CHECKING, Any

from evoprune.errors import OutOfMemory, UsageError, VideoError
from evoprune.session import FindOptions, ModelOptions, PipelineOptions, PruneOptions
from evoprune.util import check_text, clock, counted, is_url, missing_hint, shown, some, without_password
from evoprune.video import SamplingOptions, choose_decoder, probe, warm_up
from evoprune_cli import options as opt
from evoprune_cli.delivery import is_one_of, print_text
from evoprune_cli.moment_files import MomentFiles
from evoprune_cli.running import SOME_FAILED, load
from evoprune_cli.terminal import (
    check_output,
    failure,
    page_width,
    print_document,
    print_error,
    print_traceback,
    print_warning,
    printable,
    progress,
    stdout,
    tell,
)
from evoprune_cli.words import check_no_questions, check_not_swapped, split_words

if TYPE_CHECKING:
    from evoprune.batch import Row
    from evoprune.moments import Moment, Search
    from evoprune.session import Session

SCHEMA = "evoprune/find@1"
USAGE = 'evoprune find video.mp4 "a red circle"'
FILES = "Files"  # panel title in the full help
BAR = 20  # maximum length of a bar, in characters


@dataclass(frozen=True, kw_only=True)
class FindArguments:
    """The arguments of `evoprune find`."""

    words: opt.argument(
        list[str], "VIDEO", "Videos (files, folders of videos or of frames, URLs), then what to find, in quotes."
    )
    more: opt.option(
        list[str] | None, "-Q --query TEXT", "What to find; repeatable. Each segment is encoded once for all queries."
    ) = None
    options: opt.PipelineArguments
    srt: opt.option(str | None, "--srt FILE", "Write the moments as subtitles, with query and score.", FILES) = None
    chapters: opt.option(
        str | None, "--chapters FILE", "Write the moments as chapters, in FFmpeg's metadata format.", FILES
    ) = None
    contact_sheet: opt.option(
        str | None, "--contact-sheet FILE.png", "Draw the best frame of each moment, with its time.", FILES
    ) = None
    clips: opt.option(
        str | None,
        "--clips DIR",
        "Cut each moment into its own file, copying packets from the keyframe before it. If a file name is taken, a number is "
        "added.",
        FILES,
    ) = None
    exact: opt.option(
        bool,
        "--exact",
        "Make clips start and end exactly with their moments, by re-encoding their frames in SDR.",
        FILES,
    ) = False
    json: opt.option(bool, "--json", "Print a JSON line per moment, instead of text.", opt.OUTPUT) = False
    output: opt.option(
        str | None,
        "-o --output FILE",
        "Also write the results to FILE, one JSON line per video, as soon as its search is complete.",
        opt.OUTPUT,
    ) = None
    resume: opt.option(
        bool,
        "--resume",
        "Continue FILE if it exists: videos in it are skipped, and failed videos are searched again.",
        opt.OUTPUT,
    ) = False
    overwrite: opt.Overwrite = False
    cache: opt.option(
        bool,
        "--cache/--no-cache",
        "Keep encoded segments on disk (at most 4 GiB, in the folder EVOPRUNE_CACHE_DIR), so that other queries need not read or "
        "encode them again.",
        opt.OUTPUT,
    ) = False
    quiet: opt.Quiet = False


@opt.command(
    *FindOptions.FINDING,
    *ModelOptions.LOADING,
    *PruneOptions.PRUNING,
    "fps",
    *SamplingOptions.SPAN,
    "max_visual_tokens",
    "frame_rate",
    "decoder",
    "seek",
    "max_subtitle_tokens",
    "speech",
    short="more top min_score srt clips model budget fps start_s end_s json quiet",
    fps={
        "help": "Frames per second to sample in all segments; default: the model's rate, lower for long videos (--total-tokens)."
    },
    seek={
        "help": "Which frame to use for each equal part of a segment: exact, the frame in its middle; keyframes, the keyframe "
        "nearest to the middle, if the part has one. auto: keyframes, but exact at the start and end of a moment."
    },
)
def find(given: FindArguments) -> int:
    """Find the moments of videos that show something, best first.

    Each video is cut into segments, and the model is asked whether each segment shows the query. Where the answer yes is much more
    probable than in most segments, more frames are read to find out when the moment starts and ends. Finding nothing is not an
    error. Ctrl-C prints the moments found so far. If a video fails, the failure is reported, the other videos continue, and the
    exit code is 6. Files are written once a video has been searched completely.

    \b
    evoprune find clip.mp4 "a red circle"
    evoprune find videos/ -Q "a dog" -Q "a person opens a door" -m Qwen/Qwen2.5-VL-3B-Instruct
    evoprune find videos/ "a dog" -m Qwen/Qwen2.5-VL-3B-Instruct -o dogs.jsonl --resume
    evoprune find clip.mp4 "Does the car stop?" --top 3 --json
    evoprune find film.mp4 "a dog" --clips dogs/ --srt film.srt
    """
    check_output()
    videos, queries = _words(given.words, list(given.more or []))
    pipeline = given.options.parse()
    rows = _check(given, videos, queries, pipeline)
    return _run(given, rows, queries, pipeline)


def _check(given: FindArguments, videos: list[str], queries: list[str], pipeline: PipelineOptions) -> list["Row"]:
    """Check everything that can be checked before loading the model, and return a row for each video."""
    check_text(*queries, pipeline.find.prompt)
    pipeline.find.check_queries(queries)
    choose_decoder(pipeline.sampling.decoder)
    rows = _rows(videos, queries, pipeline.sampling, given.quiet)
    _files(given).check([row.paths[0] for row in rows], given.output)
    if (given.resume or given.overwrite) and given.output is None:
        raise UsageError("--resume and --overwrite apply to an output file", "name it with -o")
    return rows


def _files(given: FindArguments) -> MomentFiles:
    return MomentFiles(given.srt, given.chapters, given.contact_sheet, given.clips, given.exact)


def _run(given: FindArguments, rows: list["Row"], queries: list[str], pipeline: PipelineOptions) -> int:
    """Search the videos that have no record yet. Returns the exit code."""
    with ExitStack() as stack:
        output = None
        left = rows
        if given.output is not None:
            output = SearchOutput(rows, pipeline, given.output, given.resume, given.overwrite)
            stack.enter_context(closing(output))
            left = output.left
            if len(left) < len(rows) and not given.quiet:
                tell(f"{given.output} already has {len(rows) - len(left):,} of {counted(len(rows), 'video')}")
        if not left:
            return 0
        warm_up()  # warms up while this process imports its dependencies
        if len(rows) == 1:
            _check_video(rows[0], pipeline)
        with progress(not given.quiet) as show:
            session = load(pipeline, show, given.quiet, samples=False)
        finder = Finder(given, session, queries, pipeline, several=len(rows) > 1)
        codes = []
        for row in left:
            moments, error = finder.find(row)
            if output:
                output.add(row, moments, error, session.loaded.description.commit)
            codes += [error["code"]] if error else []
        if codes and len(rows) == 1:
            return codes[0]
        return SOME_FAILED if codes else 0


def _check_video(row: "Row", pipeline: PipelineOptions) -> None:
    """Check the only video before loading the model. A video that can't be read gets an error record later."""
    if is_url(row.video):
        return
    info = None
    with suppress(VideoError):
        info = probe(row.paths[0], folder_fps=pipeline.sampling.frame_rate)
    if info:
        pipeline.find.check_video(info, row.video)


class Finder:
    """Searches videos one after another with the same queries and options, and prints and writes what it finds."""

    def __init__(
        self, given: FindArguments, session: "Session", queries: list[str], pipeline: PipelineOptions, several: bool
    ):
        from evoprune.session import Cache

        self._given = given
        self._session = session
        self._queries = queries
        self._pipeline = pipeline
        self._several = several
        self._files = _files(given)
        self._cache = Cache().of_segments if given.cache else None

    def find(self, row: "Row") -> tuple[list[dict[str, Any]] | None, dict[str, Any] | None]:
        """Search a video. Returns its moments as records, or None and the error record if the search failed."""
        from evoprune.moments import Search

        name = without_password(row.video)
        pipeline = self._pipeline
        try:
            with Search(
                self._session, row.paths[0], self._queries, pipeline.find, pipeline.sampling, self._cache
            ) as search:
                return self._search(search, name), None
        except (VideoError, OutOfMemory) as problem:
            return None, _report_failure(problem, name, self._given.json)

    def _search(self, search: "Search", name: str) -> list[dict[str, Any]]:
        """Run a search, write its files, and print the moments found so far even if it is interrupted."""
        quiet = self._given.quiet
        clips: list[str] = []
        if not quiet:
            _announce(search, name)
        try:
            with progress(not quiet) as show:
                search.run(show)
            clips = self._files.write(search, name, quiet)
        finally:
            found = records(search, name, clips)
            _deliver(search, name, self._several, found if self._given.json else None, quiet)
        return found


class SearchOutput:
    """The output file of a search, which the caller must close. `left` contains the rows still to be searched."""

    def __init__(self, rows: Sequence["Row"], options: PipelineOptions, path: str, resume: bool, overwrite: bool):
        from evoprune.batch import Sources
        from evoprune_cli.found import MomentsFile, SearchSettings

        if path == "-":
            raise UsageError("-o needs a file", "use --json to print to stdout")
        if is_one_of(path, [row.paths[0] for row in rows]):
            raise UsageError(f"{path} is one of the inputs", "choose another -o")
        settings = SearchSettings(
            options.model, options.pruning, options.sampling, options.generation, options.stream, options.find
        )
        self._settings = settings.record()
        self._file = MomentsFile(path, resume=resume, overwrite=overwrite)
        try:
            self._sources = Sources(settings)
            self.left = self._sources.remaining(rows, self._file.earlier_records)
        except BaseException:
            self.close()
            raise
        self._files = {row.id: self._sources.of(row) for row in self.left}

    def add(
        self, row: "Row", moments: list[dict[str, Any]] | None, error: dict[str, Any] | None, commit: str | None
    ) -> None:
        """Append the search results for a video to the output file and sync the file to disk."""
        from evoprune_cli.found import FoundVideo

        self._sources.check_revision(commit)
        if not self._file.written:  # keep the earlier records until there is a new record to write
            self._file.begin(again={row.id for row in self.left})
        about = {"row": row.asked | {"answer": None}, "settings": self._settings, "files": self._files[row.id]}
        self._file.add(FoundVideo(row.id, moments, error, {"revision": commit}, about))

    def close(self) -> None:
        self._file.close()


def _report_failure(problem: VideoError | OutOfMemory, name: str, json: bool) -> dict[str, Any]:
    """Report a failed video search on stderr and, with `json`, also on stdout. Returns the error record."""
    print_traceback(problem)
    error = failure(problem)
    if json:
        print_document({"schema": SCHEMA, "video": name, "error": error})
    message = error["message"]
    if name not in message:
        message = f"{name}: {message}"
    print_error(message, error["hint"])
    return error


def _words(words: Sequence[str], more: list[str]) -> tuple[list[str], list[str]]:
    """Split the positional arguments into videos and queries. `more` contains the queries from -Q."""
    videos, query = split_words(words)
    check_not_swapped("find", videos, query or next(iter(more), None))
    queries = more
    if query is not None:
        queries = [query, *more]
    if not queries:
        _check_exist(videos)
        raise UsageError("nothing to find", f"say what to find, in quotes, after the videos: {USAGE}")
    if not all(query.strip() for query in queries):
        raise UsageError("the query is empty", USAGE)
    return list(videos), queries


def _check_exist(videos: Sequence[str]) -> None:
    """Raise VideoError if a video doesn't exist."""
    missing = [word for word in videos if not is_url(word) and not os.path.exists(word)]
    if missing:
        raise VideoError(
            f"no such file: {some(list(map(shown, missing)))}",
            missing_hint(missing[0], f"check the path; videos come first: {USAGE}"),
        )


def _rows(words: Sequence[str], queries: Sequence[str], sampling: SamplingOptions, quiet: bool) -> list["Row"]:
    """Return a row for each video, expanding video folders, and report skipped files on stderr.

    Each row's question contains all queries, one per line.

    Raises:
        VideoError: If a video doesn't exist.
    """
    from evoprune.batch import RowReader, left_out

    check_no_questions(words, 'evoprune find video.mp4 -Q "a red circle" -Q "a dog"')
    _check_exist(words)
    reader = RowReader(sampling=sampling)
    rows = reader.pairs(words, ["\n".join(queries)])
    if not quiet:
        for line in filter(None, (left_out(word, hint="") for word in words)):
            tell(line)
    return rows


def _announce(search: "Search", name: str) -> None:
    first = search.segments[0]
    length_s = first.end_s - first.start_s
    tell(
        f"{name}: {clock(search.duration_s)}, {counted(len(search.segments), 'segment')} of {length_s:.3g} s, "
        f"{first.frames} frames each, {search.tokens:,} visual tokens in total"
    )


def _deliver(search: "Search", name: str, several: bool, found: list[dict[str, Any]] | None, quiet: bool) -> None:
    """Print the moments found in a video, and report warnings and queries without matches on stderr.

    Args:
        several: Whether the search covers several videos.
        found: The moments to print as JSON, or None to print text.
    """
    moments = search.moments()
    others = 0 if several else None
    for warning, facts in search.warnings.items():
        print_warning(warning, facts, others)
    if search.asked < len(search.segments) and not quiet:
        tell(f"{name}: stopped after {search.asked:,} of {counted(len(search.segments), 'segment')}")
    if search.unread and not quiet:
        tell(f"{name}: {counted(search.unread, 'segment')} could not be read")
    for each in found or ():
        print_document(each)
    for query in search.queries:
        shown = [moment for moment in moments if moment.query == query]
        if shown and found is None:
            lines = [*header(name, query), *map(line, shown)]
            print_text("".join(printable(each, stdout()) + "\n" for each in lines))
        if shown and not quiet and (left_out := more(search, query)):
            tell(f"{name}: {left_out}")
        elif not shown and search.asked > search.unread and not quiet:
            score, best_s = search.best(query)
            tell(f"{name}: nothing shows {query!r}; the best score is {score:.2f} at {clock(best_s)} (--min-score)")


def header(name: str, query: str) -> list[str]:
    """Return the line above the moments of a query. On a terminal, it is folded to fit."""
    text = printable(f"{name}: {query}", stdout())
    if not stdout().isatty():
        return [text]
    return wrap(text, page_width(), subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def more(search: "Search", query: str) -> str:
    """Return a note with the number of moments omitted by `--top` for a query, or "" if all moments are included."""
    count = search.more(query)
    verb = "shows" if count == 1 else "show"
    return f"about {counted(count, 'more moment')} {verb} {query!r} (--top)" if count else ""


def records(search: "Search", name: str, clips: Sequence[str]) -> list[dict[str, Any]]:
    """Return the moments in `--json` format. `clips` contains a file for each moment, or is empty if no clips were cut."""
    moments = search.moments()
    more = {query: search.more(query) for query in search.queries}
    return [_record(moment, name, clip, more[moment.query]) for moment, clip in zip_longest(moments, clips)]


def _record(moment: "Moment", name: str, clip: str | None, more: int) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "video": name,
        "query": moment.query,
        "start_s": round(moment.start_s, 3),
        "end_s": round(moment.end_s, 3),
        "best_s": round(moment.best_s, 3),
        "score": round(moment.score, 6),
        "clip": clip,
        "more": more,
        "error": None,
    }


def line(moment: "Moment") -> str:
    """Format a moment as a line with its start, end, best timestamp, score, and a bar that visualizes the score.

    In a narrow terminal, the bar is shorter, and a line that would still be too long lacks the best timestamp.
    """
    span = f"{clock(moment.start_s):>9} - {clock(moment.end_s):<9}"
    best, score = f"  best {clock(moment.best_s):<9}", f"  {moment.score:.3f}  "
    width = page_width()
    text = span + (best if len(span + best + score) < width else "") + score
    return (text + "#" * round(min(BAR, max(0, width - len(text))) * moment.score)).rstrip()
