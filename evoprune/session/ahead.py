"""Probe and read inputs while torch is being imported and the model is being loaded. Does not import torch.

The model description (session/loading/description.py) is enough to determine which frames to read, so an input can be planned
before the model is loaded. The session later creates its own plan. If it needs the same frames and the files haven't changed, the
session uses the prefetched frames; otherwise, it reads the input again.

Prefetched frames keep their decoded size, because resizing them would require torch.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Unpack

from evoprune.backend import Host
from evoprune.errors import UsageError, VideoError
from evoprune.session.loading.description import ModelDescription, describe
from evoprune.session.options import ModelOptions, PruneOptions
from evoprune.session.reading import PATIENCE_S, Prefetcher, Reading, probed, state_of, stop_all
from evoprune.signatures import takes
from evoprune.suggestions import Suggesting
from evoprune.util import brief, from_keywords
from evoprune.video import FrameChunk, Plan, SamplingOptions, Scope, read_chunks

if TYPE_CHECKING:
    from evoprune.keywords import ReadAheadKeywords

Path = str | os.PathLike[str]

MAX_WAITING_BYTES = 512 * 2**20  # maximum size of prefetched frames in bytes; less if memory is low
MEMORY_SHARE = 16  # prefetched frames take at most 1 / MEMORY_SHARE of the available memory
MAX_GROUPS = 4  # maximum number of input groups to prefetch


@dataclass(eq=False)
class _Prefetch:
    """An input being prefetched. Its reader thread sets `state` and `request`."""

    paths: Sequence[str]  # the paths opened together with the input, including its own
    number: int  # index of the input in `paths`
    sampling: SamplingOptions
    state: tuple | None = None  # file state before probing; see `state_of`
    request: tuple[Any, ...] | None = None  # see `_request`; set once the input has been planned

    @property
    def path(self) -> str:
        return self.paths[self.number]

    def answers(self, request: tuple[Any, ...], problem: BaseException | None) -> bool:
        """Return True if the prefetched frames can be used for a session's request.

        The session must request the same frames, and the files must not have changed since they were probed. A prefetch that failed
        with a `VideoError` also qualifies, because the session would encounter the same error. After any other error, the session
        should read the input itself.

        Args:
            problem: The exception raised while reading ahead, or None.
        """
        failed = problem is not None and not isinstance(problem, VideoError)
        return self.request == request and self.state == state_of(self.path) is not None and not failed


class ReadAhead(Prefetcher[_Prefetch, FrameChunk], Suggesting):
    """Prefetches inputs one by one while the model is loading. Close it after use.

    Invalid inputs don't raise an error at this stage. The session raises the error later, when it opens the input.

    Args:
        model: The description of the model that will encode the inputs.
        asked: The input groups, in encoding order. Each group is a tuple of a list of paths to open together and their sampling
            options. Only the first `MAX_GROUPS` groups are prefetched.
        pruning: The pruning options, which are needed because some methods downscale the frames. None means no pruning.
        held_bytes: Maximum size of the prefetched frames, in bytes. Defaults to 512 MiB, or less if memory is low.
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
        groups = [([os.fspath(path) for path in paths], sampling) for paths, sampling in islice(asked, MAX_GROUPS)]
        inputs = [_Prefetch(paths, number, sampling) for paths, sampling in groups for number in range(len(paths))]
        super().__init__(inputs, self._begin, limit_bytes=held_bytes)
        self.model = model
        self._pruning = pruning
        self._stop_speech: list[Callable[[], None]] = []
        self.fill()

    def close(self) -> None:
        """Discard all prefetched frames and stop the reader threads."""
        super().close()
        while self._stop_speech:
            self._stop_speech.pop()()

    def take(self, plan: Plan) -> Reading[FrameChunk] | None:
        """Return a prefetched `Reading` of the frames required by a plan, or None. The caller must close it.

        Inputs must be requested in the same order as in `asked`, because this method discards all inputs before the returned one.
        """
        request = _request(plan)
        while True:
            with self.changed:
                paths = [prefetch.path for prefetch, _ in self.queue]
                if plan.info.path not in paths:
                    return None
                before = [self.queue.popleft()[1] for _ in range(paths.index(plan.info.path))]
                prefetch, reading = self.queue.popleft()
            stop_all(before)
            if self._has_started(reading) and prefetch.answers(request, reading.problem):
                return reading
            reading.close()

    def _has_started(self, reading: Reading) -> bool:
        """Wait for a `Reading` to start. Return True once it has started or ended, or False after `PATIENCE_S` seconds.

        If another consumer is still taking chunks from an earlier `Reading` in the queue, this returns False immediately, because
        that consumer may never finish.
        """
        if not reading.is_here:
            return False
        with self.changed:
            place = len(self.unfinished)
            if reading in self.unfinished:
                place = self.unfinished.index(reading)
            if any(earlier.taken for earlier in self.unfinished[:place]) and not reading.has_ended:
                return False
            # The session has already probed the input, so planning is fast unless the thread hangs.
            return Scope.wait_for(self.changed, lambda: reading.has_started, PATIENCE_S)

    def _begin(self, prefetch: _Prefetch, reading: Reading[FrameChunk]) -> Iterator[FrameChunk]:
        """Probe an input, plan which frames to read, and return an iterator over the frame chunks."""
        prefetch.state = state_of(prefetch.path)
        sampling = prefetch.sampling
        number = prefetch.number
        infos = [probed(path, folder_fps=sampling.frame_rate) for path in prefetch.paths]
        plan = self.model.plan(infos[number], sampling.of_each(infos)[number], self._pruning)
        source = plan.source
        times = plan.sampling.times_s
        prefetch.request = _request(plan)
        if sampling.speech != "none":
            from evoprune.session.speech import begin_speech

            self._stop_speech.append(begin_speech(plan, sampling, self.model.options))
        size = plan.chunk_bytes
        reading.chunk_bytes = source.width * source.height * 3 * min(len(times), source.frames_at_once(size))
        cores = self.model.options.cores
        chunks = read_chunks(source, times, chunk_bytes=size, cores=cores, **plan.read_arguments)
        return reading.timeline.each("read", chunks)


