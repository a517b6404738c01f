"""Opens videos and pictures: `begin` starts reading, `encode` encodes each once."""

import os
from collections.abc import Sequence

import torch

from evoprune.model.clock import Clock
from evoprune.pipeline.answering import EncodedInputs, EncodedVideo
from evoprune.pipeline.cache import Cache, entry_key
from evoprune.pipeline.encoding import EncodeRows, Encoding, Progress, encode_view
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.memory_check import TEXT, chunk_bytes, units_at_once
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.patches import PatchReader, ReadFrames
from evoprune.pipeline.subtitles import check_one_file
from evoprune.pipeline.view import View, make_view
from evoprune.pruning.budget import keep_count
from evoprune.video.frames import read_frames
from evoprune.video.info import PICTURE, VIDEO
from evoprune.video.probe import probe
from evoprune.vision.encoded import Encoded, EncodedRows


def open_inputs(
    engine: Engine,
    paths: Sequence[str | os.PathLike[str]],
    sampling: SamplingOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    cache: Cache | None = None,
) -> "OpenInputs":
    """Probes videos and pictures, and plans what is looked at; reads no frame.

    Args:
        paths: at least one, in the order in which the model reads them. Each may be repeated.
        sampling: applies to each of them; what it says of time, to the videos among them.
        names: what reports call them; default: their paths.
        cache: see `open_video`.

    Raises:
        VideoError: one is missing, unreadable or empty. UsageError: numbers that make no sense, a part of the time where there are
            pictures alone, or a file of subtitles for several inputs.
    """
    sampling = sampling or SamplingOptions()
    check_one_file(sampling.subtitles, len(paths))
    mixed = len(paths) > 1 and any(probe(path).kind == VIDEO for path in paths)
    still = sampling.timeless if mixed else sampling
    opened = []
    for path, name in zip(paths, names or [None] * len(paths), strict=True):
        opened.append(open_video(engine, path, sampling, name=name, cache=cache, still=still))
    return OpenInputs(opened)


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
    still: SamplingOptions | None = None,
) -> "OpenVideo":
    """Probes a video or a picture and plans its frames; reads none.

    Args:
        path: the file, or a folder of frames.
        name: what reports call it; default: its path.
        cache: where encoded inputs are kept. Not used for a method that reads the question, nor with another `read`.
        read: gives the frames; another function than `read_frames` shows something else than the video.
        encode_rows: instead of `vision.encoder.encode_rows`.
        threaded: whether a thread reads and preprocesses while the encoder runs; the result is the same.
        still: instead of `sampling` where the file is a picture.

    Raises:
        VideoError: missing, unreadable or empty. UsageError: numbers that make no sense.
    """
    clock, sampling = Clock(torch.device("cpu")), sampling or SamplingOptions()  # a clock that never waits for a GPU
    with clock.stage("read"):
        info = probe(path)
        view = make_view(engine, info, sampling if info.kind == VIDEO else still or sampling, name)
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
        return EncodedVideo(self.engine, self.encoding(progress))

    def encoding(self, progress: Progress | None = None, around: int = TEXT) -> Encoding:
        """As `encode`, but what was made alone. `around`: as of `memory_check.units_at_once`."""
        clock = Clock(self.engine.device)
        start = clock.now()
        earlier = 0.0 if self._begun else self._reader.clock.seconds["read"]
        self._look_up()
        facts = {"cut_short": self.view.cut_short, "limited": self.view.limited}
        warnings = [name for name, true in facts.items() if true]
        if self._cached:
            result, seconds = self._cached, {"preprocess": 0.0, "encode": 0.0} | self._reader.clock.seconds
        else:
            result, seconds = encode_view(self.engine, self.view, self._reader, progress, self._encode_rows, around)
            if self._reader.damaged:  # not stored, or the next run would not warn
                warnings.append("damaged_video")
            elif self._key and self._is_unchanged() and not self._cache.store(self._key, result):
                warnings.append("cache_not_written")
        cache = "hit" if self._cached else "miss" if self._key else "off"
        wall = earlier + clock.now() - start
        if self._stays_whole(result):
            warnings.append("whole_picture")
        return Encoding(self.view, result, seconds, wall, cache, tuple(warnings), self._reader.damaged)

    def _stays_whole(self, result: Encoded | EncodedRows) -> bool:
        """Whether a picture was to be pruned, by a method that keeps at least one whole frame pair."""
        engine, units = self.engine, self.view.units
        wanted = engine.method.acts_at(engine.budget) and keep_count(engine.budget, units) < units
        whole = isinstance(result, Encoded) and len(result.kept) == units
        return self.view.kind == PICTURE and wanted and whole

    def close(self) -> None:
        """Reads no further."""
        self._reader.close()

    def _is_unchanged(self) -> bool:
        """Whether the file is still the one that was looked up; another one may have been put in its place while it was read."""
        return entry_key(self.engine, self.view) == self._key

    def _look_up(self) -> None:
        if self._looked_up or not self._cache:
            return
        self._looked_up = True
        with self._reader.clock.stage("read"):
            self._key = entry_key(self.engine, self.view)
            self._cached = self._cache.load(self._key, self.engine.device) if self._key else None


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed.

    Attributes:
        inputs: each of them, opened.
    """

    def __init__(self, inputs: Sequence[OpenVideo]):
        self.inputs = list(inputs)

    @property
    def views(self) -> list[View]:
        """What is looked at, of each."""
        return [each.view for each in self.inputs]

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded; see `OpenVideo.in_cache`."""
        return all([each.in_cache for each in self.inputs])

    def begin(self) -> None:
        """Begins to read the first one; see `OpenVideo.begin`."""
        self.inputs[0].begin()

    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Reads, preprocesses and encodes one after the other; of a single input, the `EncodedVideo`.

        Args:
            progress: as of `encoding.encode_view`. Of several inputs also called with "input", which one begins, and how many.

        Raises:
            As `encoding.encode_view`. OutOfMemory before anything is read, if all inputs together need too much.
        """
        if len(self.inputs) == 1:
            return self.inputs[0].encode(progress)
        kept, encodings = sum(view.encoder.keep for view in self.views), []
        around = [TEXT + kept - view.encoder.keep for view in self.views]
        for each, more in zip(self.inputs, around, strict=True):
            units_at_once(each.engine, each.view, more)
        for number, (each, more) in enumerate(zip(self.inputs, around, strict=True), 1):
            if progress:
                progress("input", number, len(self.inputs))
            encodings.append(each.encoding(progress, more))
        return EncodedInputs(self.inputs[0].engine, encodings)

    def close(self) -> None:
        """Reads no further."""
        for each in self.inputs:
            each.close()
