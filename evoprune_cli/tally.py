"""The progress of a batch on stderr: a changing line on a terminal, a line a minute elsewhere, failures, and a summary."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evoprune.report import Report, VideoFacts
from evoprune.text import clock, counted, listed, roughly
from evoprune_cli.terminal import print_warning, tell, warned

if TYPE_CHECKING:
    from evoprune.batch.output import RecordFile

EVERY_S = 60.0


class Tally:
    """Counts records and reports on stderr. As a context it ends with a summary, also of a batch that is interrupted.

    `total`: all rows, also those that an earlier run answered. `failed`: rows of this run. `quiet`: prints warnings only. `named`:
    videos that the user knows to be missing.
    """

    def __init__(self, total: int, quiet: bool, named: Sequence[str] = ()):
        self.failed, self.quiet = 0, quiet
        self._total, self._named = total, frozenset(named)
        self._file: RecordFile | None = None
        self._warnings: dict[str, dict[str | None, VideoFacts]] = {}  # by name, the videos that have it by path
        self._last_failure, self._cut = "", 0  # `_cut`: answers that -n cut

    def note_others(self, count: int) -> None:
        """Says how many records of an earlier run are of rows that are not asked now."""
        if count and not self.quiet:
            stay = "stays" if count == 1 else "stay"
            tell(f"the output also holds {counted(count, 'record')} of other rows, which {stay} in it")

    def start(self, file: "RecordFile", left: int, show) -> None:
        """The model is loaded, and `left` rows have no answer yet. `show`: see `terminal.progress`."""
        self._file, self._before, self._show = file, self._total - left, show
        self._begun = self._reported = time.monotonic()
        show(self._line(self._before))

    def add(self, record: Report) -> None:
        """Counts a record that is already in the file."""
        self._cut += record.finish_reason == "length"
        for name, video in warned(record):
            if name == "answer_cut":
                continue  # counted, whatever video it is about
            self._warnings.setdefault(name, {}).setdefault(video.path, video)
        if record.error:
            self.failed += 1
            self._report_failure([each.path for each in record.inputs], record.error["message"])
        line = self._line(self._before + self._file.written)
        self._show(line)
        if time.monotonic() - self._reported >= EVERY_S and not self.quiet and not sys.stderr.isatty():
            self._reported = time.monotonic()
            tell(line)

    def __enter__(self) -> "Tally":
        return self

    def __exit__(self, category, problem, trace) -> None:
        if isinstance(problem, BrokenPipeError | SystemExit):
            return
        if problem and not (self._file and self._file.written):
            if not isinstance(problem, Exception) and not self.quiet:
                tell("interrupted: no record was written; to go on: the same command")
            return
        for name, videos in self._warnings.items():
            print_warning(name, next(iter(videos.values())), len(videos) - 1)
        if self.quiet:
            return
        made, seconds = self._file.written, time.monotonic() - self._begun
        done, failed = self._before + made - self.failed, self._failed()
        before = f", {self._before:,} of them before" if self._before else ""
        took = f": {clock(seconds)}, {pace(made, seconds)}" if made else ""
        tell(f"{done:,} of {counted(self._total, 'row')} answered{before}{failed}{took}")
        if self._cut:
            tell(f"{counted(self._cut, 'answer')} may be incomplete: -n (max_new_tokens) allows no more tokens")
        if self._file.regular and problem:
            tell("to go on: the same command with --resume")
        elif self._file.regular and self.failed:
            tell("once the cause of a failure is mended, the same command with --resume asks the failed rows again")

    def _line(self, done: int) -> str:
        seconds, made = time.monotonic() - self._begun, self._file.written
        rest = f", {pace(made, seconds)}, {roughly(seconds / made * (self._total - done))} left" if made else ""
        return f"{done:,} of {counted(self._total, 'row')}{self._failed()}{rest}"

    def _failed(self) -> str:
        return f", {self.failed:,} failed" if self.failed else ""

    def _report_failure(self, inputs: list[str], message: str) -> None:
        if self._named & set(inputs) and message.startswith("no such file"):
            return
        known = any(each in message for each in inputs)
        said = f"failed: {message if known else f'{listed(inputs)}: {message}'}"
        if said != self._last_failure and not self.quiet:  # all rows of a video fail for the same reason
            tell(said)
        self._last_failure = said


def pace(made: int, seconds: float) -> str:
    """Rows a second, a minute or an hour, whichever is the first above one."""
    units = (("a second", 1), ("a minute", 60), ("an hour", 3600))
    unit, length = next((unit for unit in units if made * unit[1] >= seconds), units[-1])
    return f"{made * length / max(seconds, 1e-3):,.3g} {unit}"
