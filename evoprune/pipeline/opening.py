"""Opens videos and pictures: `begin` starts reading, `encode` encodes each once."""

import os
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from evoprune.model.cost import Clock
from evoprune.pipeline.answering import EncodedInputs
from evoprune.pipeline.encoding import EncodeRows, Encoding, PatchReader, Progress, ReadFrames, encode_input
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.planning import TEXT, chunk_bytes, fitting_chunk, plan_input
from evoprune.pruning.budget import keep_tokens
from evoprune.video.frames import read_frames
from evoprune.video.info import PICTURE, check_one_file
from evoprune.video.probe import probe
from evoprune.vision.encoded import Encoded

if TYPE_CHECKING:
    from evoprune.pipeline.cache import Cache  # imported where one is used


def open_inputs(
    engine: Engine,
    paths: Sequence[str | os.PathLike[str]],
    sampling: SamplingOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    cache: "Cache | None" = None,
    read: ReadFrames = read_frames,
    encode_rows: EncodeRows | None = None,
    threaded: bool = True,
) -> "OpenInputs":
    """Probes videos and pictures, and plans what is looked at; reads no frame.

    Args:
        paths: at least one file or folder of frames, in the order in which the model reads them.
        sampling: applies to each of them; what it says of time, to the videos among them.
        names: what reports call them; default: their paths.
        cache: where encoded inputs are kept. Not used for a method that reads the question, nor with another `read`.
        read: gives the frames, instead of `video.frames.read_frames`.
        encode_rows: instead of `vision.encoder.encode_rows`.
        threaded: whether a thread reads and preprocesses while the encoder runs.

    Raises:
        VideoError: one is missing, unreadable or empty. UsageError: numbers that make no sense, a part of the time where there are
            pictures alone, or a file of subtitles for several inputs.
    """
    sampling = sampling or SamplingOptions()
    check_one_file(sampling.subtitles, len(paths))
    clocks, infos, readers = [Clock(torch.device("cpu")) for _ in paths], [], []  # clocks that never wait for a GPU
    for path, clock in zip(paths, clocks, strict=True):
        with clock.stage("read"):
            infos.append(probe(path))
    each = zip(clocks, infos, sampling.of_each(infos), names or [None] * len(paths), strict=True)
    for clock, info, wanted, name in each:
        with clock.stage("read"):
            plan = plan_input(engine, info, wanted, name)
        limits, size = engine.loaded.limits[plan.kind], chunk_bytes(engine, plan)
        readers.append(PatchReader(plan, limits, clock, size, read, threaded))
    usable = read is read_frames and not engine.method.reads_question
    return OpenInputs(engine, readers, cache if usable else None, encode_rows)


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed.

    Attributes:
        engine: what encodes them.
        plans: what is looked at, of each.
    """

    def __init__(
        self, engine: Engine, readers: Sequence[PatchReader], cache: "Cache | None", encode_rows: EncodeRows | None
    ):
        self.engine, self.plans = engine, [reader.plan for reader in readers]
        self._inputs = [_OpenInput(engine, reader, cache, encode_rows) for reader in readers]

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded. Reads whole files once, if there is a cache."""
        return all([each.stored is not None for each in self._inputs])

    def begin(self) -> None:
        """Begins to read the first one: its first chunk is ready when it returns, and a thread goes on to the next two.

        Call it while something else is computed: wall-clock times of reports count from `encode` on.

        Raises VideoError: unreadable. OutOfMemory.
        """
        self._inputs[0].begin()

    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Reads, preprocesses and encodes one after the other.

        `progress`: as of `encoding.encode_input`. Of several inputs also called with "input", which one begins, and how many.

        Raises:
            As `encoding.encode_input`. OutOfMemory before anything is read, if all inputs together need too much.
        """
        count, kept = len(self.plans), sum(plan.encoder.keep for plan in self.plans)
        other_tokens = [TEXT + kept - plan.encoder.keep for plan in self.plans]
        for plan, others in zip(self.plans, other_tokens, strict=True) if count > 1 else ():
            fitting_chunk(self.engine, plan, others)
        encodings = []
        for number, (each, others) in enumerate(zip(self._inputs, other_tokens, strict=True), 1):
            if progress and count > 1:
                progress("input", number, count)
            encodings.append(each.encode(progress, others))
        return EncodedInputs(self.engine, encodings)

    def close(self) -> None:
        """Reads no further."""
        for each in self._inputs:
            each.reader.close()


class _OpenInput:
    """One of `OpenInputs`."""

    def __init__(self, engine: Engine, reader: PatchReader, cache: "Cache | None", encode_rows: EncodeRows | None):
        self.engine, self.reader, self.cache, self.encode_rows = engine, reader, cache, encode_rows
        self.begun = False

    @cached_property
    def key(self) -> str | None:
        """Of its entry in the cache; None without one."""
        with self.reader.clock.stage("read"):
            return self.cache.key(self.engine, self.reader.plan) if self.cache else None

    @cached_property
    def stored(self) -> Encoded | None:
        """What the cache has."""
        if not self.key:
            return None
        with self.reader.clock.stage("read"):
            return self.cache.load(self.key, self.engine.device)

    def begin(self) -> None:
        self.begun = True
        if self.stored is None:
            self.reader.begin()

    def encode(self, progress: Progress | None, other_tokens: int) -> Encoding:
        """Encodes it, or takes it from the cache; `other_tokens`: as of `planning.fitting_chunk`."""
        engine, reader, plan, clock = self.engine, self.reader, self.reader.plan, Clock(self.engine.device)
        start, earlier = clock.now(), reader.clock.seconds["read"] if not self.begun else 0.0
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        if self.stored:
            result, seconds = self.stored, {"preprocess": 0.0, "encode": 0.0} | reader.clock.seconds
        else:
            result, seconds = encode_input(engine, plan, reader, progress, self.encode_rows, other_tokens)
            if reader.damaged:  # not stored, or the next run would not warn
                warnings.append("damaged_video")
            # Another file may have been put in its place while it was read.
            elif self.key and self.cache.key(engine, plan) == self.key and not self.cache.store(self.key, result):
                warnings.append("cache_not_written")
        wall = earlier + clock.now() - start
        rows, tokens = (None, result) if isinstance(result, Encoded) else (result, result.nothing_selected())
        wanted = engine.method.acts_at(engine.share) and keep_tokens(engine.share, plan.full.grid) < plan.units
        if plan.kind == PICTURE and rows is None and wanted and len(tokens.kept) == plan.units:
            warnings.append("whole_picture")  # the method keeps at least one whole frame pair
        cache = "hit" if self.stored else "miss" if self.key else "off"
        return Encoding(plan, tokens, rows, seconds, wall, cache, tuple(warnings), reader.damaged)
