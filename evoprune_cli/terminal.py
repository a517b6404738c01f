"""What is printed: errors, warnings, notes and progress on stderr, answers and JSON on stdout. Colour only on a terminal."""

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
from evoprune.report import WARNINGS, WIDTH, Report, VideoFacts, warning_text, warning_title
from evoprune.util import clock, counted, harmless, one_line, roughly, size

LEAST_S = 1.0  # that a line of progress has counted before it says how much longer it takes
COLOURS = {"error:": "31;1", "hint:": "36", "warning:": "33;1", "note:": "2"}
# With the option each sets.
FROM_ENVIRONMENT = {"EVOPRUNE_MODEL": "-m", "EVOPRUNE_BUDGET": "-b", "EVOPRUNE_THREADS": "--threads"}
GLUE = "\0"  # for a space at which no line ends; it is in no printable text

_stdout: TextIO | None = None  # while `sys.stdout` is stderr


# Asks the process to end: SIGTERM, and where the terminal is closed SIGHUP.
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Terminated(BaseException):
    """Raise one of `ENDINGS` as an exception, so that finished results are printed and files closed."""


def stdout() -> TextIO:
    """Return stdout, also inside `only_answers_on_stdout`."""
    return _stdout or sys.stdout


@contextmanager
def only_answers_on_stdout() -> Iterator[None]:
    """Sends to stderr what others print meanwhile: plug-ins and libraries. Answers go to `stdout()`."""
    global _stdout
    _stdout = sys.stdout
    sys.stdout = sys.stderr
    try:
        yield
    finally:
        sys.stdout = _stdout
        _stdout = None


def columns() -> int:
    """Return the columns of stderr: as many as the terminal has, at most 80."""
    if not sys.stderr.isatty():
        return WIDTH
    return min(WIDTH, width_of(sys.stderr))


def page_width() -> int:
    """Return the columns for tables on stdout, at most 80."""
    return min(WIDTH, width_of(stdout()))


def width_of(terminal) -> int:
    """Return the columns of a stream that is a terminal, by COLUMNS or by the terminal itself; 80 where neither says."""
    stated = os.environ.get("COLUMNS", "")
    if stated.isdecimal():
        return int(stated) or WIDTH
    try:
        return os.get_terminal_size(terminal.fileno()).columns or WIDTH
    except OSError:
        return WIDTH


