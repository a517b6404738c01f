"""A batch's output file, which survives crashes and can only be written by one program at a time.

Records are appended as whole lines. There are no auxiliary files: each record contains its row and the settings, and the output
file itself is locked. This module does not import torch.
"""

import errno
import os
import sys
from collections.abc import Callable, Container, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TextIO

from evoprune.batch.rows import Row
from evoprune.errors import UsageError
from evoprune.files import BINARY, OPEN_FILES, append, create_unfinished, read_at, remove_unfinished
from evoprune.methods import MethodText
from evoprune.report import SCHEMA, Report, name_inputs, rounded
from evoprune.session import PipelineOptions
from evoprune.untrusted import MAX_LEVELS, loads
from evoprune.util import differences, file_changes, record_of, shown, unwritable_hint, without_password
from evoprune.video import input_state

if TYPE_CHECKING:
    from evoprune.session import ModelDescription, Session

STDOUT = "-"
# Maximum nesting depth of a record, in which the fields of a row and the options are a few levels deeper than in their own files.
RECORD_LEVELS = MAX_LEVELS + 10
BOM = b"\xef\xbb\xbf"  # some editors write this at the start of a file
OTHER_HINT = "name another file with -o, or remove this one"
# Options that are always recorded. All other options are recorded only if they differ from their defaults.
RECORDED = (
    "model", "revision", "dtype", "quantize", "load_format", "budget", "method", "seed", "fps", "frames",
    "max_frames", "max_visual_tokens", "decoder", "seek", "max_new_tokens", "temperature", "top_p", "system",
)  # fmt: skip


@dataclass(frozen=True)
class Settings(PipelineOptions):
    """Options for a batch. Each row has its own `start_s` and `end_s`, which override those of the options."""

    ALWAYS: ClassVar[tuple[str, ...]] = RECORDED  # names of options that are always recorded

    def load(
        self, progress: Callable[[int, int], None] | None = None, model: "ModelDescription | None" = None
    ) -> "Session":
        """Load the model and return a `Session`.

        Args:
            progress: See `load_model`.
            model: The model description, if already known.

        Raises:
            EvopruneError: If loading fails; see `Session.load`.
        """
        from evoprune.session import Session

        return Session.load(model or self.model, self.pruning, progress=progress)

    @property
    def groups(self) -> tuple[Any, ...]:
        """The option groups that affect the answers: model, pruning, sampling, and generation."""
        return self.model, self.pruning, self.sampling, self.generation

    def record(self) -> dict[str, Any]:
        """Return the options as a flat dict of JSON values, as stored in records."""
        code = MethodText(self.pruning.method).plugin_code()
        facts = record_of(self.groups, self.ALWAYS) | {"method_args": {}}  # `method` already contains these settings
        if code:
            facts["plugins"] = code
        return facts

    def complete(self, report: Report, row: Row) -> Report:
        """Add the row's fields and the options to the report about its answer."""
        report.id = row.id
        report.batch = {"row": row.asked | {"answer": row.answer}, "settings": self.record()}
        return report

    def failed(self, row: Row, error: dict[str, Any]) -> Report:
        """Return the record for a failed row. `error` is the error as a JSON record."""
        report = Report(question=row.prompt, finish_reason="error", error=error)
        name_inputs(report, [without_password(name) for name in row.inputs])
        return self.complete(report, row)


class Line(Protocol):
    """A record that can be written as a JSON line."""

    def to_json(self, ascii_only: bool = False) -> str: ...


