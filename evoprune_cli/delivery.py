"""Check the paths of output files before a run, and deliver the results to stdout and files.

Results are delivered at the end of a run, even if the run is interrupted and the results are incomplete.
"""

import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evoprune.errors import UsageError
from evoprune.files import OPEN_FILES, write_file
from evoprune.util import WIDTH, install_hint, unwritable_hint
from evoprune_cli.terminal import encodable, failure, page_width, stdout, write_whole

if TYPE_CHECKING:
    from evoprune.bench import Results

# Matches the start of files written by evoprune. Only the start identifies a file because the same words may also appear elsewhere
# in files not written by evoprune.
HEADS = re.compile(
    b"|".join(
        [
            rb'\{"schema":"evoprune/(profile|tune|tune-operations|verify)@\d+",',
            rb"evoprune profile \d\S*, torch \d\S*, transformers \d[^\s;]*[\n;]",  # a table or Markdown
            rb"row,name,method,budget,quantize,frames,height,width,units,encoder_rows,live_share,tokens,prompt,",
            rb"<svg [^>]*>\n<!-- evoprune -->\n ?<title>",
            rb"\x89PNG\r\n\x1a\n\0\0\0\rIHDR.{17}\0\0\0.tEXtSoftware\0evoprune (overlay|contact sheet)",
            rb"GIF8.{9,800}!\xfe\x10evoprune overlay\0",
            rb"<!doctype html>\n<!-- evoprune ask -->\n",
        ]
    ),
    re.DOTALL,
)
MP4_END = b"\0\0\0(\xa9cmt\0\0\0 data\0\0\0\1\0\0\0\0evoprune overlay"  # comment at the end of an MP4 file


def check_chart(path: str | None, beside: str | None = None, inputs: Iterable[str] = ()) -> None:
    """Check the path of an SVG chart before any measurements. For the arguments, see `check_writable`.

    Raises:
        UsageError: If the file can't be written, its name doesn't end in .svg, or matplotlib isn't installed.
    """
    if path is not None and not path.startswith(OPEN_FILES) and not path.lower().endswith(".svg"):
        raise UsageError(f"--chart {path}: charts are SVG files", "use a name that ends in .svg")
    if path is not None and find_spec("matplotlib") is None:
        raise UsageError("charts need matplotlib, which is not installed", install_hint("plot"))
    check_writable(path, beside, inputs)


def check_writable(path: str | None, beside: str | None = None, inputs: Iterable[str] = ()) -> None:
    """Check that an output file can be written, before any measurements.

    Args:
        beside: A folder that will be created later, along with its parent folders. The output file may be in any of these folders.
        inputs: The command's input files and folders. Empty names are ignored.

    Raises:
        UsageError: If the file can't be written, exists but wasn't written by evoprune, or is an input or inside an input folder.
    """
    if path is None:
        return
    if not path:
        raise UsageError("the name of an output is empty", "name a file; is a shell variable unset?")
    real = os.path.realpath(path)
    folder = os.path.dirname(real)
    if beside is not None and not os.path.exists(folder) and Path(os.path.realpath(beside)).is_relative_to(folder):
        return
    changed = path if os.path.exists(path) else folder
    writable = os.access(changed, os.W_OK)
    if os.path.isdir(path) or path.endswith("/") or not os.path.isdir(folder) or not writable:
        raise UsageError(f"cannot write {path}", unwritable_hint(path))
    read = list(filter(None, inputs))
    if folder in map(os.path.realpath, read) or is_one_of(path, read):
        raise UsageError(f"writing {path} would change an input", "choose another place")
    if not _may_replace(path):
        raise UsageError(
            f"{path} already exists, and evoprune did not write it", "name another file, or remove this one"
        )


def check_new_folder(path: str) -> None:
    """Check that a folder can be created, before any measurements. If the folder exists, a number will be appended to its name.

    Raises:
        UsageError: If the folder can't be created.
    """
    if Path(path).name in ("", ".."):
        raise UsageError(f"-o {path!r} does not name a new folder", "name a folder to create, for example runs/a")
    above = next(folder for folder in Path(os.path.abspath(path)).parents if os.path.exists(folder))
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(f"cannot write {path}", "name a folder inside one that you can write to")


def is_one_of(path: str, files: Iterable[str]) -> bool:
    """Return True if a path refers to the same file as one of `files`, even through a link or under a different name."""
    real = os.path.realpath(path)
    there = os.path.exists(path)
    return any(
        os.path.realpath(file) == real or (there and os.path.exists(file) and os.path.samefile(path, file))
        for file in files
    )


def _may_replace(path: str) -> bool:
    """Return True if an output file may be overwritten.

    This is the case if the path is missing, an empty file, an open descriptor, a device, a pipe, or a file written by evoprune.
    """
    if path.startswith(OPEN_FILES):
        return True
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            return True
        with open(path, "rb") as file:
            head = file.read(1024)
            file.seek(max(0, status.st_size - len(MP4_END)))
            return bool(HEADS.match(head)) or (head[4:8] == b"ftyp" and file.read() == MP4_END)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def print_text(text: str) -> None:
    """Print text to stdout, escaping characters not supported by its encoding."""
    stream = stdout()
    try:
        text.encode(stream.encoding or "ascii")
    except UnicodeEncodeError:
        text = text.replace("±", "+-")
    write_whole(encodable(text, stream))


def write_bytes(path: str, content: bytes) -> None:
    """Write a file. If the new contents don't fit on the disk, the old contents are kept.

    Raises:
        UsageError: If the file can't be written.
    """
    try:
        folder = os.path.dirname(os.path.realpath(path))
        given = path.startswith(OPEN_FILES)
        if given or (os.path.exists(path) and not (os.path.isfile(path) and os.access(folder, os.W_OK))):
            mode = "ab" if given else "wb"
            with open(path, mode) as file:
                file.write(content)
            return
        write_file(path, content)
    except OSError as problem:
        raise UsageError(f"cannot write {path}: {problem.strerror}", "choose another place") from problem


@contextmanager
def rescuing(ready: Callable[[], bool], deliver: Callable[[dict[str, Any]], Any]) -> Iterator[None]:
    """Context manager that delivers the results so far if the block fails or is interrupted.

    If `ready` returns True, the error record is passed to `deliver`. The exception is then re-raised.
    """
    try:
        yield
    except BaseException as problem:
        if ready() and not isinstance(problem, BrokenPipeError | SystemExit):
            with suppress(UsageError, OSError):  # report only the original exception
                deliver(failure(problem))
            problem.reported = True
        raise


def deliver_results(results: "Results", form: str, output: str | None = None, chart: str | None = None) -> None:
    """Print results in the format `form`: "table", "json", or "csv". Even if this fails, write the JSON file and the chart."""
    try:
        print_text(results.text(form, page_width()))
    finally:
        if output:
            write_bytes(output, results.text("json", WIDTH).encode())
        if chart and (drawn := results.chart()):
            write_bytes(chart, drawn.encode())
