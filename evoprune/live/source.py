"""Sources that do not wait, read by a process apart: frames as they come, and what to do where they stop coming."""

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from math import prod
from typing import TYPE_CHECKING

from evoprune.errors import UsageError, VideoError
from evoprune.util import FILE_URL, missing_hint, shown, without_password
from evoprune.video import FrameMemory, borrow

if TYPE_CHECKING:
    import numpy as np

PACES = FROM_SOURCE, FROM_FILE = ("source", "file")
SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "tcp")
STDIN = "-"
LONGEST_S = 20.0  # of a timeout: a process that is silent for longer counts as hung
TimedFrame = tuple[float, "np.ndarray"]  # seconds from the first one; uint8 [H, W, 3], RGB as displayed
Due = Callable[[], float]


class LiveSource:
    """Read a source by its connections, one after the other. `name`: without a password. `facts`: of `Video`, once it is open.
    `waits`: whether frames that are taken late are all there, as of a file or a download of known length.

    Args:
        source: a URL of `SCHEMES`, a camera such as /dev/video0, a file, or `-` for the standard input, a pipe.
        pace: "source", frames as they come, of a file also what is appended to it; or "file", at the pace of their times.
        timeout_s: how long the source may be silent, and a file may take to grow.
        reconnects: how often in a row a URL or a camera that ended or failed is tried again; `tell` is given a sentence about it.

    Raises UsageError: numbers out of range, another protocol, a terminal. VideoError: no such file.
    """

    def __init__(
        self,
        source: str,
        pace: str = FROM_SOURCE,
        timeout_s: float = 10.0,
        reconnects: int = 5,
        tell: Callable[[str], None] = lambda text: None,
    ):
        if pace not in PACES:
            raise UsageError(f"unknown pace {pace!r}", f"choose {' or '.join(PACES)}")
        if not 1 <= timeout_s <= LONGEST_S:
            raise UsageError(f"a timeout of {timeout_s:g} s", f"1 to {LONGEST_S:g} s")
        if reconnects < 0:
            raise UsageError(f"{reconnects} reconnects", "0 or more")
        _check(source)
        is_file = source != STDIN and os.path.isfile(source)
        self.name = without_password(source)
        self._source = source
        self._reconnects = reconnects
        if source == STDIN:
            self.name = "standard input"
            self._source = None
        if source == STDIN or is_file:
            self._reconnects = 0
        self._pace = pace
        self._arguments = {"source": self._source, "name": self.name, "timeout_s": float(timeout_s)}  # of `LiveReader`
        self._arguments["follow"] = pace == FROM_SOURCE
        self._is_file = is_file
        self.waits = is_file and pace == FROM_SOURCE
        self._tell = tell
        self._closing = threading.Event()
        self._worker = None
        self.facts: dict = {}

    def frames(self, due: Due) -> Iterator[TimedFrame]:
        """Yield frames until the source ends; `due` says from which time on the next one is wanted.

        Times go on over all connections: as much time has passed between two as there was.

        Raises VideoError: the source cannot be read, broke off, or did not come back.
        """
        tries = 0
        base = 0.0
        last = None
        while True:
            problem = None
            finite = False
            try:
                with closing(self._connected(lambda base=base: due() - base)) as frames:
                    self.facts = next(frames)
                    finite = self.facts.pop("finite")
                    begun = time.monotonic()
                    self.waits = self._pace == FROM_SOURCE and bool(finite or self._is_file)
                    for time_s, frame, gap_s in frames:
                        self.facts["clock_gap_s"] = gap_s
                        if self._pace == FROM_FILE:
                            wait = begun + time_s - time.monotonic()
                            if wait > 0 and self._closing.wait(wait):
                                return
                        tries = 0
                        last = (base + time_s, time.monotonic())
                        yield base + time_s, frame
            except VideoError as error:
                problem = error
            if self._closing.is_set() or (finite and not problem):
                return
            if last is None or tries >= self._reconnects:
                if problem or last is None:
                    raise problem or VideoError(f"{self.name} has no frame", "does it play elsewhere?")
                return
            tries += 1
            why = problem.message if problem else f"{self.name} has ended"
            self._tell(f"{why}; connecting again ({tries} of {self._reconnects})")
            self._closing.wait(min(2.0 ** (tries - 1), 10.0))
            base = last[0] + time.monotonic() - last[1]

    def close(self) -> None:
        """Ends the reading, in whichever thread it is."""
        self._closing.set()
        if worker := self._worker:
            worker.kill()

    def _connected(self, due: Due) -> Iterator:
        """Yield the facts of a `LiveReader`, then its frames, read by a worker process, which is ended afterwards."""
        with borrow(self.name) as worker:
            self._worker = worker
            if self._closing.is_set():
                raise VideoError(f"{self.name} is closed")
            try:
                descriptor = None if self._source else sys.stdin.fileno()
                worker.send(worker.request("live", self._arguments), descriptor)
                yield worker.answer()
                memory = None
                shape = None
                while True:
                    worker.send(worker.request("next", {"after_s": due()}))
                    if (header := worker.answer()) is None:
                        return
                    self._learn(header)
                    if shape != (new := (1, header["height"], header["width"], 3)):
                        shape = new
                        memory = FrameMemory(prod(new))
                    frames = worker.ask_to_fill(memory, shape, {})
                    worker.answer()
                    yield header["time_s"], frames[0].copy(), header["clock_gap_s"]
                    del frames  # so that its memory can be used again
            finally:
                self._worker, worker.busy = None, True

    def _learn(self, header: dict) -> None:
        """Adds to the facts what only the frames of some sources say."""
        if header["hdr_format"]:
            self.facts |= {"hdr": True, "hdr_format": header["hdr_format"]}


def _check(source: str) -> None:
    """Raises UsageError or VideoError where there is surely no such source."""
    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("- means standard input, which is a terminal", "pipe a video into it")
        return
    if "://" in source and not os.path.exists(source):
        if (scheme := source.partition("://")[0].lower()) not in SCHEMES:
            hint = f"one of {', '.join(SCHEMES)}"
            if source.startswith(FILE_URL):
                hint = missing_hint(source, "")
            raise UsageError(f"streams of {scheme}:// are not read", hint)
        return
    try:
        kind = os.stat(source).st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        hint = missing_hint(source, "give a file, a camera, a URL, or - for a pipe")
        raise VideoError(f"cannot read {shown(source)}: {reason}", hint) from error
    if not (stat.S_ISREG(kind) or stat.S_ISCHR(kind)):
        raise VideoError(f"{source} is neither a file nor a camera", "- reads a pipe")
