"""Probe and read inputs while torch is being imported and a model is being loaded. Imports no torch.

An input can be planned before the model is loaded, because the plan depends only on the model's description
(session/loading/description.py). Later, the session makes its own plan. If that plan needs the same frames and the files have not
changed, the session uses the prefetched frames. Otherwise it reads the input again.

Prefetched frames are kept at their decoded size, because resizing them would need torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

from evoprune.backend import Host
from evoprune.errors import UsageError, VideoError
from evoprune.session.loading.description import ModelDescription, describe
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.reading import PATIENCE_S, Reading, Readings, probed, state_of, stop_all
from evoprune.session.speech import begin_speech
from evoprune.signatures import takes
from evoprune.util import brief, from_keywords
from evoprune.video import FrameChunk, Plan, SamplingOptions, Scope, read_chunks

if TYPE_CHECKING:
    from evoprune.keywords import ReadAheadKeywords

Path = str | os.PathLike[str]

MAX_WAITING_BYTES = 512 * 2**20  # maximum size of the waiting frames in bytes; less if little memory is available
MEMORY_SHARE = 16  # the waiting frames take at most 1 / MEMORY_SHARE of the available memory
MAX_GROUPS = 4  # maximum number of groups of inputs that are prefetched


@dataclass(eq=False)
class _Prefetch:
    """An input that is being prefetched. The thread that reads it sets `state` and `request`."""

    path: str
    state: tuple | None = None  # the state of the files, recorded before probing them
    request: tuple[Any, ...] | None = None  # see `_request`; set once the input has been planned
    reading: Reading[FrameChunk] | None = None

    def answers(self, request: tuple[Any, ...]) -> bool:
        """Return True if a session that makes this request can use the prefetch.

        The request must need the same frames, and the files must not have changed since. A prefetch that failed with a `VideoError`
        can be used too, because the session would get the same error. After any other error, the session should try again.
        """
        problem = self.reading.problem
        failed = problem is not None and not isinstance(problem, VideoError)
        return self.request == request and self.state == state_of(self.path) is not None and not failed


class ReadAhead(Readings):
    """Inputs that are prefetched one after another before their model is loaded. Close it after use.

    `ReadAhead` raises no errors for bad inputs. The session raises them later, when it opens the input.

    Args:
        model: The description of the model that will encode the inputs.
        asked: The groups of inputs in the order in which they will be encoded. A group consists of a list of paths that are opened
            together, and their sampling options. At most `MAX_GROUPS` groups are read.
        pruning: The pruning options. They are needed because a method may make inputs smaller. None means no pruning.
        held_bytes: Upper bound on the size of the waiting frames, in bytes. The default is 512 MiB, or less if little memory is
            available.
    """

    def __init__(
        self,
        model: ModelDescription,
        asked: Iterable[tuple[Sequence[Path], SamplingOptions]],
        pruning: PruneOptions | None = None,
        held_bytes: int | None = None,
    ):
        if held_bytes is None:
            held_bytes = MAX_WAITING_BYTES
            if (available := Host().available_memory()) is not None:
                held_bytes = min(MAX_WAITING_BYTES, available // MEMORY_SHARE)
        super().__init__(held_bytes)
        self.model = model
        self._pruning = pruning
        self._prefetches: list[_Prefetch] = []
        self._stop_speech: list[Callable[[], None]] = []
        for paths, sampling in islice(asked, MAX_GROUPS):
            names = [os.fspath(path) for path in paths]
            for place, path in enumerate(names):
                prefetch = _Prefetch(path)
                prefetch.reading = Reading(partial(self._begin, prefetch, names, place, sampling), self)
                self._prefetches.append(prefetch)
        self._remaining = [*self._prefetches]  # the inputs that `take` has neither returned nor dropped yet

    def close(self) -> None:
        """Drop all frames and stop the threads."""
        self._remaining = []
        stop_all([prefetch.reading for prefetch in self._prefetches])
        while self._stop_speech:
            self._stop_speech.pop()()

    def take(self, plan: Plan) -> Reading[FrameChunk] | None:
        """Return the `Reading` that provides exactly the frames of a plan, or None if there is none. The caller must close it.

        Take inputs in the order of `asked`, because this method drops all inputs that come before the one it returns.
        """
        request = _request(plan)
        while True:
            with self.changed:
                paths = [prefetch.path for prefetch in self._remaining]
                if plan.info.path not in paths:
                    return None
                place = paths.index(plan.info.path)
                *before, prefetch = self._remaining[: place + 1]
                self._remaining = self._remaining[place + 1 :]
            stop_all([earlier.reading for earlier in before])
            if self._has_started(prefetch.reading) and prefetch.answers(request):
                return prefetch.reading
            prefetch.reading.close()

    def _has_started(self, reading: Reading) -> bool:
        """Wait until a reading has started or ended, and return True. If that takes longer than `PATIENCE_S`, return False.

        This returns False without waiting if a consumer is taking chunks from a reading that comes earlier in the queue, because
        that consumer may never finish.
        """
        if not reading.is_here:
            return False
        with self.changed:
            place = len(self.unfinished)
            if reading in self.unfinished:
                place = self.unfinished.index(reading)
            if any(earlier.taken for earlier in self.unfinished[:place]) and not reading.ended:
                return False
            # Planning is quick unless the thread hangs, because the session has already probed the input.
            return Scope.wait_for(self.changed, lambda: reading.begun or reading.ended, PATIENCE_S)

    def _begin(
        self, prefetch: _Prefetch, names: Sequence[str], place: int, sampling: SamplingOptions, reading: Reading
    ) -> Iterator[FrameChunk]:
        """Probe and plan an input, and return an iterator over its frames."""
        prefetch.state = state_of(prefetch.path)
        infos = [probed(path, folder_fps=sampling.frame_rate) for path in names]
        plan = self.model.plan(infos[place], sampling.of_each(infos)[place], self._pruning)
        source = plan.source
        times = plan.sampling.times_s
        prefetch.request = _request(plan)
        self._stop_speech.append(begin_speech(plan, sampling, self.model.options))
        size = plan.chunk_bytes
        reading.chunk_bytes = source.width * source.height * 3 * min(len(times), source.frames_at_once(size))
        cores = self.model.options.cores
        return read_chunks(source, times, chunk_bytes=size, cores=cores, **plan.read_arguments)


def _request(plan: Plan) -> tuple[Any, ...]:
    """Return the part of a plan that determines which frames it needs."""
    return plan.source, plan.sampling.times_s, plan.read_arguments


@takes(ModelOptions, SamplingOptions)
def read_ahead(path: Path | Sequence[Path], model: Path = "demo", **options: "Unpack[ReadAheadKeywords]") -> ReadAhead:
    """Start reading videos and pictures before a model is loaded. Imports no torch.

    Pass the result to `VideoQA.load(ahead=)`, which loads the model while the inputs are being read:

        with evoprune.read_ahead("clip.mp4", "Qwen/Qwen2.5-VL-3B-Instruct", fps=2) as ahead:
            qa = evoprune.VideoQA.load("Qwen/Qwen2.5-VL-3B-Instruct", ahead=ahead)
            video = qa.encode("clip.mp4", fps=2)

    This is useful only before a model is loaded. If a model is already loaded, use `in_flight` (session/upcoming.py) to read ahead.
    If an input is missing or unreadable, the error is raised later, when the input is encoded.

    Args:
        path: A file or a folder of frames, or a list of them in the order in which they will be encoded.
        model: See `VideoQA.load`. Small files of a hub model that are missing, such as config.json, are downloaded immediately.
        options: The options of `VideoQA.load` that choose the model and the device, and the options of `encode`.

    Raises:
        ModelError: If the model is missing, unsupported or damaged, or cannot be reached.
        UsageError: If an option is invalid, or no path is given.
        TypeError: If an option is unknown.
    """
    loading, sampling = from_keywords({"model": model, **options}, ModelOptions, SamplingOptions)
    paths = path
    if isinstance(path, str | os.PathLike):
        paths = [path]
    if not isinstance(paths, list | tuple) or not all(isinstance(each, str | os.PathLike) for each in paths):
        raise UsageError(f"the input is {brief(path)}, not a path", "give the path of a file or a folder of frames")
    return ReadAhead(describe(loading), [(paths, sampling)])
