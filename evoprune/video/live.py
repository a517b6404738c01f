"""Reads frames from a live source as they arrive, using a worker process, and reconnects if the source stops."""

import os
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from math import prod
from typing import TYPE_CHECKING

from evoprune.errors import UsageError, VideoError, callback_errors
from evoprune.util import FILE_URL, cannot_read, missing_hint, shown, without_password
from evoprune.video.sandbox.channel import FrameMemory
from evoprune.video.sandbox.isolation import borrow

if TYPE_CHECKING:
    import numpy as np

PACES = ("source", "file")
SCHEMES = ("rtsp", "rtsps", "http", "https", "udp", "tcp")
STDIN = "-"
# Environment variables that FFmpeg reads for URLs. Only a process that opens a URL gets them, because proxies may have passwords.
URL_VARIABLES = ("http_proxy", "no_proxy", "SSL_CERT_FILE", "SSL_CERT_DIR")
LONGEST_S = 20.0  # maximum timeout; a worker that is silent for longer is considered to be hung
TimedFrame = tuple[float, "np.ndarray"]  # seconds since the first frame; and uint8 [H, W, 3], RGB as displayed
Due = Callable[[], float]


class LiveSource:
    """A live source of frames, such as a stream or a camera. If the source stops, evoprune tries to reconnect.

    Attributes:
        name: Name of the source. URLs are shown without their password.
        facts: A dict with some of the fields of `Video`, filled in once the source is open.
        waits: True if frames remain available until they are read, as with a file or a download of known length. False if unread
            frames are lost.

    Args:
        source: A URL with a scheme from `SCHEMES`, a camera such as /dev/video0, a file, or `-` for standard input (a pipe).
        pace: "source" yields frames as they arrive, including any frames that are appended to a file while it is being read. "file"
            yields frames in real time, according to their timestamps.
        timeout_s: Timeout in seconds. A source that sends no data for this long is considered to have failed, and a file that stops
            growing for this long is considered complete.
        reconnects: Maximum number of consecutive attempts to reopen a URL or camera that has ended or failed.
        tell: Called before each reconnection attempt with a message to show to the user.

    Raises:
        UsageError: A number is out of range, the protocol is not supported, or standard input is a terminal.
        VideoError: The file does not exist or cannot be read.
    """

    def __init__(
        self,
        source: str,
        pace: str = "source",
        timeout_s: float = 10.0,
        reconnects: int = 5,
        tell: Callable[[str], None] = lambda text: None,
    ):
        if pace not in PACES:
            raise UsageError(f"unknown pace {pace!r}", f"choose {' or '.join(PACES)}")
        if not 1 <= timeout_s <= LONGEST_S:
            raise UsageError(f"the timeout is {timeout_s:g} s", f"give 1 to {LONGEST_S:g} s")
        if reconnects < 0:
            raise UsageError(f"{reconnects} reconnects", "give 0 or more")
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
        self._arguments = {
            "source": self._source,
            "name": self.name,
            "timeout_s": float(timeout_s),
        }  # arguments for `LiveReader`
        self._arguments["follow"] = pace == "source"
        self._is_file = is_file
        self.waits = is_file and pace == "source"
        self._tell = tell
        self._closing = threading.Event()
        self._request = None
        self.facts: dict = {}

    def frames(self, due: Due) -> Iterator[TimedFrame]:
        """Yield frames until the source ends.

        After a reconnect, timestamps continue from the last frame's timestamp plus the wall time elapsed since that frame arrived.

        Args:
            due: Function that returns the minimum timestamp of the next frame. Earlier frames are skipped.

        Raises:
            VideoError: The source cannot be read, was interrupted, or cannot be reopened.
        """
        with callback_errors() as passing:
            yield from self._frames(passing(due))

    def _frames(self, due: Due) -> Iterator[TimedFrame]:
        tries = 0
        base = 0.0
        last = None

        def due_here() -> float:
            return due() - base

        while True:
            problem = None
            finite = False
            connects = last is not None
            try:
                with closing(self._connected(due_here, fresh=tries > 0)) as frames:
                    self.facts = next(frames)
                    finite = self.facts.pop("finite")
                    started = time.monotonic()
                    self.waits = self._pace == "source" and bool(finite or self._is_file)
                    for time_s, frame, gap_s in frames:
                        self.facts["clock_gap_s"] = gap_s
                        if self._pace == "file":
                            wait = started + time_s - time.monotonic()
                            if wait > 0 and self._closing.wait(wait):
                                return
                        tries = 0
                        if connects:  # the wait for the first frame of a new connection is part of the outage
                            connects = False
                            base = last[0] + time.monotonic() - last[1] - time_s
                        last = (base + time_s, time.monotonic())
                        yield base + time_s, frame
            except VideoError as error:
                problem = error
            if self._closing.is_set() or (finite and not problem):
                return
            if last is None or tries >= self._reconnects:
                if problem or last is None:
                    raise problem or VideoError(f"{self.name} has no frames", "does it play elsewhere?")
                return
            tries += 1
            why = problem.message if problem else f"{self.name} has ended"
            self._tell(f"{why}; reconnecting ({tries} of {self._reconnects})")
            self._closing.wait(min(2.0 ** (tries - 1), 10.0))
            base = last[0] + time.monotonic() - last[1]

    def close(self) -> None:
        """Stop reading from the source. Can be called from any thread."""
        self._closing.set()
        if request := self._request:
            request.kill()

    def _connected(self, due: Due, fresh: bool) -> Iterator:
        """Start a `LiveReader` in a worker process. Yields its facts first, then its frames. The process is killed on exit."""
        variables = {}
        if self._source and "://" in self._source:
            variables = {name: os.environ[name] for name in URL_VARIABLES if name in os.environ}
        with borrow(self.name, fresh, variables) as request:
            self._request = request
            if self._closing.is_set():
                raise VideoError(f"{self.name} is closed")
            try:
                descriptor = None if self._source else sys.stdin.fileno()
                yield request.ask("live", descriptor, **self._arguments)
                memory = None
                shape = None
                while (header := request.ask("next", after_s=due())) is not None:
                    self._update_facts(header)
                    if shape != (new := (1, header["height"], header["width"], 3)):
                        shape = new
                        memory = FrameMemory(prod(new))
                    frames, _ = request.fill(memory, shape)
                    yield header["time_s"], frames[0].copy(), header["clock_gap_s"]
                    del frames  # lets the worker reuse the memory
            finally:
                self._request = None

    def _update_facts(self, header: dict) -> None:
        """Update `facts` with a frame's HDR format, because some sources do not specify the format in the stream header."""
        if header["hdr_format"]:
            self.facts |= {"hdr": True, "hdr_format": header["hdr_format"]}


def _check(source: str) -> None:
    """Raise UsageError or VideoError if a source is clearly unreadable, for example because the file does not exist."""
    if source == STDIN:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("- means standard input, which is a terminal", "pipe a video into it")
        return
    if "://" in source and not os.path.exists(source):
        if (scheme := source.partition("://")[0].lower()) not in SCHEMES:
            hint = f"use one of {', '.join(SCHEMES)}"
            if source.startswith(FILE_URL):
                hint = missing_hint(source, "")
            raise UsageError(f"{scheme}:// streams are not supported", hint)
        return
    try:
        status = os.stat(source)
    except ValueError as error:  # for example, the path contains a null byte
        raise VideoError(f"cannot read {shown(source)}: {error}", "check the path") from error
    except OSError as error:
        hint = missing_hint(source, "give a file, a camera, a URL, or - for a pipe")
        raise VideoError(cannot_read(source, error), hint) from error
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISCHR(status.st_mode)):
        raise VideoError(f"{source} is neither a file nor a camera", "use - to read a pipe")
    if stat.S_ISREG(status.st_mode) and not status.st_size:
        raise VideoError(f"{source} is empty", "if it is being written, start again once it has frames")
