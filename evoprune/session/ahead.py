"""Inputs are probed and read while torch is imported and a model is loaded. Imports no torch.

What is read of an input follows from the description of the model (session/loading/description.py). What was read is handed over if
the files have not changed since, and if the plan is the same: a session may prune otherwise. Else the input is read anew.

Frames wait as they were decoded, full-size, because torch resizes them. They take `HELD_BYTES` at most.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from contextvars import copy_context
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack

import numpy as np

from evoprune.backend.limits import available_memory
from evoprune.errors import UsageError, VideoError
from evoprune.session.loading.description import ModelDescription, describe
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.session.planning import plan_input
from evoprune.session.signatures import takes
from evoprune.util import brief, from_keywords
from evoprune.video.frames import FrameChunk, frames_at_once, probe, read_frames
from evoprune.video.info import IMAGES, Video
from evoprune.video.sandbox.isolation import LOOK_S, Scope, check_wanted, wait_for

if TYPE_CHECKING:
    from evoprune.session.keywords import ReadAheadKeywords

Path = str | os.PathLike[str]
Asked = tuple[Sequence[Path], SamplingOptions]  # inputs that are opened together, and what is looked at of them

HELD_BYTES = 512 * 2**20  # of frames that wait; less where memory is short
SHARE = 16  # frames take at most this part of the memory that is available
PIECE_BYTES = 8 * 2**20  # of frames that are read at a time
FIRST = 4  # so many of many videos are read ahead
PATIENCE_S = 3.0  # how long closing waits for the thread, and who wants frames until it is known which come


@dataclass(eq=False)
class _Reading:
    """An input whose frames are read ahead, or will be. All fields are changed under the lock of its `Ahead`."""

    path: str
    place: int  # among the inputs that are opened together
    asked: Asked
    state: tuple | None = None  # of its files before they were read
    request: tuple[Any, ...] | None = None  # the arguments of `read_frames`, once they are planned
    pieces: deque[FrameChunk] = field(default_factory=deque)  # that wait
    taken: bool = False  # by a session, which gets the pieces one by one
    dropped: bool = False  # nobody wants the frames
    complete: bool = False  # all pieces were read
    ended: bool = False  # the thread has done with it
    problem: Exception | None = None  # that ended it

    @property
    def is_busy(self) -> bool:
        """Whether it is read for somebody."""
        return self.taken and not (self.ended or self.dropped)

    def is_known(self) -> bool:
        """Return whether it is known which frames it gives, if any."""
        return self.request is not None or self.ended or self.dropped

    def has(self, request: tuple[Any, ...], state: tuple | None) -> bool:
        """Return whether it gives these frames of files in that state, or the error of the video that comes with them."""
        failed = self.problem is not None and not isinstance(self.problem, VideoError)
        return self.request == request and self.state == state is not None and not failed and not self.dropped


class Ahead:
    """A thread that probes and reads inputs ahead of a model, one after the other, and holds their frames. To be closed.

    `probe` and `read_frames` are those of video/frames.py, and give what is known or was read; the latter gives it once. Inputs are
    to be asked for in the order of `begin`: those before the one that is asked for are no longer read.

    `reads`: whether frames are read, or inputs only probed. `held_bytes`: of frames that wait, at most.
    """

    def __init__(self, *, reads: bool = True, held_bytes: int | None = None):
        self._reads = reads
        if held_bytes is None:
            held_bytes = HELD_BYTES
            if (available := available_memory()) is not None:
                held_bytes = min(HELD_BYTES, available // SHARE)
        self._limit = held_bytes
        self._held = 0
        self._known: dict[tuple[str, float], tuple[tuple, Video]] = {}  # the state of the files, and what is in them
        self._probing = threading.Lock()
        self._changed = threading.Condition()
        self._readings: list[_Reading] = []
        self._thread: threading.Thread | None = None
        self._scope = Scope()
        self._pid = os.getpid()
        self.model: ModelDescription | None = None  # for which inputs are read
        self._pruning: PruneOptions | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def begin(self, asked: Iterable[Asked], model: ModelDescription, pruning: PruneOptions | None = None) -> None:
        """Starts to read inputs for a model, in this order. To be called once. What goes wrong is left to whoever opens them.

        `pruning`: a method that makes inputs smaller decides what is read; None for nothing pruned.
        """
        self.model = model
        self._pruning = pruning
        for paths, sampling in asked:
            names = [os.fspath(path) for path in paths]
            self._readings += [_Reading(path, place, (names, sampling)) for place, path in enumerate(names)]
        run = copy_context().run  # so that whatever stops this thread also stops the one that it starts
        # A daemon thread that hangs does not keep the program from ending.
        self._thread = threading.Thread(target=run, args=(self._work,), name="evoprune-ahead", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # too many threads: nothing is read ahead
            self._readings.clear()

    def close(self) -> None:
        """Drops what was read, and ends the thread: at once where it reads in a worker process.

        Where it hangs otherwise, it is left to end by itself.
        """
        if os.getpid() != self._pid:  # a forked copy, without the thread
            return
        with self._changed:
            for reading in self._readings:
                self._drop(reading)
        self._scope.stop()
        # The model that it belongs to may be collected as garbage in any thread.
        if self._thread and self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(PATIENCE_S)

    def probe(self, path: Path, *, folder_fps: float) -> Video:
        """As `frames.probe`. What was probed already is not probed again unless its files have changed."""
        if os.getpid() != self._pid:
            return probe(path, folder_fps=folder_fps)
        key = os.fspath(path), folder_fps
        if info := self._recalled(key):
            return info
        while not self._probing.acquire(timeout=LOOK_S):  # whoever comes while an input is probed waits for the result
            check_wanted()
        try:
            info = self._recalled(key)
            state = _state(key[0])
            if info is None:
                info = probe(path, folder_fps=folder_fps)
                self._known[key] = state, info
            return info
        finally:
            self._probing.release()

    def _recalled(self, key: tuple[str, float]) -> Video | None:
        """Return what was probed, if the files are as they were then."""
        before, info = self._known.get(key, (None, None))
        return info if before is not None and before == _state(key[0]) else None

    def read_frames(
        self,
        info: Video,
        times_s: Sequence[float],
        *,
        chunk_bytes: int,
        cores: int | None = None,
        on_frames: Callable[[int], None] = lambda frames: None,
        **how,
    ) -> Iterator[FrameChunk]:
        """As `frames.read_frames`: the same chunks, of what was read ahead if that is asked for; else it is read now."""
        reading = self._take((info, tuple(times_s), how))
        if reading is None:
            how |= {"chunk_bytes": chunk_bytes, "cores": cores, "on_frames": on_frames}
            with closing(read_frames(info, times_s, **how)) as chunks:
                yield from chunks
            return
        try:
            yield from regrouped(self._pieces(reading, on_frames), frames_at_once(info, chunk_bytes))
        finally:
            with self._changed:
                self._drop(reading)

    # The thread that reads.

    def _work(self) -> None:
        self._scope.enter()
        for reading in self._readings:
            try:
                if not reading.dropped:
                    self._read(reading)
            except BaseException as problem:  # told to whoever takes the frames; who reads them anew meets it again
                reading.problem = problem
            with self._changed:
                reading.ended = True
                self._changed.notify_all()

    def _read(self, reading: _Reading) -> None:
        names, sampling = reading.asked
        infos = [self.probe(path, folder_fps=sampling.frame_rate) for path in names]
        if not self._reads:
            return
        info = infos[reading.place]
        wanted = sampling.of_each(infos)[reading.place]
        plan = plan_input(self.model, info, wanted, self._pruning)
        source = plan.source
        times = plan.sampling.times_s
        how = plan.read_arguments
        with self._changed:
            reading.state, _ = self._known[reading.path, sampling.frame_rate]
            reading.request = source, times, how
            self._changed.notify_all()
        piece_bytes = source.width * source.height * 3 * min(len(times), frames_at_once(source, PIECE_BYTES))
        how = how | {"chunk_bytes": PIECE_BYTES, "cores": self.model.options.cores}
        with closing(read_frames(source, times, **how)) as pieces:
            while self._has_room(reading, piece_bytes):
                start = time.perf_counter()
                piece = next(pieces, None)
                if piece is None:
                    reading.complete = True
                    return
                self._hold(reading, replace(piece, hidden_s=time.perf_counter() - start))
                del piece  # so that whoever takes it holds it alone

    def _has_room(self, reading: _Reading, piece_bytes: int) -> bool:
        """Waits until there is room for the next piece, and the one that the reader makes meanwhile; False if nobody wants them.

        There always is for whoever waits for it.
        """

        def is_clear() -> bool:
            fits = self._held + 2 * piece_bytes <= self._limit
            return reading.dropped or fits or (reading.taken and not reading.pieces)

        with self._changed:
            self._changed.wait_for(is_clear)
            return not reading.dropped

    def _hold(self, reading: _Reading, piece: FrameChunk) -> None:
        with self._changed:
            if not reading.dropped:
                reading.pieces.append(piece)
                self._held += piece.pixels.nbytes
                self._changed.notify_all()

    def _drop(self, reading: _Reading) -> None:
        """Gives the frames of a reading up. To be called with the lock."""
        reading.dropped = True
        self._held -= sum(piece.pixels.nbytes for piece in reading.pieces)
        reading.pieces.clear()
        self._changed.notify_all()

    # The session that asks.

    def _take(self, request: tuple[Any, ...]) -> _Reading | None:
        """Return the reading of just these frames, which nobody else gets; None if there is none, or others would wait for it."""
        if os.getpid() != self._pid:
            return None
        path = request[0].path
        state = _state(path)
        with self._changed:
            for number, reading in enumerate(self._readings):
                if reading.path != path or reading.taken or reading.dropped:
                    continue
                for earlier in self._readings[:number]:
                    if not earlier.taken:
                        self._drop(earlier)
                # While another one is read for somebody, the thread may come to this one late, or never.
                if not any(earlier.is_busy for earlier in self._readings[:number]):
                    # It is probed, so it is planned at once, unless the thread hangs in one that nobody wants any more.
                    wait_for(self._changed, partial(_Reading.is_known, reading), PATIENCE_S)
                    if reading.has(request, state):
                        reading.taken = True
                        self._changed.notify_all()
                        return reading
                self._drop(reading)
        return None

    def _pieces(self, reading: _Reading, on_frames: Callable[[int], None]) -> Iterator[FrameChunk]:
        """Yields the pieces in order, as soon as they are there; then raises what ended the reading."""
        while True:
            start = time.perf_counter()
            with self._changed:
                wait_for(self._changed, lambda: reading.pieces or reading.ended or reading.dropped)
                if reading.pieces:
                    piece = reading.pieces.popleft()
                    self._held -= piece.pixels.nbytes
                    self._changed.notify_all()
                elif reading.problem is not None:
                    raise reading.problem
                elif reading.complete:
                    return
                else:
                    raise RuntimeError(f"reading {reading.path} was closed")
            waited_s = time.perf_counter() - start
            on_frames(piece.end)
            yield replace(piece, hidden_s=max(0.0, piece.hidden_s - waited_s))
            del piece  # so that only the caller holds the frames


@takes(ModelOptions, SamplingOptions)
def read_ahead(path: Path | Sequence[Path], model: Path = "demo", **options: "Unpack[ReadAheadKeywords]") -> Ahead:
    """Begins to read videos and pictures for a model that is not there yet, without importing torch; for `VideoQA.load(ahead=)`.

        with evoprune.read_ahead("clip.mp4", "Qwen/Qwen2.5-VL-3B-Instruct", fps=2) as ahead:
            qa = evoprune.VideoQA.load("Qwen/Qwen2.5-VL-3B-Instruct", ahead=ahead)
            video = qa.encode("clip.mp4", fps=2)

    Args:
        path: a file or a folder of frames; or several, in the order in which they will be encoded.
        model: see `VideoQA.load`. The small files of one of the hub are downloaded now.
        options: those of `VideoQA.load` that choose the model and the device, and those of `encode`.

    A missing file is reported by whoever needs it.

    Raises:
        ModelError: the model is missing, of another kind, damaged, or out of reach. UsageError: an option that makes no sense,
            or no path. TypeError: an unknown option.
    """
    loading, sampling = from_keywords({"model": model, **options}, ModelOptions, SamplingOptions)
    paths = path
    if isinstance(path, str | os.PathLike):
        paths = [path]
    if not isinstance(paths, list | tuple) or not all(isinstance(each, str | os.PathLike) for each in paths):
        raise UsageError(f"the input is {brief(path)}, not a path", "give the path of a file or a folder of frames")
    model = describe(loading)
    ahead = Ahead()
    ahead.begin([(paths, sampling)], model)
    return ahead


def regrouped(pieces: Iterable[FrameChunk], size: int) -> Iterator[FrameChunk]:
    """Yields the same frames in chunks of `size`, the last perhaps smaller. Frames of several pieces are copied."""
    waiting: list[FrameChunk] = []
    for piece in pieces:
        waiting.append(piece)
        while (count := sum(len(each.pixels) for each in waiting)) >= size:
            chunk = _joined(waiting)
            waiting = []
            if count > size:
                rest = replace(chunk, first=chunk.first + size, damaged=0, hidden_s=0.0)
                waiting = [replace(rest, pixels=chunk.pixels[size:], times_s=chunk.times_s[size:])]
                chunk = replace(chunk, pixels=chunk.pixels[:size], times_s=chunk.times_s[:size])
            yield chunk
    if waiting:
        yield _joined(waiting)


def _joined(pieces: Sequence[FrameChunk]) -> FrameChunk:
    if len(pieces) == 1:
        return pieces[0]
    return FrameChunk(
        first=pieces[0].first,
        pixels=np.concatenate([piece.pixels for piece in pieces]),
        times_s=tuple(time_s for piece in pieces for time_s in piece.times_s),
        damaged=sum(piece.damaged for piece in pieces),
        other_shape=any(piece.other_shape for piece in pieces),
        moved=any(piece.moved for piece in pieces),
        hidden_s=sum(piece.hidden_s for piece in pieces),
    )


def _state(path: str) -> tuple | None:
    """Return what changes when a file, or an image in a folder, is replaced or written to; None where it cannot be found."""
    try:
        if not os.path.isdir(path):
            return _facts("", os.stat(path))
        with os.scandir(path) as entries:
            images = [entry for entry in entries if entry.name.lower().endswith(IMAGES)]
        return tuple(sorted(_facts(entry.name, entry.stat()) for entry in images))
    except (OSError, ValueError):
        return None


def _facts(name: str, status: os.stat_result) -> tuple:
    return name, status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
