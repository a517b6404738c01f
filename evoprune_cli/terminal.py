"""Prints errors, warnings, notes, and progress to stderr, and answers and JSON to stdout. Colors are used only on terminals."""

import io
import json
import os
import signal
import stat
import sys
import textwrap
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import cycle
from typing import Any, TextIO

from evoprune.errors import UsageError, error_record
from evoprune.report import WARNINGS, Report, VideoFacts, warning_text, warning_title
from evoprune.util import WIDTH, clock, counted, harmless, one_line, roughly, size, switched_on
from evoprune_cli.typed import typed

# When this process started, on the clock of `time.perf_counter`. Until here, it has been busy starting Python and importing.
BEGAN_S = time.perf_counter() - time.process_time()
PLAIN_EVERY_S = 15.0  # if stderr is not a terminal, progress is printed as a line after this many seconds
LEAST_S = 1.0  # the progress line shows the estimated remaining time only after this many seconds
COLORS = {"error:": "31;1", "hint:": "36", "warning:": "33;1", "note:": "2"}
# Options that can be set using environment variables.
FROM_ENVIRONMENT = {"EVOPRUNE_MODEL": "model", "EVOPRUNE_BUDGET": "budget", "EVOPRUNE_THREADS": "threads"}
GLUE = "\0"  # replaces spaces where lines must not break; printable text doesn't contain this character

_stdout: TextIO | None = None  # the real stdout while `sys.stdout` is stderr


# Signals that request the process to terminate: SIGTERM, and SIGHUP when the terminal is closed.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """Raised when a signal in `ENDINGS` arrives, so files are closed and results so far are printed."""


def stdout() -> TextIO:
    """Return the real stdout, even inside an `only_answers_on_stdout` context."""
    return _stdout or sys.stdout


@contextmanager
def only_answers_on_stdout() -> Iterator[None]:
    """Redirect `sys.stdout` to stderr so that plugins and libraries can't print to stdout. Answers are written to `stdout()`."""
    global _stdout
    _stdout = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _stdout
        _stdout = None


def columns() -> int:
    """Return the width of stderr messages in columns (at most 80)."""
    return min(WIDTH, width_of(sys.stderr))


def page_width() -> int:
    """Return the width of stdout tables in columns (at most 80)."""
    return min(WIDTH, width_of(stdout()))


