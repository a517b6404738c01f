"""Keeps the video that was read most recently open, so that reading another part of it is fast.

Opening an MP4 of several hours takes as long as decoding hundreds of frames. Without an index, the decoder continues from the last
requested time instead of from the beginning.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from evoprune.files import FileIdentity
from evoprune.video.info import Video
from evoprune.video.readers.track import Track

KEPT_BYTES = 2**28  # estimated maximum memory of all tracks that stay open, unless there is only one track


class OpenTracks:
    """Open tracks of a single video, for one request at a time. The request may use multiple threads."""

    def __init__(self):
        self._info: Video | None = None
        self._identity: FileIdentity | None = None
        self._idle: list[Track] = []
        self._lock = threading.Lock()

    def begin(self, info: Video) -> None:
        """Begin a request. Tracks of other videos, and of earlier states of the file, are closed."""
        identity = FileIdentity.settled(info.path)
        if identity is None or (info, identity) != (self._info, self._identity):
            self.close()
        self._info = info
        self._identity = identity

    def end(self) -> None:
        """End a request. Closes the tracks that would not make later requests faster."""
        kept = [
            track for track in self._idle if track.identity == self._identity is not None and track.is_worth_keeping
        ]
        while len(kept) > 1 and sum(track.memory_bytes for track in kept) > KEPT_BYTES:
            kept.pop(0)
        for track in self._idle:
            if track not in kept:
                track.close()
        self._idle = kept

    @property
    def memory_bytes(self) -> int:
        """Estimated memory of the tracks that are open between requests."""
        return sum(track.memory_bytes for track in self._idle)

    def close(self) -> None:
        """Close all tracks that no thread is using."""
        with self._lock:
            idle, self._idle = self._idle, []
        for track in idle:
            track.close()

    @contextmanager
    def borrow(self, threads: int | None = None) -> Iterator[Track]:
        """Yield a track for use by the current thread. A track that fails is closed.

        Args:
            threads: Number of decoder threads, or None if nothing will be decoded.
        """
        track = self._take(threads) or Track(self._info, threads or 1)
        try:
            yield track
        except Exception:
            track.close()
            raise
        except BaseException:  # the caller needs no more frames
            self._give_back(track)
            raise
        self._give_back(track)

    def _take(self, threads: int | None) -> Track | None:
        with self._lock:
            for place in reversed(range(len(self._idle))):
                if threads is None or self._idle[place].can_use(threads):
                    track = self._idle.pop(place)
                    break
            else:
                return None
        if threads is not None:
            track.use_threads(threads)
        return track

    def _give_back(self, track: Track) -> None:
        track.stop_skipping()
        with self._lock:
            self._idle.append(track)


_lasting: OpenTracks | None = None  # tracks that stay open between requests


def keep_open() -> OpenTracks:
    """Keep tracks open between requests from now on. The caller must close them when they are no longer needed."""
    global _lasting
    _lasting = OpenTracks()
    return _lasting


@contextmanager
def open_tracks(info: Video) -> Iterator[OpenTracks]:
    """Yield the open tracks of a video for a single request."""
    tracks = _lasting or OpenTracks()
    tracks.begin(info)
    try:
        yield tracks
    finally:
        tracks.end() if tracks is _lasting else tracks.close()
