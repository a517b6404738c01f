"""The output file of a batch: it grows by whole lines, however the program ends, and one program writes it at a time.

No other file belongs to it: every record holds its row and its settings, and the lock is on the file itself. Below it: files that
are written completely or not at all, for every command's results. Imports no torch.
"""

import errno
import glob
import os
import secrets
import stat
import sys
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TextIO

from evoprune import methods
from evoprune.batch.rows import Row
from evoprune.errors import UsageError
from evoprune.model import loads
from evoprune.report import SCHEMA, rounded
from evoprune.session import PipelineOptions, record
from evoprune.util import shown
from evoprune.video import EXACT, input_state

if TYPE_CHECKING:
    from evoprune.session import ModelDescription
    from evoprune.video_qa import VideoQA

STDOUT = "-"
OTHER_HINT = "name another file with -o, or remove this one"
SIZE_HINT = "give the same --device, or a new -o; inner=always prunes alike on all devices"
OPEN_FILES = ("/dev/", "/proc/self/fd/")  # written to as they are given, such as the pipe of >(gzip > x)
UNFINISHED = (
    "{}.evoprune-{}.tmp"  # the name of a file while it is written: that which it gets, and eight hexadecimal digits
)
# Options that records hold also at their defaults; the others where they differ from these.
RECORDED = (
    "model", "revision", "dtype", "quantize", "load_format", "budget", "method", "seed", "fps", "frames",
    "max_frames", "max_visual_tokens", "decoder", "seek", "max_new_tokens", "temperature", "top_p", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(PipelineOptions):
    """Hold the options of a batch. Each row has its own part of the video instead of `start_s` and `end_s`."""

    ALWAYS: ClassVar[tuple[str, ...]] = RECORDED  # options that records hold also at their defaults

    def load(
        self, progress: Callable[[int, int], None] | None = None, model: "ModelDescription | None" = None
    ) -> "VideoQA":
        """Loads the model; `model`: what is known of it, if that was asked. Raises what `VideoQA.load` raises."""
        from evoprune.video_qa import load_qa

        return load_qa(model or self.model, self.pruning, progress=progress)

    @property
    def groups(self) -> tuple[Any, ...]:
        """Return the options that answers depend on."""
        return self.model, self.pruning, self.sampling, self.generation

    def record(self) -> dict[str, Any]:
        """Return all of it as flat data for JSON, as records hold it."""
        code = methods.plugin_code(self.pruning.method)
        facts = record(self.groups, self.ALWAYS) | {"method_args": {}}  # settings are part of `method`
        if code:
            facts["plugins"] = code
        return facts


class Line(Protocol):
    """A record that can be written."""

    def to_json(self, ascii_only: bool = False) -> str: ...


@dataclass(frozen=True)
class Found:
    """Describe a record of an earlier run: its row and settings, whether the row failed, and its bytes [start, end) of the file.

    `files`: what it was made of (`Sources`), and `revision`: the commit of a hub model. Empty, and None, where that is unknown.
    `after_tower_below`: as in the record's pruning; 0 where no size changes what is pruned, None where the row failed.
    """

    id: str
    row: dict[str, Any]
    settings: dict[str, Any]
    failed: bool
    start: int
    end: int
    files: dict[str, Any] = field(default_factory=dict)
    revision: str | None = None
    after_tower_below: int | None = None


class Sources:
    """Hold the states (`file_state`) of the files of a batch, model and inputs, when it begins.

    None is unknown, such as the files of a hub model, whose commit each record has.
    """

    def __init__(self, settings: Settings):
        self._name = settings.model.model
        self._subtitles = settings.sampling.subtitles
        self._model = settings.model.state()
        self._input = cache(partial(input_state, listdir=cache(os.listdir)))
        self._revision: str | None = None
        self._after_tower_below: int | None = None

    def of(self, row: Row) -> dict[str, Any]:
        """Return the states for a record of a row, as plain data."""
        subtitles = row.subtitles_path or self._subtitles
        return {"model": self._model, "inputs": [self._input(path, subtitles) for path in row.paths]}

    def check(self, earlier: Found, row: Row | None) -> None:
        """Raise UsageError where the model is not what it was, or an input of a row that has an answer."""
        if change := file_changes(earlier.files.get("model"), self._model):
            self._refuse(change)
        self.check_revision(earlier.revision)
        self.check_sizes(earlier.after_tower_below)
        if row is None or earlier.failed:
            return
        for name, before, now in zip(
            row.inputs, earlier.files.get("inputs") or [], self.of(row)["inputs"], strict=False
        ):
            if change := file_changes(before, now):
                hint = "delete its line in the output, and it is asked anew; or choose another -o"
                raise UsageError(f"{shown(name)} is not what it was when row {row.id!r} was answered: {change}", hint)

    def check_revision(self, commit: str | None) -> None:
        """Raise UsageError where a record, earlier or new, has another commit of a hub model than the ones before."""
        if commit and self._revision and commit != self._revision:
            self._refuse(f"its commit was {self._revision}, is {commit}")
        self._revision = commit or self._revision

    def check_sizes(self, after_tower_below: int | None) -> None:
        """Raise UsageError where a device pruned inputs of other sizes after the tower alone than for the records before.

        `after_tower_below`: as in `Found`.
        """
        if change := size_rule_changes(self._after_tower_below, after_tower_below):
            raise UsageError(f"the output was begun on another device or version: {change}", SIZE_HINT)
        if after_tower_below is not None:
            self._after_tower_below = after_tower_below

    def _refuse(self, change: str) -> None:
        hint = "give the earlier one (--revision, where it is of the hub), or another -o"
        raise UsageError(f"the model {self._name} is not what it was when the output was begun: {change}", hint)


def remaining(
    rows: Sequence[Row], settings: Settings, found: Sequence[Found], sources: Sources | None = None
) -> list[Row]:
    """Return the rows that have no answer yet, or failed.

    Raises UsageError: a record has other settings, its row has changed, or the files that it was made of have.
    """
    sources = sources or Sources(settings)
    by_id = {row.id: row for row in rows}
    now = rounded(settings.record())
    asked = {row.id: rounded(row.asked) for row in rows}
    done = set()
    for earlier in found:
        if change := differences(earlier.settings, now):
            raise UsageError(f"the output was begun with other settings: {change}", "give the same ones, or another -o")
        before = earlier.row | {"answer": None}  # which the model's answer does not depend on
        if change := differences(before, asked.get(earlier.id, before) | {"answer": None}):
            hint = "give changed rows ids of their own, or choose another -o"
            raise UsageError(f"the row {earlier.id!r} is not what it was: {change}", hint)
        sources.check(earlier, by_id.get(earlier.id))
        if not earlier.failed:
            done.add(earlier.id)
    return [row for row in rows if row.id not in done]


def differences(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Return the entries in which two dicts differ, in words; empty where they are equal."""
    names = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    return "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in names)


def size_rule_changes(before: int | None, now: int | None) -> str:
    """Say in words how the number of units has changed below which inputs are pruned after the tower alone; empty where it has not.

    0 is a device on which no input is, None is unknown.
    """
    if before is None or now is None or before == now:
        return ""
    return f"the inputs pruned after the tower alone were {_inputs_below(before)}, are {_inputs_below(now)}"


def _inputs_below(units: int) -> str:
    if units == 0:
        return "none"
    return f"those of fewer than {units:,} visual tokens"


def file_changes(before: dict[str, Any] | None, now: dict[str, Any] | None) -> str:
    """Say in words how the state of files (`file_state`) has changed; empty where it has not, or one is unknown."""
    if not before or not now or before == now:
        return ""
    first, second = ({name: value for name, value in state.items() if name != "digest"} for state in (before, now))
    return differences(first, second) or "single files have other sizes or times"


class RecordFile:
    """Opened and locked by the constructor, changed from `begin` on. Stdout ("-"), a pipe or an open file is only written, and not
    `regular`. `stdout`: where "-" is, if not `sys.stdout`.

    An existing file's records are kept with `resume`, as `found`, dropped with `overwrite`; with neither, it must be empty. Raises
    UsageError: the file cannot be written, exists, holds anything but records, or another program is writing it.

    Subclasses have records of another `schema`, and call what makes them by another `noun`.
    """

    schema: ClassVar[str] = SCHEMA
    noun: ClassVar[str] = "batch"

    def __init__(self, path: str, *, stdout: TextIO | None = None, resume: bool = False, overwrite: bool = False):
        self.name = path
        self._stdout = stdout or sys.stdout
        self.found: list[Found] = []
        self.written = 0  # records, by this run
        self._made = self._begun = False
        given = path == STDOUT or path.startswith(OPEN_FILES)
        self.regular = not given and (os.path.isfile(path) or not os.path.exists(path))
        self.path = os.path.realpath(path) if self.regular else path
        if resume and overwrite:
            raise UsageError("--resume and --overwrite exclude each other", "give one of the two")
        if not self.regular and (resume or overwrite):
            raise UsageError(f"{path} is no file that could be resumed or overwritten", "name a file with -o")
        try:
            self._number = self._open()
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        try:
            if self.regular and os.fstat(self._number).st_size:
                if resume:
                    self.found = self._read()
                elif not self._is_own():
                    raise UsageError(f"{path} is there, and holds no records of a {self.noun}", OTHER_HINT)
                elif not overwrite:
                    hint = "--resume goes on with it, --overwrite replaces it; or name another file with -o"
                    raise UsageError(f"{path} is there already", hint)
        except BaseException:
            os.close(self._number)
            raise
        # Signals become exceptions in the main thread only, so what another thread writes is written completely.
        self._writer = ThreadPoolExecutor(1)

    @property
    def resumable(self) -> bool:
        """Return whether a later run can go on with the file."""
        return self.regular

    def _is_own(self) -> bool:
        """Return whether the file begins with a record, which may be torn."""
        head = self._head
        begun = os.pread(self._number, len(head), 0).rstrip(b"\0")
        return bool(begun) and head.startswith(begun)

    @property
    def _head(self) -> bytes:
        """Return how every record begins."""
        return f'{{"schema":"{self.schema}",'.encode()

    def begin(self, again: Container[str] = ()) -> None:
        """Cuts the file down to its whole records, without those whose ids are in `again`; without `resume`, to nothing."""
        self._begun = True
        if self.regular:
            self._writer.submit(self._keep, again).result()

    def _keep(self, again: Container[str]) -> None:
        kept = [record for record in self.found if record.id not in again]
        size = sum(record.end - record.start for record in kept)
        try:
            remove_unfinished(self.path)  # this program has the lock, so nobody is writing one
            if kept and kept[-1].end != size:  # some records before the last one go
                self._number = self._copied(kept)
            os.ftruncate(self._number, size)
            if kept and os.pread(self._number, 1, size - 1) != b"\n":
                os.write(self._number, b"\n")
        except OSError as problem:
            raise self._cannot_write(problem) from problem

    def add(self, record: Line) -> None:
        """Appends a record, which is on the disk when this returns. Neither a signal nor a full disk tears a line."""
        try:
            line = record.to_json().encode()
        except UnicodeEncodeError:  # a path that is not valid Unicode
            line = record.to_json(ascii_only=True).encode()
        self._writer.submit(self._write, line + b"\n").result()

    def close(self) -> None:
        """Waits for the line that is being written. Removes the file if this run created it and it is empty."""
        self._writer.shutdown()
        if self._made and not os.fstat(self._number).st_size:
            os.unlink(self.path)
        os.close(self._number)

    def _write(self, line: bytes) -> None:
        try:
            append(self._number, line, self.regular)
        except BrokenPipeError:
            raise
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        self.written += 1

    def _open(self) -> int:
        """Return a file descriptor; of a regular file one that holds its lock."""
        if self.name == STDOUT:
            self._stdout.flush()
            return os.dup(self._stdout.fileno())
        if not self.regular:
            return os.open(self.path, os.O_WRONLY | os.O_APPEND)
        flags = os.O_RDWR | os.O_APPEND
        while True:
            try:
                number = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                self._made = True
            except FileExistsError:
                number = os.open(self.path, flags)
                self._made = False
            try:
                self._lock(number)
                # The program that held the lock may have replaced or removed the file.
                if os.path.exists(self.path) and os.path.samestat(os.fstat(number), os.stat(self.path)):
                    return number
            except BaseException:
                os.close(number)
                raise
            os.close(number)

    def _lock(self, number: int) -> None:
        try:
            import fcntl
        except ImportError:  # not a Unix
            return
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            hint = "wait until it is done, or choose another -o"
            raise UsageError(f"another {self.noun} is writing {self.name}", hint) from problem
        except OSError as problem:
            if problem.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):  # a file system without locks
                raise

    def _read(self) -> list[Found]:
        """Return all whole records. A torn one may follow them; a file with anything else is refused."""
        records = []
        end = 0
        settings = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                try:
                    record = loads(line)
                    if record["schema"] != self.schema:
                        raise ValueError
                    about = record["batch"]
                    failed = record["error"] is not None
                    stated = {"seek": EXACT} | about["settings"]  # earlier versions knew no other
                    if stated != settings:  # usually one object serves all records
                        settings = stated
                    files = dict(about.get("files") or {})
                    commit = dict(record.get("model") or {}).get("revision")
                    place = end, end + len(line)
                    below = None
                    if not failed:
                        below = dict(record.get("pruning") or {}).get("after_tower_below") or 0
                    records.append(Found(record["id"], about["row"], settings, failed, *place, files, commit, below))
                except (ValueError, KeyError, TypeError) as problem:
                    if _is_torn(line, self._head, bool(records)):
                        break
                    hint = OTHER_HINT
                    if records:
                        hint = (
                            "if nobody needs that line, delete it, and the same command goes on; or choose another -o"
                        )
                    raise UsageError(f"{self.name}, line {number} is no record of a {self.noun}", hint) from problem
                end += len(line)
        return records

    def _copied(self, kept: list[Found]) -> int:
        """Replaces the file by one with these records, in one step; returns the new file's descriptor, locked."""
        number, place = create_unfinished(self.path)
        try:
            self._lock(number)
            os.fchmod(number, stat.S_IMODE(os.fstat(self._number).st_mode))
            with open(self.path, "rb") as old, open(number, "wb", closefd=False) as new:
                for record in kept:
                    old.seek(record.start)
                    new.write(old.read(record.end - record.start))
            os.fsync(number)
            os.replace(place, self.path)
        except OSError:
            os.close(number)
            os.unlink(place)
            raise
        os.close(self._number)
        return number

    def _cannot_write(self, problem: OSError) -> UsageError:
        hint = "make room there" if self._begun else "name a file in a folder that may be written"
        return UsageError(f"cannot write {self.name}: {problem.strerror}", hint)


def _is_torn(line: bytes, head: bytes, follows: bool) -> bool:
    """Return whether the line, no record, is the beginning of one.

    A record begins with `head`. The rest of the line may be zeros; all of it, if it `follows` a record.
    """
    begun = line.rstrip(b"\0")
    if line.endswith(b"\n") or not (begun or follows):
        return False
    try:
        loads(line)
    except ValueError:
        return begun.startswith(head) or head.startswith(begun)
    return False  # a whole object, such as a record of `ask --json`


def write_file(path: str, content: bytes) -> None:
    """Writes a file completely or not at all. Raises OSError, as the three below do."""
    number, unfinished = create_unfinished(path)
    try:
        with open(number, "wb") as file:
            file.write(content)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def append(number: int, content: bytes, regular: bool = True) -> None:
    """Appends to an open file. To a `regular` one it appends all of the content or nothing, which is on the disk afterwards."""
    size = os.fstat(number).st_size
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[os.write(number, rest) :]
        if regular:
            os.fsync(number)
    except BaseException:
        if regular:
            os.ftruncate(number, size)
        raise


def create_unfinished(path: str) -> tuple[int, str]:
    """Creates an unfinished file for `path`, to read and to append to: its descriptor, and its name, which no file had before."""
    name = UNFINISHED.format(path, secrets.token_hex(4))
    return os.open(name, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o666), name


def remove_unfinished(path: str) -> None:
    """Removes the unfinished files for `path` that killed programs left; no program may be writing one."""
    for name in glob.glob(UNFINISHED.format(glob.escape(path), "[0-9a-f]" * 8)):
        with suppress(FileNotFoundError):
            os.unlink(name)
