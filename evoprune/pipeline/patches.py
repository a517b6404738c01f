"""The first two stages: frames are read, resized and cut into patches, chunk by chunk."""

from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing
from itertools import chain, islice

import numpy as np
import torch

from evoprune.model.clock import Clock
from evoprune.pipeline.prefetch import prefetched
from evoprune.video.frames import FrameChunk, read_frames
from evoprune.video.plan import InputLimits, Plan
from evoprune.vision.preprocess import patchify, resize

ReadFrames = Callable[..., Iterator[FrameChunk]]


def patches_of(frames: np.ndarray, plan: Plan, limits: InputLimits) -> torch.Tensor:
    """float32 `[rows, 1176]`: the patches of frames uint8 `[n, height, width, 3]`, resized as planned and normalised."""
    sizes = limits.patch_size, limits.temporal_patch_size, limits.merge_size
    resized = resize(torch.from_numpy(frames), plan.height, plan.width)
    return patchify(resized, limits.image_mean, limits.image_std, *sizes)


class PatchReader:
    """The patches of a video. `chunks` can be called again, which begins anew. To be closed.

    Args:
        clock: adds up the seconds of "read" and "preprocess".
        chunk_bytes: of decoded frames, held at a time.
        read: gives the frames, as `video.frames.read_frames`.
        threaded: whether a thread prepares the next chunks while one is used.

    Attributes:
        damaged: packets that could not be decoded, since `chunks` was last called.
    """

    def __init__(
        self,
        plan: Plan,
        limits: InputLimits,
        clock: Clock,
        chunk_bytes: int,
        read: ReadFrames = read_frames,
        threaded: bool = True,
    ):
        self.clock, self.damaged = clock, 0
        self.plan, self._limits, self._chunk_bytes = plan, limits, chunk_bytes
        self._read, self._threaded = read, threaded
        self._begun: Iterator[tuple[int, torch.Tensor]] | None = None
        self._open = ExitStack()

    def begin(self) -> None:
        """Has the first chunk ready when it returns; a thread goes on to the next two. Errors: as of `chunks`."""
        chunks = self._start()
        self._begun = chain(list(islice(chunks, 1)), chunks)

    def chunks(self) -> Iterator[tuple[int, torch.Tensor]]:
        """For every chunk, how many frames there were up to its end, and its patches `[rows, 1176]`, float32.

        Raises:
            VideoError: unreadable. OutOfMemory.
        """
        begun, self._begun = self._begun, None
        return begun or self._start()

    def close(self) -> None:
        """Reads no further."""
        self._begun = None
        self._open.close()

    def _start(self) -> Iterator[tuple[int, torch.Tensor]]:
        self.damaged = 0
        made = self._make()
        return self._open.enter_context(closing(prefetched(made) if self._threaded else made))

    def _make(self) -> Generator[tuple[int, torch.Tensor], None, None]:
        plan, limits = self.plan, self._limits
        read = self._read(plan.source, plan.sampling.times_s, decoder=plan.decoder, chunk_bytes=self._chunk_bytes)
        with closing(read) as chunks:
            for chunk in self.clock.each("read", chunks):
                self.damaged += chunk.damaged
                with self.clock.stage("preprocess"):
                    patches = patches_of(chunk.frames, plan, limits)
                yield chunk.first + len(chunk.frames), patches
