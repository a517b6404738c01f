"""Feeds a stream from a live source: one thread reads frames, another one encodes them, whoever asks has a third one."""

import threading
from contextlib import closing

from evoprune.cpu.machine import release_omp_threads, use_one_omp_thread
from evoprune.live.backlog import Backlog
from evoprune.live.source import LiveSource
from evoprune.live.stream import VideoStream

PATIENCE_S = 0.1  # how long the encoder waits for a frame before it looks whether a window waits to be read
END_S = 3.0  # how long closing waits for a thread
FPS = 2.0  # until the first frame tells the stream's rate


class LiveFeed:
    """Frames of a source go to a stream until the source ends, or the feed is closed, best by `with`: then both are closed.

    `backlog`: frames between the two. `begun`: set once a frame was fed, or none will be. `ended`: set once all of the source is
    encoded, or reading it failed. `problem`: why it failed.
    """

    def __init__(self, stream: VideoStream, source: LiveSource, window_s: float):
        self.backlog = Backlog(window_s, 1 / FPS)
        self.begun, self.ended = threading.Event(), threading.Event()
        self.problem: BaseException | None = None
        self._stream, self._source, self._closing = stream, source, False
        release_omp_threads()  # this thread has loaded the model, and another one encodes
        self._threads = [threading.Thread(target=each, daemon=True) for each in (self._read, self._encode)]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> "LiveFeed":
        return self

    def __exit__(self, *problem) -> None:
        self._closing = True
        self._source.close()
        self.backlog.end(drop=True)
        self._stream.close()
        for thread in self._threads:
            thread.join(END_S)

    def check(self) -> None:
        """Raises why reading or encoding failed."""
        if self.problem:
            raise self.problem

    def _read(self) -> None:
        use_one_omp_thread()  # it only scales frames
        try:
            with closing(self._source.frames(self.backlog.due)) as frames:
                for time_s, frame in frames:
                    self.backlog.put(time_s, self._stream.scaled(frame))
        except BaseException as problem:  # is raised by whoever asks
            self.problem = self.problem or problem
        self.backlog.end()

    def _encode(self) -> None:
        stream, backlog = self._stream, self.backlog
        try:
            while (found := backlog.take(PATIENCE_S)) or not backlog.ended:
                stream.skipped, stream.lag_s = backlog.skipped, backlog.lag_s
                if found is None:
                    stream.catch_up()
                    continue
                stream.facts, before = self._source.facts, stream.encoded
                stream.add(found[1], found[0])
                if stream.encoded > before:
                    backlog.encoded()
                backlog.step_s = stream.step_s
                self.begun.set()
            stream.flush()
        except BaseException as problem:
            self.problem = None if self._closing else problem
            self._source.close()
            backlog.end()
        self.begun.set()
        self.ended.set()