def width_of(terminal) -> int:
    """Return a terminal's width in columns, which can be overridden with COLUMNS. If the width is unknown, return 80."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal():
        return int(stated) or WIDTH
    try:
        return os.get_terminal_size(terminal.fileno()).columns or WIDTH
    except OSError:
        return WIDTH


def paint(text: str, code: str) -> str:
    """Color a string if stderr is a terminal with colors enabled (https://no-color.org). `code` is an ANSI color code."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


class ClosedOutput(io.StringIO):
    """A replacement for a stdout that was closed at process startup. Writing to it raises UsageError."""

    def write(self, text: str) -> int:
        """Raise UsageError because nothing can be written to a closed stdout."""
        problem = UsageError("cannot write the output: stdout is closed", "redirect it, for example: > answers.txt")
        problem.reported = True  # no error record can be printed
        raise problem

    def fileno(self) -> int:
        """Raise UsageError because a closed stdout has no file descriptor."""
        return self.write("")


def check_output() -> None:
    """Raise UsageError if stdout is closed. Commands call this before starting any long computation."""
    stdout().write("")


def encodable(text: str, stream=None) -> str:
    """Escape the characters in a string that a stream (default: stderr) can't encode.

    If the stream is a terminal, control characters are also escaped because answers and filenames are untrusted.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        text = harmless(text)
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str, stream=None) -> str:
    """Return text as a single line without control characters, escaping characters that the stream can't encode."""
    return encodable(one_line(text), stream)


def note(text: str = "", end: str = "\n") -> None:
    """Print a line to stderr. If writing fails, for example because the reader has exited, stop printing to stderr."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # open until exit  # noqa: SIM115


def print_json(report: Report) -> None:
    """Print a report to stdout as one line of JSON. If stdout isn't UTF-8 or the text isn't valid Unicode, print only ASCII."""
    text = report.to_json()
    stream = stdout()
    try:
        proper = (stream.encoding or "").lower().replace("-", "") == "utf8" and bool(text.encode("utf-8"))
    except UnicodeEncodeError:  # a path with non-UTF-8 bytes
        proper = False
    if not proper:
        text = report.to_json(ascii_only=True)
    write_whole(f"{text}\n")


def print_document(document: dict[str, Any]) -> None:
    """Print a JSON document to stdout as a single line of ASCII characters."""
    write_whole(f"{json_line(document)}\n")


def write_whole(text: str) -> None:
    """Write text to stdout. If stdout is a file and the disk is full, nothing is written.

    A single write is used if possible, so lines from different processes aren't interleaved in a shared file. The stream's buffer
    is bypassed because it would keep unwritten text and write it later.

    Raises:
        OSError: If the text can't be written.
    """
    stream = stdout()
    stream.flush()
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # stdout has no file descriptor, for example inside a host program
        stream.write(text)
        stream.flush()
        return
    status = os.fstat(number)
    rest = memoryview(text.encode(stream.encoding, stream.errors or "strict"))
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
    except OSError:
        if stat.S_ISREG(status.st_mode):
            _take_back(number, status.st_size)
        raise


def _take_back(number: int, size: int) -> None:
    """Truncate an open file to its previous size, unless another process has appended a complete line in the meantime."""
    with suppress(OSError), open(f"/dev/fd/{number}", "rb") as file:
        file.seek(size)
        if b"\n" not in file.read():
            os.ftruncate(number, size)
            os.lseek(number, size, os.SEEK_SET)


def json_line(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def failure(problem: BaseException) -> dict:
    """Return an error record for an exception that terminates a command, including Ctrl-C and signals. See `errors.error_record`.

    If the error message quotes the value of an environment variable, the hint mentions the variable.
    """
    for ending, code, name in ((KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")):
        if isinstance(problem, ending):
            return {"code": code, "type": name, "stage": None, "message": name, "hint": None}
    record = error_record(problem)
    for name, option in FROM_ENVIRONMENT.items():
        value = os.environ.get(name)
        if value and typed().source(option) == "ENVIRONMENT" and repr(value) in record["message"]:
            record["hint"] = f"{record['hint'] or ''}; the value comes from {name}".lstrip("; ")
    return record


def print_traceback(problem: BaseException) -> None:
    """Print the traceback of an exception if `--debug` or EVOPRUNE_DEBUG enables tracebacks."""
    try:
        wanted = typed().wants("debug") or switched_on("EVOPRUNE_DEBUG")
    except UsageError:  # `check_variables` has already raised it, and its traceback would be no help
        wanted = False
    if wanted:
        traceback.print_exception(problem)


def print_error(message: str, hint: str | None) -> None:
    """Print an error message and its hint, if any."""
    print_titled("error:", message)
    if hint:
        print_titled("hint:", hint)


def print_warning(name: str, video: VideoFacts, more: int | None = None) -> None:
    """Print a warning about a video.

    In a batch, the warning includes the video's path, and `more` is the number of other videos with the same warning.
    """
    template = WARNINGS.get(name, name)
    names_video = "{video}" in template or "{answers}" in template
    if more is None:
        text = warning_text(name, video)
    elif more == 0:
        text = warning_text(name, video, video.path)
        if not names_video:
            text += f" ({video.path})"
    else:
        text = warning_text(name, video, video.path, f"its answers about {more + 1:,} videos are")
        if not names_video:
            text += f" ({video.path} and {more:,} more)"
        elif "{video}" in template:
            text += f" (and {counted(more, 'more video')})"
    print_titled(f"{warning_title(name)}:", text)


def tell(text: str) -> None:
    """Print a message to stderr, wrapped to the terminal width if stderr is a terminal."""
    for line in _folded(printable(text), 2):
        note(paint(line, "2"))


def tell_stopped(problem: BaseException) -> None:
    """Print that Ctrl-C stopped the command, unless the command has reported it, or `--quiet` is set."""
    if typed().wants("quiet") or getattr(problem, "reported", False):
        return
    if sys.stderr.isatty():
        note("\r", end="")  # overwrites the ^C printed by the terminal
    tell("Stopped.")


def print_titled(title: str, text: str) -> None:
    """Print a message with a colored title to stderr. `title` is a key of `COLORS`.

    Lines aren't broken inside command-line arguments, even at spaces, because most arguments with spaces are paths.
    """
    text = printable(text)
    for word in typed().words:
        if " " in word.strip():
            text = text.replace(word, word.replace(" ", GLUE))
    first, *rest = (line.replace(GLUE, " ") for line in _folded(f"{title} {text}", len(title) + 1))
    for line in (paint(title, COLORS[title]) + first.removeprefix(title), *rest):
        note(line)


def _folded(text: str, indent: int) -> list[str]:
    """If stderr is a terminal, wrap text at spaces and indent all lines except the first. Otherwise, return a single line."""
    if not sys.stderr.isatty():
        return [text]
    return textwrap.wrap(
        text,
        max(columns(), 30),
        subsequent_indent=" " * indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def print_stream(pieces: Iterable[str]) -> None:
    """Print an answer to stdout as it is generated. A newline is printed at the end, even if the answer is interrupted."""
    stream = stdout()
    try:
        for piece in pieces:
            print(encodable(piece, stream), end="", file=stream, flush=True)
    finally:
        print(file=stream, flush=True)


def encoding(show: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """Return a progress callback for `VideoQA.encode` that shows read progress first, followed by encoding progress."""
    named = {
        "read": "reading, frame",
        "encode": "encoding, frame",
        "layers": "encoding, layer",
        "speech": "transcribing, second",
    }
    which = ""
    reads = True

    def step(stage: str, done: int, total: int) -> None:
        nonlocal which, reads
        if stage == "input":
            which = f"input {done}/{total}: "
        elif stage == "read":
            reads = done < total
        if stage != "input" and not (reads and stage == "encode"):
            show(f"{which}{named[stage]}", done, total)

    return step


class Line:
    """A progress line that shows the current step with its count, the elapsed time, and the estimated remaining time."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic, started_at: float | None = None):
        self._now = now
        self._started_at = now() if started_at is None else started_at
        self._what = what
        self._total = 0
        self.show(what)

    def show(self, what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Set the current step. `total` is the number of items, or 0 if unknown. `detail` is extra text that changes often."""
        self._at = self._now()
        if (what, total) != (self._what, self._total) or not total:
            self._first, self._first_at = done, self._at
        self._what, self._done, self._total, self._detail = what, done, total, detail

    def text(self, width: int) -> str:
        """Return the progress line, omitting parts that don't fit in `width` columns."""
        from rich.cells import cell_len, set_cell_size

        what, detail, elapsed, rest = self._parts()
        texts = [", ".join(parts) for parts in ([detail, elapsed, *rest], [what, elapsed, *rest], [what, *rest])]
        return next((text for text in texts if cell_len(text) <= width), set_cell_size(what, width).rstrip())

    def plain(self) -> str:
        """Return the line for a log, which begins with the elapsed time."""
        _, detail, elapsed, rest = self._parts()
        return f"[{elapsed}] {', '.join([detail, *rest])}"

    def _parts(self) -> tuple[str, str, str, list[str]]:
        """Return the step, the step with its detail, the elapsed time, and the remaining time (an empty list if unknown)."""
        now = self._now()
        what = self._what
        if self._total:
            what += f" {self._done:,}/{self._total:,}"
        detail = f"{what}: {self._detail}" if self._detail else what
        elapsed = clock(now - self._started_at).partition(".")[0]
        spent = self._at - self._first_at
        steps = self._done - self._first
        if steps <= 0 or spent < LEAST_S:
            return what, detail, elapsed, []
        left = spent / steps * (self._total - self._done) - (now - self._at)
        return what, detail, elapsed, [f"{roughly(max(0.0, left))} left"]


def downloading(show: Callable[..., None]) -> Callable[[int, int], None]:
    """Return a progress callback for `frames.local_file` that shows the download progress of a file."""

    def step(done: int, total: int) -> None:
        text = f"downloading, {size(done)}"
        if total:
            text += f" of {size(total)}"
        show(text)

    return step


class PlainLines:
    """Prints the current step every `PLAIN_EVERY_S` seconds, for a stderr that is not a terminal."""

    def __init__(self):
        self._started_at = self._printed_at = time.monotonic()
        self._line: Line | None = None

    def show(self, *step: Any) -> None:
        """Set the current step; see `Line.show`. Steps between two printed lines are dropped."""
        now = time.monotonic()
        if now - self._printed_at < PLAIN_EVERY_S:
            return
        if self._line is None:
            self._line = Line(step[0], started_at=self._started_at)
        self._line.show(*step)
        self._printed_at = now
        tell(self._line.plain())


@contextmanager
def progress(active: bool, timing: bool = False) -> Iterator:
    """Show a progress line while the block runs. Yields `Line.show`. If stderr isn't a terminal, print a line now and then instead.

    With `timing`, the line isn't animated because a spinner thread would affect measurements. The yielded function then accepts
    only `what`.
    """
    if not active:
        yield lambda what, done=0, total=0, detail="": None
        return
    if not sys.stderr.isatty():
        yield PlainLines().show
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    if timing:
        with Live(
            console=console, transient=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        ) as live:
            yield lambda what: live.update(Text(what, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)
        return
    line = Line("loading")
    turns = cycle("-\\|/")

    def drawn() -> Text:
        return Text(f"{next(turns)} {line.text(min(WIDTH, console.width) - 3)}", no_wrap=True, overflow="crop")

    with Live(get_renderable=drawn, console=console, transient=True, refresh_per_second=8):
        yield line.show