def _request(plan: Plan) -> tuple[Any, ...]:
    """Return the plan fields that determine which frames are read: the source, the timestamps, and the reader arguments."""
    return plan.source, plan.sampling.times_s, plan.read_arguments


@takes(ModelOptions, SamplingOptions, names=(*ModelOptions.LOADING, *SamplingOptions.FILES))
def read_ahead(path: Path | Sequence[Path], model: Path = "demo", **options: "Unpack[ReadAheadKeywords]") -> ReadAhead:
    """Start reading videos and images before the model is loaded. Does not import torch.

    Pass the result to `VideoQA.load(ahead=)`, which loads the model in parallel with reading the inputs:

        with evoprune.read_ahead("clip.mp4", "Qwen/Qwen2.5-VL-3B-Instruct", fps=2) as ahead:
            qa = evoprune.VideoQA.load("Qwen/Qwen2.5-VL-3B-Instruct", ahead=ahead)
            video = qa.encode("clip.mp4", fps=2)

    This saves time only until the model has been loaded. To read ahead with a loaded model, use `in_flight` from evoprune.session.
    Missing or unreadable inputs don't raise an error until they are encoded.

    Args:
        path: A file or a folder of frames, or a list of files and folders in encoding order.
        model: See `VideoQA.load`. For a hub model, missing small files such as config.json are downloaded immediately.
        options: The `VideoQA.load` options that select the model and the device, and any `encode` options.

    Raises:
        ModelError: If the model is missing, unsupported, or damaged, or the hub cannot be reached.
        UsageError: If an option is invalid, or no path is specified.
        TypeError: If an option is unknown.
    """
    loading, sampling = from_keywords({"model": model, **options}, ModelOptions, SamplingOptions)
    paths = path
    if isinstance(path, str | os.PathLike):
        paths = [path]
    if (
        not isinstance(paths, list | tuple)
        or not paths
        or not all(isinstance(each, str | os.PathLike) for each in paths)
    ):
        raise UsageError(f"the input is {brief(path)}, not a path", "give the path of a file or a folder of frames")
    return ReadAhead(describe(loading), [(paths, sampling)])
