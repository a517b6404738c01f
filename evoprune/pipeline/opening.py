"""Opens videos and pictures: `begin` starts reading, `encode` encodes each once."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from evoprune.model.clock import Clock
from evoprune.pipeline.answering import EncodedInputs, encoded_inputs
from evoprune.pipeline.cache import Cache, entry_key
from evoprune.pipeline.encoding import EncodeRows, Encoding, Progress, encode_input
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.patches import PatchReader, ReadFrames
from evoprune.pipeline.planning import TEXT, chunk_bytes, plan_input, units_at_once
from evoprune.pipeline.subtitles import check_one_file
from evoprune.pruning.budget import keep_count
from evoprune.video.frames import read_frames
from evoprune.video.info import PICTURE
from evoprune.video.plan import Plan
from evoprune.video.probe import probe
from evoprune.vision.encoded import Encoded


def open_inputs(
    engine: Engine,
    paths: Sequence[str | os.PathLike[str]],
    sampling: SamplingOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    cache: Cache | None = None,
    read: ReadFrames = read_frames,
    encode_rows: EncodeRows | None = None,
    threaded: bool = True,
) -> "OpenInputs":
    """Probes videos and pictures, and plans what is looked at; reads no frame.

    Args:
        paths: at least one file or folder of frames, in the order in which the model reads them. Each may be repeated.
        sampling: applies to each of them; what it says of time, to the videos among them.
        names: what reports call them; default: their paths.
        cache: where encoded inputs are kept. Not used for a method that reads the question, nor with another `read`.
        read: gives the frames; another function than `read_frames` shows something else than the video.
        encode_rows: instead of `vision.encoder.encode_rows`.
        threaded: whether a thread reads and preprocesses while the encoder runs; the result is the same.

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


@dataclass
class _Entry:
    """What the cache has of an input: its key, None without one, and what it holds for it."""

    key: str | None = None
    encoded: Encoded | None = None


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed.

    Attributes:
        engine: what encodes them.
        plans: what is looked at, of each.
    """

    def __init__(
        self, engine: Engine, readers: Sequence[PatchReader], cache: Cache | None, encode_rows: EncodeRows | None
    ):
        self.engine, self.plans = engine, [reader.plan for reader in readers]
        self._readers, self._cache, self._encode_rows = readers, cache, encode_rows
        self._entries: list[_Entry | None] = [None] * len(readers)
        self._begun = False

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded. Reads whole files once, if there is a cache."""
        return all([self._entry(number).encoded is not None for number in range(len(self.plans))])

    def begin(self) -> None:
        """Begins to read the first one: its first chunk is ready when it returns, and a thread goes on to the next two.

        Call it while something else is computed: wall-clock times of reports count from `encode` on.

        Raises:
            VideoError: unreadable. OutOfMemory.
        """
        self._begun = True
        if self._entry(0).encoded is None:
            self._readers[0].begin()

    def encode(self, progress: Progress | None = None) -> EncodedInputs:
        """Reads, preprocesses and encodes one after the other; of a single input, an `EncodedVideo`.

        Args:
            progress: as of `encoding.encode_input`. Of several inputs also called with "input", which one begins, and how many.

        Raises:
            As `encoding.encode_input`. OutOfMemory before anything is read, if all inputs together need too much.
        """
        several = len(self.plans) > 1
        kept, encodings = sum(plan.encoder.keep for plan in self.plans), []
        around = [TEXT + kept - plan.encoder.keep for plan in self.plans]
        for plan, more in zip(self.plans, around, strict=True) if several else ():
            units_at_once(self.engine, plan, more)
        for number, more in enumerate(around):
            if progress and several:
                progress("input", number + 1, len(self.plans))
            encodings.append(self._encoding(number, progress, more))
        return encoded_inputs(self.engine, encodings)

    def _encoding(self, number: int, progress: Progress | None, around: int) -> Encoding:
        """Encodes one input, or takes it from the cache; `around`: as of `planning.units_at_once`."""
        plan, reader, clock = self.plans[number], self._readers[number], Clock(self.engine.device)
        start = clock.now()
        earlier = 0.0 if self._begun and number == 0 else reader.clock.seconds["read"]
        entry = self._entry(number)
        warnings = [name for name, true in {"cut_short": plan.cut_short, "limited": plan.limited}.items() if true]
        if entry.encoded:
            result, seconds = entry.encoded, {"preprocess": 0.0, "encode": 0.0} | reader.clock.seconds
        else:
            result, seconds = encode_input(self.engine, plan, reader, progress, self._encode_rows, around)
            if reader.damaged:  # not stored, or the next run would not warn
                warnings.append("damaged_video")
            # Another file may have been put in its place while it was read.
            elif entry.key and entry_key(self.engine, plan) == entry.key and not self._cache.store(entry.key, result):
                warnings.append("cache_not_written")
        wall = earlier + clock.now() - start
        rows, tokens = (None, result) if isinstance(result, Encoded) else (result, result.nothing_selected())
        if rows is None and self._stays_whole(plan, tokens):
            warnings.append("whole_picture")
        cache = "hit" if entry.encoded else "miss" if entry.key else "off"
        return Encoding(plan, tokens, rows, seconds, wall, cache, tuple(warnings), reader.damaged)

    def _stays_whole(self, plan: Plan, tokens: Encoded) -> bool:
        """Whether a picture was to be pruned, by a method that keeps at least one whole frame pair."""
        engine, units = self.engine, plan.units
        wanted = engine.method.acts_at(engine.budget) and keep_count(engine.budget, units) < units
        return plan.kind == PICTURE and wanted and len(tokens.kept) == units

    def close(self) -> None:
        """Reads no further."""
        for reader in self._readers:
            reader.close()

    def _entry(self, number: int) -> _Entry:
        """What the cache has of an input; looks it up once."""
        if self._entries[number] is None:
            self._entries[number] = entry = _Entry()
            if self._cache:
                with self._readers[number].clock.stage("read"):
                    entry.key = entry_key(self.engine, self.plans[number])
                    entry.encoded = self._cache.load(entry.key, self.engine.device) if entry.key else None
        return self._entries[number]