def paint(text: str, code: str) -> str:
    """Colour a text where stderr is a terminal that wants it (https://no-color.org)."""
    if not sys.stderr.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\x1b[{code}m{text}\x1b[0m"


class ClosedOutput(io.StringIO):
    """Stand in for a stdout that was closed when the program was started. Whatever is written there is an error."""

    def write(self, text: str) -> int:
        """Raises UsageError."""
        problem = UsageError(
            "there is nowhere to write to: stdout is closed", "redirect it, for example: > answers.txt"
        )
        problem.reported = True  # no record of it can be printed
        raise problem

    def fileno(self) -> int:
        """Raises UsageError."""
        return self.write("")


def check_output() -> None:
    """Raises UsageError, before anything is computed, if stdout is closed."""
    stdout().write("")


def encodable(text: str, stream=None) -> str:
    """Return the text as a stream (default: stderr) can print it: characters outside its encoding become escapes.

    On a terminal so do control characters: what a model says, and what a file is called, is not to be obeyed.
    """
    stream = stream or sys.stderr
    if stream.isatty():
        text = harmless(text)
    encoding = stream.encoding or "ascii"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str, stream=None) -> str:
    """Return a text as one line without control characters, within the stream's encoding."""
    return encodable(one_line(text), stream)


def note(text: str = "", end: str = "\n") -> None:
    """Prints a line to stderr. If that fails, for example because the reader is gone, all further lines are dropped."""
    try:
        print(text, end=end, file=sys.stderr, flush=True)
    except OSError:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (open to the end)


def print_json(report: Report) -> None:
    """Prints a report as one line on stdout, in plain ASCII where stdout or the text is not valid UTF-8."""
    text = report.to_json()
    stream = stdout()
    try:
        proper = (stream.encoding or "").lower().replace("-", "") == "utf8" and bool(text.encode("utf-8"))
    except UnicodeEncodeError:  # a path with bytes that are not UTF-8
        proper = False
    if not proper:
        text = report.to_json(ascii_only=True)
    write_whole(f"{text}\n")


def print_document(document: dict[str, Any]) -> None:
    """Prints results as one line on stdout, in plain ASCII."""
    write_whole(f"{json_line(document)}\n")


def write_whole(text: str) -> None:
    """Writes text to stdout, of which a file has all or nothing if the disk is full.

    In one write, so that lines of processes that share a file stay whole; and past the buffer of the stream, which would keep
    what the disk has no room for, and write it later. Raises OSError: it cannot be written.
    """
    stream = stdout()
    stream.flush()
    try:
        number = stream.fileno()
    except io.UnsupportedOperation:  # no file of the system, as in a host program
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
    """Cuts an open file down to its earlier size, unless another process has put a whole line behind that."""
    with suppress(OSError), open(f"/dev/fd/{number}", "rb") as file:
        file.seek(size)
        if b"\n" not in file.read():
            os.ftruncate(number, size)
            os.lseek(number, size, os.SEEK_SET)


def json_line(document: dict[str, Any]) -> str:
    return json.dumps(document, separators=(",", ":"), allow_nan=False)


def failure(problem: BaseException) -> dict:
    """Make an `errors.error_record` of whatever can end a command: also signals, and values from the environment."""
    for ending, code, name in ((KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")):
        if isinstance(problem, ending):
            return {"code": code, "type": name, "stage": None, "message": name, "hint": None}
    record = error_record(problem)
    for name, option in FROM_ENVIRONMENT.items():
        value = os.environ.get(name)
        typed = any(word in (value, f"{option}{value}") or word.endswith(f"={value}") for word in sys.argv)
        if value and not typed and repr(value) in record["message"]:
            record["hint"] = f"{record['hint'] or ''}; the value comes from {name}".lstrip("; ")
    return record


def print_traceback(problem: BaseException) -> None:
    """Print the traceback, where tracebacks are wanted."""
    if "--debug" in sys.argv[1:] or os.environ.get("EVOPRUNE_DEBUG", "") not in ("", "0"):
        traceback.print_exception(problem)


def print_error(message: str, hint: str | None) -> None:
    """Print the two lines of an error."""
    print_titled("error:", message)
    if hint:
        print_titled("hint:", hint)


def print_warning(name: str, video: VideoFacts, more: int | None = None) -> None:
    """Prints a warning about a video; in a batch with its path, and with how many `more` videos it applies to."""
    template = WARNINGS.get(name, name)
    if more is None:
        text = warning_text(name, video)
    elif more == 0:
        text = warning_text(name, video, video.path)
        if text == template:  # a warning that names no video
            text += f" ({video.path})"
    else:
        text = warning_text(name, video, video.path, f"its answers about {more + 1:,} videos mean")
        if text == template:
            text += f" ({video.path} and {more:,} more)"
        elif "{video}" in template:
            text += f" (and {counted(more, 'more video')})"
    print_titled(f"{warning_title(name)}:", text)


def tell(text: str) -> None:
    """Prints a sentence on stderr, folded to the terminal's width."""
    for line in _folded(printable(text), 2):
        note(paint(line, "2"))


def print_titled(title: str, text: str) -> None:
    """Words of the command line are not broken, also those with spaces: most are paths. `title`: one of `COLOURS`."""
    text = printable(text)
    for word in sys.argv[1:]:
        if " " in word.strip():
            text = text.replace(word, word.replace(" ", GLUE))
    first, *rest = (line.replace(GLUE, " ") for line in _folded(f"{title} {text}", len(title) + 1))
    for line in (paint(title, COLOURS[title]) + first.removeprefix(title), *rest):
        note(line)


def _folded(text: str, indent: int) -> list[str]:
    """Fold a text for a stderr that is a terminal, at spaces, and indent later lines; elsewhere leave one line, for programs."""
    if not sys.stderr.isatty():
        return [text]
    settings = {"subsequent_indent": " " * indent, "break_on_hyphens": False, "break_long_words": False}
    return textwrap.wrap(text, max(columns(), 30), **settings)


def print_stream(pieces: Iterable[str]) -> None:
    """Print an answer as it is generated, and a newline even when it is interrupted."""
    stream = stdout()
    try:
        for piece in pieces:
            print(encodable(piece, stream), end="", file=stream, flush=True)
    finally:
        print(file=stream, flush=True)


def encoding(show: Callable[[str, int, int], None]) -> Callable[[str, int, int], None]:
    """Return a callback for `VideoQA.encode` that shows its progress: frames as they are read; those encoded, once all are read."""
    named = {"read": "reading, frame", "encode": "encoding, frame", "layers": "encoding, layer"}
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
    """A line of progress: what is being done, how much of it is done, the elapsed time and an estimate of the time left."""

    def __init__(self, what: str, now: Callable[[], float] = time.monotonic):
        self._now = now
        self._begun = now()
        self._what = what
        self._total = 0
        self.show(what)

    def show(self, what: str, done: int = 0, total: int = 0, detail: str = "") -> None:
        """Say `what` from now on, with `done` of `total` if there is something to count, and a detail that changes often."""
        self._at = self._now()
        if (what, total) != (self._what, self._total) or not total:
            self._first, self._first_at = done, self._at
        self._what, self._done, self._total, self._detail = what, done, total, detail

    def text(self, width: int) -> str:
        """Return as much of the line as fits into so many columns."""
        from rich.cells import cell_len, set_cell_size

        now = self._now()
        what = self._what
        if self._total:
            what += f" {self._done:,}/{self._total:,}"
        detail = f"{what}: {self._detail}" if self._detail else what
        elapsed = clock(now - self._begun).partition(".")[0]
        rest = []
        spent = self._at - self._first_at
        steps = self._done - self._first
        if steps > 0 and spent >= LEAST_S:
            left = spent / steps * (self._total - self._done) - (now - self._at)
            rest = [f"{roughly(max(0.0, left))} left"]
        texts = [", ".join(parts) for parts in ([detail, elapsed, *rest], [what, elapsed, *rest], [what, *rest])]
        return next((text for text in texts if cell_len(text) <= width), set_cell_size(what, width).rstrip())


def downloading(show: Callable[..., None]) -> Callable[[int, int], None]:
    """Return a callback for `frames.local_file` that shows how much was downloaded."""

    def step(done: int, total: int) -> None:
        text = f"downloading, {size(done)}"
        if total:
            text += f" of {size(total)}"
        show(text)

    return step


@contextmanager
def progress(active: bool, timing: bool = False) -> Iterator:
    """Shows a line of progress on stderr while a block runs, on a terminal only. Yields `Line.show`.

    `timing`: the line does not move, since the thread of a spinner would disturb what is measured, and it gets `what` alone.
    """
    if not active or not sys.stderr.isatty():
        yield lambda what, done=0, total=0, detail="": None
        return
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    if timing:
        still = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
        with Live(console=console, transient=True, **still) as live:
            yield lambda what: live.update(Text(what, style="dim", no_wrap=True, overflow="ellipsis"), refresh=True)
        return
    line = Line("loading")
    turns = cycle("-\\|/")

    def drawn() -> Text:
        return Text(f"{next(turns)} {line.text(min(WIDTH, console.width) - 3)}", no_wrap=True, overflow="crop")

    with Live(get_renderable=drawn, console=console, transient=True, refresh_per_second=8):
        yield line.show
