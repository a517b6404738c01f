"""Videos and pictures that are asked about together: opened, planned, and encoded one after the other."""

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from evoprune.errors import UsageError, names_plugins
from evoprune.keywords import brief
from evoprune.model.cost import Clock
from evoprune.session.answering import EncodedInputs
from evoprune.session.encoding import EncodeRows, OpenInput, Progress, ReadFrames
from evoprune.session.engine import Engine
from evoprune.session.options import SamplingOptions
from evoprune.session.planning import TEXT, fitting_chunk, plan_input
from evoprune.video.frames import probe, read_frames
from evoprune.video.info import check_one_file

if TYPE_CHECKING:
    from evoprune.session.cache import Cache

Path = str | os.PathLike[str]


def open_inputs(
    engine: Engine,
    paths: Sequence[Path],
    sampling: SamplingOptions | None = None,
    *,
    names: Sequence[str] | None = None,
    cache: "Cache | None" = None,
    read: ReadFrames = read_frames,
    encode_rows: EncodeRows | None = None,
    threaded: bool = True,
) -> "OpenInputs":
    """Probes videos and pictures, at least one, in the order in which the model reads them, and plans what is read; reads no frame.

    `sampling` applies to each, what it says of time to the videos. `names`: for reports; default: the paths. `cache`: not used for
    a method that reads the question, nor with another `read`. `read`, `encode_rows`, `threaded`: as of `OpenInput`.

    Raises VideoError: one is missing, unreadable or empty. UsageError: numbers that make no sense, a part of the time where
    there are pictures alone, or a file of subtitles for several inputs.
    """
    sampling = sampling or SamplingOptions()
    check_one_file(sampling.subtitles, len(paths))
    clocks, infos, opened = [Clock(torch.device("cpu")) for _ in paths], [], []  # clocks that never wait for a GPU
    usable = cache if read is read_frames and not engine.method.reads_question else None
    for path, clock in zip(paths, clocks, strict=True):
        with clock.stage("read"):
            infos.append(probe(path, folder_fps=sampling.frame_rate))
    each = zip(clocks, infos, sampling.of_each(infos), names or [None] * len(paths), strict=True)
    for clock, info, wanted, name in each:
        with clock.stage("read"):
            plan = plan_input(engine, info, wanted, name)
        opened.append(OpenInput(engine, plan, clock, read, encode_rows, threaded, usable))
    return OpenInputs(engine, opened)


class OpenInputs:
    """Made by `open_inputs`. To be encoded once, and closed. `plans`: what is looked at, of each."""

    def __init__(self, engine: Engine, inputs: Sequence[OpenInput]):
        self.engine, self.plans, self._inputs = engine, [each.plan for each in inputs], inputs

    @property
    def in_cache(self) -> bool:
        """Whether nothing has to be read or encoded. Reads whole files once, if there is a cache."""
        return all([each.stored is not None for each in self._inputs])

    def begin(self) -> None:
        """Reads the first chunk of the first one, while something else is computed; a thread goes on to the next two.

        Raises VideoError: unreadable. OutOfMemory.
        """
        self._inputs[0].begin()

    @names_plugins()
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
            encodings.append(each.encode(progress, others))
        return EncodedInputs(self.engine, encodings)

    def close(self) -> None:
        for each in self._inputs:
            each.close()


def paths_of(given: Any) -> Sequence[Path]:
    """The paths of one or of several inputs, as texts. Raises UsageError if there are none, or what was given are no paths."""
    paths = [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(paths, list | tuple) or not paths:
        raise UsageError(f"the input is {brief(given)}, not a path", "give the path of a file or a folder of frames")
    for each in paths:
        if not isinstance(each, str | os.PathLike) or isinstance(os.fspath(each), bytes):
            known = isinstance(each, EncodedInputs)
            hint = "ask takes it as it is: ask([encoded, ...], question)" if known else "give paths of files or folders"
            raise UsageError(f"an input is {brief(each)}, not a path", hint)
    return [os.fspath(each) for each in paths]
