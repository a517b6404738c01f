"""Inputs are probed and read while torch is imported and a model is loaded. Imports no torch.

The plan of an input follows from the description of the model (session/loading/description.py). A session takes the frames that
were read if the files have not changed since, and if its plan reads the same frames. Otherwise it reads the input anew.

Frames wait in the size in which they were decoded, because torch resizes them.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Unpack

from evoprune.backend import host_memory
from evoprune.errors import UsageError, VideoError
from evoprune.session.loading.description import ModelDescription, describe
from evoprune.session.options import ModelOptions, PruneOptions, SamplingOptions
from evoprune.session.planning import plan_input
from evoprune.session.reading import PATIENCE_S, Reading, Readings, chunk_bytes, probed, state_of, stop_all
from evoprune.session.signatures import takes
from evoprune.util import brief, from_keywords
from evoprune.video import FrameChunk, Plan, frames_at_once, read_chunks, wait_for

if TYPE_CHECKING:
    from evoprune.session.keywords import ReadAheadKeywords

Path = str | os.PathLike[str]
Asked = tuple[Sequence[Path], SamplingOptions]  # inputs that are opened together, and what is looked at of them

HELD_BYTES = 512 * 2**20  # of frames that wait; less where memory is short
SHARE = 16  # frames take at most this part of the memory that is available
FIRST = 4  # so many of many videos are read ahead


@dataclass(eq=False)
class _Early:
    """An input that is read early. Its thread fills in `state` and `request`."""

    path: str
    state: tuple | None = None  # of its files, before the thread probed them
    request: tuple[Any, ...] | None = None  # as `_request`, once the input is planned
    reading: Reading[FrameChunk] | None = None

    def gives(self, request: tuple[Any, ...]) -> bool:
        """Return True if it answers the request: it reads the same frames, and the files have not changed since.

        A reading that met an error in the video answers it, too; after any other error the session tries again.
        """
        problem = self.reading.problem
        failed = problem is not None and not isinstance(problem, VideoError)
        return self.request == request and self.state == state_of(self.path) is not None and not failed


class ReadAhead(Readings):
    """Inputs that are read before their model is loaded, one after the other. To be closed.

    It raises no errors: the session that opens an input meets them again.

    Args:
        model: The description of the model that the inputs are read for.
        asked: The inputs, in the order in which they will be encoded.
        pruning: A method that makes inputs smaller decides what is read; None if nothing is pruned.
        held_bytes: Upper bound on the bytes of waiting frames.
    """

    def __init__(
        self,
        model: ModelDescription,
        asked: Iterable[Asked],
        pruning: PruneOptions | None = None,
        held_bytes: int | None = None,
    ):
        if held_bytes is None:
            held_bytes = HELD_BYTES
            if (available := host_memory()) is not None:
                held_bytes = min(HELD_BYTES, available // SHARE)
        super().__init__(held_bytes)
        self.model = model
        self._pruning = pruning
        self._every: list[_Early] = []
        for paths, sampling in asked:
            names = [os.fspath(path) for path in paths]
            for place, path in enumerate(names):
                early = _Early(path)
                early.reading = Reading(partial(self._begin, early, names, place, sampling), self)
                self._every.append(early)
        self._left = [*self._every]  # not taken yet

    def close(self) -> None:
        """Drop all frames, and stop the threads."""
        self._left = []
        stop_all([early.reading for early in self._every])

    def take(self, plan: Plan) -> Reading[FrameChunk] | None:
        """Return the reading of exactly the frames of a plan, or None. The caller closes it.

        Take inputs in the order of `asked`: this drops all inputs before the one that it returns.
        """
        request = _request(plan)
        while True:
            with self.changed:
                paths = [early.path for early in self._left]
                if plan.info.path not in paths:
                    return None
                place = paths.index(plan.info.path)
                *before, early = self._left[: place + 1]
                self._left = self._left[place + 1 :]
            stop_all([earlier.reading for earlier in before])
            if self._has_begun(early.reading) and early.gives(request):
                return early.reading
            early.reading.close()

    def _has_begun(self, reading: Reading) -> bool:
        """Wait until a reading has begun. Return False at once if it waits for its turn behind a reading that a consumer takes,
        because that consumer may never finish.
        """
        if not reading.is_here:
            return False
        with self.changed:
            place = len(self.unfinished)
            if reading in self.unfinished:
                place = self.unfinished.index(reading)
            if any(earlier.taken for earlier in self.unfinished[:place]) and not reading.ended:
                return False
            # It is probed, so it is planned at once, unless the thread hangs.
            return wait_for(self.changed, lambda: reading.begun or reading.ended, PATIENCE_S)

    def _begin(
        self, early: _Early, names: Sequence[str], place: int, sampling: SamplingOptions, reading: Reading
    ) -> Iterator[FrameChunk]:
        """Probe and plan an input, and return the iterator that reads it."""
        early.state = state_of(early.path)
        infos = [probed(path, folder_fps=sampling.frame_rate) for path in names]
        plan = plan_input(self.model, infos[place], sampling.of_each(infos)[place], self._pruning)
        source = plan.source
        times = plan.sampling.times_s
        early.request = _request(plan)
        size = chunk_bytes(plan)
        reading.chunk_bytes = source.width * source.height * 3 * min(len(times), frames_at_once(source, size))
        cores = self.model.options.cores
        return read_chunks(source, times, chunk_bytes=size, cores=cores, **plan.read_arguments)


def _request(plan: Plan) -> tuple[Any, ...]:
    """Return the part of a plan that its frames depend on."""
    return plan.source, plan.sampling.times_s, plan.read_arguments


@takes(ModelOptions, SamplingOptions)
def read_ahead(path: Path | Sequence[Path], model: Path = "demo", **options: "Unpack[ReadAheadKeywords]") -> ReadAhead:
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
    return ReadAhead(describe(loading), [(paths, sampling)])