@dataclass(frozen=True)
class EarlierRecord:
    """A record written to the output file by an earlier run.

    Attributes:
        row: The row fields that affect the answer, plus the expected answer.
        settings: The options of the batch that wrote the record.
        failed: Whether the row failed.
        start, end: The byte range [start, end) of the record in the file.
        files: The states of the model and input files when the record was written (see `Sources`). Empty if unknown.
        revision: The commit of a Hub model, or None if unknown.
        after_tower_below: The value of `pruning.after_tower_below` in the record, with null replaced by 0. None if the row failed.
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
    """The states (`file_state`) of the model and input files at the start of the batch.

    They are compared with the states in earlier records to detect changes. None means an unknown state. For example, Hub models
    have no state, so each record contains the model's commit instead.
    """

    def __init__(self, settings: Settings):
        self._settings = settings
        self._name = settings.model.model
        self._subtitles = settings.sampling.subtitles_wanted
        self._model = settings.model.state()
        self._input = cache(partial(input_state, listdir=cache(os.listdir)))
        self._revision: str | None = None
        self._after_tower_below: int | None = None

    def of(self, row: Row) -> dict[str, Any]:
        """Return the states of the model files and the row's input files as JSON values, for the row's record."""
        subtitles = row.subtitles_path or self._subtitles
        return {"model": self._model, "inputs": [self._input(path, subtitles) for path in row.paths]}

    def remaining(self, rows: Sequence[Row], earlier_records: Sequence[EarlierRecord]) -> list[Row]:
        """Return the rows that still need to be answered, including rows that failed in an earlier run.

        Raises:
            UsageError: If an earlier record has different settings, or if the row of an answered record, the model, or an input has
                changed.
        """
        by_id = {row.id: row for row in rows}
        now = rounded(self._settings.record())
        asked = {row.id: rounded(row.asked) for row in rows}
        done = set()
        for earlier in earlier_records:
            if change := differences(earlier.settings, now):
                hint = "give the same settings, or another -o"
                raise UsageError(f"the output was started with other settings: {change}", hint)
            # The expected answer may change, because it does not affect the model's answer.
            before = earlier.row | {"answer": None}
            change = differences(before, asked.get(earlier.id, before) | {"answer": None})
            if change and not earlier.failed:
                hint = "give changed rows new ids, or choose another -o"
                raise UsageError(f"the row {earlier.id!r} has changed since it was asked: {change}", hint)
            self._check(earlier, by_id.get(earlier.id))
            if not earlier.failed:
                done.add(earlier.id)
        return [row for row in rows if row.id not in done]

    def _check(self, earlier: EarlierRecord, row: Row | None) -> None:
        """Check that the model and inputs of an answered row have not changed since an earlier record was written.

        Raises:
            UsageError: If the model or any of the inputs has changed.
        """
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
                hint = "delete the row's line from the output to ask it again, or choose another -o"
                raise UsageError(f"{shown(name)} has changed since row {row.id!r} was answered: {change}", hint)

    def check_revision(self, commit: str | None) -> None:
        """Check that a Hub model's commit is the same in all records.

        Call this method for every record, including records from earlier runs.

        Raises:
            UsageError: If the commit differs from the commit in a previous record.
        """
        if commit and self._revision and commit != self._revision:
            self._refuse(f"its commit was {self._revision} and is now {commit}")
        self._revision = commit or self._revision

    def check_sizes(self, after_tower_below: int | None) -> None:
        """Check that all records have the same size limit below which inputs are pruned only after the vision tower.

        Args:
            after_tower_below: The size limit in units. See `EarlierRecord`.

        Raises:
            UsageError: If the size limit differs from the limit in a previous record.
        """
        check_size_rule("the output", self._after_tower_below, after_tower_below)
        if after_tower_below is not None:
            self._after_tower_below = after_tower_below

    def _refuse(self, change: str) -> None:
        hint = "use the earlier model (--revision for a hub id), or another -o"
        raise UsageError(f"the model {self._name} has changed since the output was started: {change}", hint)


def check_size_rule(run: str, before: int | None, now: int | None) -> None:
    """Check that the size limit below which inputs are pruned only after the vision tower has not changed during a run.

    The size limit depends on the device, so it changes if a run is resumed on a different device.

    Args:
        run: A noun phrase that describes the run in the error message, such as "the output".
        before, now: The two size limits in units. 0 means that inputs of all sizes are treated alike, and None means that the limit
            is unknown.

    Raises:
        UsageError: If the size limit has changed.
    """
    if before is None or now is None or before == now:
        return
    change = f"the size limit for pruning only after the tower was {_size_limit(before)} and is now {_size_limit(now)}"
    hint = "use the same --device, or another -o; inner=always prunes the same way on all devices"
    raise UsageError(f"{run} was started on another device or version: {change}", hint)


def _size_limit(units: int) -> str:
    if units == 0:
        return "none"
    return f"{units:,} visual tokens"


class RecordFile:
    """An output file of records, one JSON object per line.

    The constructor opens and locks the file without modifying it. The first modification is made by `begin`. Subclasses can
    override `schema`, the record schema, and `noun`, the word for the run in messages.

    Args:
        path: The file path, or "-" for stdout. Stdout, pipes, and files that are already open are write-only, and their `regular`
            attribute is False.
        stdout: The stream to use for "-". Defaults to `sys.stdout`.
        resume: Whether to keep the records of an existing file and list them in `earlier_records`.
        overwrite: Whether to discard the records of an existing file. If both this and `resume` are False, an existing file must be
            empty.

    Raises:
        UsageError: If the file cannot be written, already contains records, contains anything other than records, or is being
            written by another program.
    """

    schema: ClassVar[str] = SCHEMA
    noun: ClassVar[str] = "batch"

    def __init__(self, path: str, *, stdout: TextIO | None = None, resume: bool = False, overwrite: bool = False):
        if path.endswith("/"):
            raise UsageError(
                f"cannot write {path}: it is the name of a folder", f"name a file, such as {path}out.jsonl"
            )
        self.name = path
        self._stdout = stdout or sys.stdout
        self.earlier_records: list[EarlierRecord] = []
        self.written = 0  # number of records written by this run
        self._created = self._started = False
        given = path == STDOUT or path.startswith(OPEN_FILES)
        self.regular = not given and (os.path.isfile(path) or not os.path.exists(path))
        self.path = os.path.realpath(path) if self.regular else path
        if resume and overwrite:
            raise UsageError("--resume and --overwrite cannot be combined", "give one of the two")
        if not self.regular and (resume or overwrite):
            raise UsageError(f"{path} is not a file that can be resumed or overwritten", "name a file with -o")
        try:
            self._number = self._open()
        except OSError as problem:
            raise self._cannot_write(problem) from problem
        try:
            if self.regular and os.fstat(self._number).st_size:
                if resume:
                    self.earlier_records = self._read()
                elif not self._is_own():
                    raise UsageError(f"{path} already exists, and contains no records of a {self.noun}", OTHER_HINT)
                elif not overwrite:
                    hint = "--resume continues it, --overwrite replaces it; or name another file with -o"
                    raise UsageError(f"{path} already exists", hint)
        except BaseException:
            os.close(self._number)
            raise
        # Write in a separate thread. Signals raise exceptions only in the main thread, so they can't interrupt writing a line.
        self._writer = ThreadPoolExecutor(1)

    @property
    def resumable(self) -> bool:
        """Whether a later run can append to the file and skip answered rows."""
        return self.regular

    def _is_own(self) -> bool:
        """Return True if the file begins with a complete or incomplete record of this schema."""
        head = self._head
        beginning = read_at(self._number, 1024, 0).removeprefix(BOM).lstrip(b"\r\n")[: len(head)].rstrip(b"\0")
        return bool(beginning) and head.startswith(beginning)

    @property
    def _head(self) -> bytes:
        """The bytes at the start of every record."""
        return f'{{"schema":"{self.schema}",'.encode()

    def begin(self, again: Container[str] = ()) -> None:
        """Prepare the file for new records by removing any incomplete last line and all records with IDs in `again`.

        If the file was opened without `resume`, all of its contents are removed.
        """
        self._started = True
        if self.regular:
            self._writer.submit(self._keep, again).result()

    def _keep(self, again: Container[str]) -> None:
        kept = [record for record in self.earlier_records if record.id not in again]
        size = sum(record.end - record.start for record in kept)
        try:
            remove_unfinished(self.path)  # this is safe because this program holds the lock
            if kept and kept[-1].end != size:  # records are also dropped from the middle, so truncating isn't enough
                self._number = self._copied(kept)
            os.ftruncate(self._number, size)
            if kept and read_at(self._number, 1, size - 1) != b"\n":
                os.write(self._number, b"\n")
        except OSError as problem:
            raise self._cannot_write(problem) from problem

    def add(self, record: Line) -> None:
        """Append a record and sync it to disk. A signal or a full disk never leaves an incomplete line."""
        try:
            line = record.to_json().encode()
        except UnicodeEncodeError:  # the record contains a path with invalid Unicode
            line = record.to_json(ascii_only=True).encode()
        self._writer.submit(self._write, line + b"\n").result()

    def close(self) -> None:
        """Finish writing the current line and close the file. An empty file is deleted if this run created it."""
        self._writer.shutdown()
        if self._created and not os.fstat(self._number).st_size:
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
        """Open the file, lock it if it is regular, and return its file descriptor."""
        if self.name == STDOUT:
            self._stdout.flush()
            return os.dup(self._stdout.fileno())
        if not self.regular:
            return os.open(self.path, os.O_WRONLY | os.O_APPEND | BINARY)
        flags = os.O_RDWR | os.O_APPEND | BINARY
        while True:
            try:
                number = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o666)
                self._created = True
            except FileExistsError:
                number = os.open(self.path, flags)
                self._created = False
            try:
                self._lock(number)
                # The previous lock holder may have replaced or deleted the file, so check that it is still the same file.
                if os.path.exists(self.path) and os.path.samestat(os.fstat(number), os.stat(self.path)):
                    return number
            except BaseException:
                os.close(number)
                raise
            os.close(number)

    def _lock(self, number: int) -> None:
        if sys.platform == "win32":
            return
        import fcntl

        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as problem:
            hint = "wait until it is done, or choose another -o"
            raise UsageError(f"another {self.noun} is writing {self.name}", hint) from problem
        except OSError as problem:
            # These error numbers mean that the file system does not support locking.
            if problem.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise

    def _read(self) -> list[EarlierRecord]:
        """Read all complete records. Empty lines and an incomplete record in the last line are ignored.

        Raises:
            UsageError: If the file contains anything else.
        """
        records = []
        end = 0
        settings = None
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                place = end, end + len(line)
                end += len(line)
                if not line.removeprefix(BOM).strip():
                    continue
                try:
                    record = self._record(line, place)
                    if (
                        record.settings == settings
                    ):  # records usually have the same settings, so they share a single dict
                        record = replace(record, settings=settings)
                    settings = record.settings
                    records.append(record)
                except (ValueError, KeyError, TypeError) as problem:
                    if _is_torn(line, self._head, bool(records)):
                        break
                    hint = OTHER_HINT
                    if records:
                        hint = "if you do not need that line, delete it and repeat the command; or choose another -o"
                    raise UsageError(f"{self.name}, line {number} is not a record of a {self.noun}", hint) from problem
        return records

    def _record(self, line: bytes, place: tuple[int, int]) -> EarlierRecord:
        """Parse a line. `place` is its byte range in the file.

        Raises:
            ValueError: If the line is not JSON, or not a record of this schema. This may also raise a KeyError or TypeError.
        """
        record = loads(line, levels=RECORD_LEVELS)
        if record["schema"] != self.schema:
            raise ValueError
        about = record["batch"]
        identity, row, settings = record["id"], about["row"], about["settings"]
        if [type(identity), type(row), type(settings)] != [str, dict, dict]:
            raise TypeError
        failed = record["error"] is not None
        below = None
        if not failed:
            below = dict(record.get("pruning") or {}).get("after_tower_below") or 0
        files = dict(about.get("files") or {})
        commit = dict(record.get("model") or {}).get("revision")
        start, end = place
        return EarlierRecord(identity, row, settings, failed, start, end, files, commit, below)

    def _copied(self, kept: list[EarlierRecord]) -> int:
        """Atomically replace the file with a locked copy containing only these records. Returns the copy's file descriptor."""
        number, place = create_unfinished(self.path, flags=os.O_APPEND)
        try:
            self._lock(number)
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
        hint = "free some space there" if self._started else unwritable_hint(self.name)
        return UsageError(f"cannot write {self.name}: {problem.strerror}", hint)


def _is_torn(line: bytes, head: bytes, follows: bool) -> bool:
    """Return True if a line is a record that was truncated by a crash, rather than something else.

    Every record begins with `head`. After a crash, the end of the line may consist of zero bytes. If the line follows a complete
    record (`follows`), it may even consist entirely of zero bytes.
    """
    content = line.rstrip(b"\0")
    if line.endswith(b"\n") or not (content or follows):
        return False
    try:
        loads(line, levels=RECORD_LEVELS)
    except ValueError:
        return content.startswith(head) or head.startswith(content)
    return False  # the line is a complete JSON object, such as a record written by `ask --json`
