"""Opens videos and pictures: `begin` starts reading, `encode` encodes each once."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from evoprune.model.cost import Clock
from evoprune.pipeline.answering import EncodedInputs
from evoprune.pipeline.encoding import EncodeRows, OpenInput, Progress, ReadFrames
from evoprune.pipeline.engine import Engine
from evoprune.pipeline.options import SamplingOptions
from evoprune.pipeline.planning import TEXT, fitting_chunk, plan_input
from evoprune.video.frames import read_frames
from evoprune.video.info import check_one_file
from evoprune.video.probe import probe

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
        cache: not used for a method that reads the question, nor with another `read`.
        read, encode_rows, threaded: as of `OpenInput`.

    Raises VideoError: one is missing, unreadable or empty. UsageError: numbers that make no sense, a part of the time where there
    are pictures alone, or a file of subtitles for several inputs.
    """
    sampling = sampling or SamplingOptions()
    check_one_file(sampling.subtitles, len(paths))
    clocks, infos, opened = [Clock(torch.device("cpu")) for _ in paths], [], []  # clocks that never wait for a GPU
    usable = cache if read is read_frames and not engine.method.reads_question else None
    for path, clock in zip(paths, clocks, strict=True):
        with clock.stage("read"):
            infos.append(probe(path))
    each = zip(clocks, infos, sampling.of_each(infos), names or [None] * len(paths), strict=True)
    for clock, info, wanted, name in each:
        with clock.stage("read"):
            plan = plan_input(engine, info, wanted, name)
        opened.append(OpenInput(engine, plan, clock, read, threaded, usable))
    return OpenInputs(engine, opened, encode_rows)


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed. `plans`: what is looked at, of each."""

    def __init__(self, engine: Engine, inputs: Sequence[OpenInput], encode_rows: EncodeRows | None):
        self.engine, self.plans = engine, [each.plan for each in inputs]
        self._inputs, self._encode_rows = inputs, encode_rows

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

        `progress`: as of `OpenInput.encode`. Of several inputs also called with "input", which one begins, and how many.

        Errors: as of `OpenInput.encode`. OutOfMemory before anything is read, if all inputs together need too much.
        """
        count, kept = len(self.plans), sum(plan.encoder.keep for plan in self.plans)
        other_tokens = [TEXT + kept - plan.encoder.keep for plan in self.plans]
        for plan, others in zip(self.plans, other_tokens, strict=True) if count > 1 else ():
            fitting_chunk(self.engine, plan, others)
        encodings = []
        for number, (each, others) in enumerate(zip(self._inputs, other_tokens, strict=True), 1):
            if progress and count > 1:
                progress("input", number, count)
            encodings.append(each.encode(progress, others, self._encode_rows))
        return EncodedInputs(self.engine, encodings)

    def close(self) -> None:
        """Reads no further."""
        for each in self._inputs:
            each.close()
