"""Opens a video: `begin` starts reading, `encode` encodes it once."""

import os

import torch

from evoprune.model.clock import Clock
from evoprune.pipeline.answering import EncodedVideo
from evoprune.pipeline.cache import Cache, entry_key
from evoprune.pipeline.encoding import EncodeRows, Encoding, Progress, encode_view
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.memory_check import chunk_bytes
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.patches import PatchReader, ReadFrames
from evoprune.pipeline.view import View, make_view
from evoprune.video.frames import read_frames
from evoprune.vision.encoded import Encoded


def open_video(
    engine: Engine,
    path: str | os.PathLike[str],
    sampling: SamplingOptions | None = None,
    *,
    name: str | None = None,
    cache: Cache | None = None,
    read: ReadFrames = read_frames,
    encode_rows: EncodeRows | None = None,
    threaded: bool = True,
) -> "OpenVideo":
    """Probes a video and plans its frames; reads none.

    Args:
        path: the file, or a folder of frames.
        name: what reports call the video; default: its path.
        cache: where encoded videos are kept. Not used for a method that reads the question, nor with another `read`.
        read: gives the frames; another function than `read_frames` shows something else than the video.
        encode_rows: instead of `vision.encoder.encode_rows`.
        threaded: whether a thread reads and preprocesses while the encoder runs; the result is the same.

    Raises:
        VideoError: missing, unreadable or empty. UsageError: numbers that make no sense.
    """
    clock = Clock(torch.device("cpu"))  # never waits for a GPU
    with clock.stage("read"):
        view = make_view(engine, path, sampling or SamplingOptions(), name)
    reader = PatchReader(view, engine.loaded.limits[view.kind], clock, chunk_bytes(engine, view), read, threaded)
    usable = read is read_frames and not engine.method.reads_question
    return OpenVideo(engine, view, reader, cache if usable else None, encode_rows)


class OpenVideo:
    """Made by `open_video`. To be encoded once, and closed.

    Attributes:
        engine: what encodes it.
        view: what is looked at.
    """

    def __init__(
        self, engine: Engine, view: View, reader: PatchReader, cache: Cache | None, encode_rows: EncodeRows | None
    ):
        self.engine, self.view = engine, view
        self._reader, self._cache, self._encode_rows = reader, cache, encode_rows
        self._looked_up = self._begun = False
        self._key: str | None = None
        self._cached: Encoded | None = None

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded. Reads the whole file once, if there is a cache."""
        self._look_up()
        return self._cached is not None

    def begin(self) -> None:
        """Begins to read: the first chunk is ready when it returns, and a thread goes on to the next two.

        Call it while something else is computed: wall-clock times of reports count from `encode` on.

        Raises:
            VideoError: unreadable. OutOfMemory.
        """
        self._begun = True
        if not self.in_cache:
            self._reader.begin()

    def encode(self, progress: Progress | None = None) -> EncodedVideo:
        """Reads, preprocesses and encodes the video; see `encoding.encode_view`."""
        clock = Clock(self.engine.device)
        start = clock.now()
        earlier = 0.0 if self._begun else self._reader.clock.seconds["read"]
        self._look_up()
        facts = {"cut_short": self.view.cut_short, "limited": self.view.limited}
        warnings = [name for name, true in facts.items() if true]
        if self._cached:
            result, seconds = self._cached, {"preprocess": 0.0, "encode": 0.0} | self._reader.clock.seconds
        else:
            result, seconds = encode_view(self.engine, self.view, self._reader, progress, self._encode_rows)
            if self._reader.damaged:  # not stored, or the next run would not warn
                warnings.append("damaged_video")
            elif self._key and not self._cache.store(self._key, result):
                warnings.append("cache_not_written")
        cache = "hit" if self._cached else "miss" if self._key else "off"
        wall = earlier + clock.now() - start
        encoding = Encoding(self.view, result, seconds, wall, cache, tuple(warnings), self._reader.damaged)
        return EncodedVideo(self.engine, encoding)

    def close(self) -> None:
        """Reads no further."""
        self._reader.close()

    def _look_up(self) -> None:
        if self._looked_up or not self._cache:
            return
        self._looked_up = True
        with self._reader.clock.stage("read"):
            self._key = entry_key(self.engine, self.view)
            self._cached = self._cache.load(self._key, self.engine.device) if self._key else None
